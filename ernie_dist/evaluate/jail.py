"""Runs a Python program that may be hostile. A script of the standard library alone: python -I jail.py LIMITS < PROGRAM

this process --new namespaces: mounts, processes, network, ipc; users, unless root--> init, pid 1 --an empty root-->
program: a user of its own, no capabilities, limits, no system calls for memory that limits do not count

The program sees an empty folder in memory, the interpreter and the system's libraries, read-only, and nothing else: no
other process, no network, no file of anybody's. When init ends, the kernel kills whatever is left in its namespace.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as linux/audit.h numbers them
_REFUSED = {  # shmget, shmat, semget, msgget, memfd_create, memfd_secret, io_uring_setup
    "x86_64": (29, 30, 64, 68, 319, 447, 425),
    "aarch64": (194, 196, 190, 186, 279, 447, 425),
}
_X32 = 0x40000000
"""x86_64 knows every call by a second number, from here on"""
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 22, 24, 38
_NOBODY = 65534
_OWN = 1 << 30
"""numbers from here on belong to nobody: for root, the user of a program, whose processes can be counted"""
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    limits = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    _die_with_parent()
    user, proc = _OWN + os.getpid(), os.open("/proc", os.O_RDONLY)
    _write(proc, "self/oom_score_adj", "1000")  # where memory runs out, this is what the kernel ends first
    if limits["confined"]:
        if os.uname().machine not in _REFUSED:
            sys.exit(f"the jail is made for {' and '.join(_REFUSED)}, and this machine is {os.uname().machine}")
        _unshare(proc)
        _die_with_parent()  # new capabilities clear it
    child = os.fork()
    if child:
        # Ended in time or not, this process stays until the kernel has ended all that its init had started.
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        _exit_as(child)
    _die_with_parent()
    if limits["confined"]:
        _build_root(limits["disk"], user)
    with open("main.py", "wb") as file:
        file.write(program)
    runner = os.fork()
    if runner:  # pid 1 of the namespace: what outlives the program dies with it
        _call("prctl", _DUMPABLE, 0, 0, 0, 0)
        _exit_as(runner)
    _drop_everything(limits, user, proc)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    home = os.getcwd()
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-I", "main.py"], environment)


def _exit_as(child: int) -> None:
    """Waits for a child, reaping what else ends here, and ends as it did."""
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _die_with_parent() -> None:
    before = os.getppid()
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != before:
        os._exit(1)


def _unshare(proc: int) -> None:
    """Root needs no namespace of users to make the others; anybody else has to be root in one first."""
    if os.geteuid():
        _new_users(proc)
    _call("unshare", _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET)


def _new_users(proc: int) -> None:
    """A namespace with this one user, who can do anything in it until the next program is executed, and with no
    further ones inside: whoever could make one could mount as much memory as there is."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NEWUSER)
    _write(proc, "self/setgroups", "deny")
    _write(proc, "self/uid_map", f"{_NOBODY} {user} 1")
    _write(proc, "self/gid_map", f"{_NOBODY} {group} 1")
    _write(proc, "sys/user/max_user_namespaces", "0")


def _write(proc: int, path: str, content: str) -> None:
    file = os.open(path, os.O_WRONLY, dir_fd=proc)
    os.write(file, content.encode())
    os.close(file)


def _build_root(disk: int, user: int) -> None:
    """An empty root in memory with what Python needs, read-only; only the current folder can be written in."""
    python, link = [sys.prefix, sys.base_prefix], sys.executable
    while os.path.islink(link):  # an environment's interpreter may point to another environment's
        link = os.path.join(os.path.dirname(link), os.readlink(link))
        python.append(os.path.dirname(os.path.normpath(link)))
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
    wanted = [path for path in dict.fromkeys([*system, *python]) if os.path.lexists(path)]
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    os.chdir("/tmp")
    _check(_LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".old"), "pivot_root")
    os.chdir("/")
    for path, target in links.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    shown = [path for path in wanted if path not in links]
    inside = [path for path in shown if not any(path != one and path.startswith(one + "/") for one in shown)]
    for path in [*inside, "/dev/null", "/dev/zero", "/dev/urandom"]:
        _show(path)
    os.mkdir("/work")
    _mount("tmpfs", "/work", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk},nr_inodes=4096,mode=755")
    if not os.path.lexists("/tmp"):  # unless the interpreter lies in it
        os.symlink("/work", "/tmp")
    _check(_LIBC.umount2(b"/.old", _DETACH), "umount2")
    os.rmdir("/.old")
    _restrict("/", _ATTR_RDONLY, 0)
    os.chdir("/work")
    if os.geteuid() == 0:
        os.chown("/work", user, user)


def _show(path: str) -> None:
    """The same path of the old root, read-only, without devices unless it is one."""
    old = "/.old" + path
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    _mount(old, path, None, _MS_BIND | _MS_REC)
    if not path.startswith("/dev/"):
        _restrict(path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, _AT_RECURSIVE)


def _restrict(path: str, attributes: int, flags: int) -> None:
    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    wanted = Attributes(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = _LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), size)
    _check(done, f"mount_setattr {path}")


def _drop_everything(limits: dict, user: int, proc: int) -> None:
    """Resource limits, a user whose processes are nobody else's, no capabilities, and no way to get new ones."""
    for name in ("AS", "CPU", "FSIZE", "NOFILE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[name], limits[name]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits["confined"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["NPROC"],) * 2)  # else it counts all processes of this user
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            _call("prctl", _DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's, and no ids can be mapped
            _new_users(proc)
        for capability in range(64):
            if _LIBC.prctl(_CAPBSET_DROP, capability, 0, 0, 0):
                break  # past the last one this kernel knows
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    if limits["confined"]:
        _refuse_calls()
    # The ids are not 0, so what is left of the capabilities is lost when the program is executed.


def _refuse_calls() -> None:
    """A seccomp filter. Calls fail that get memory which stays when it is not mapped, so that no limit counts it; and
    all calls by the numbers of another architecture, which would pass by such a list."""
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    machine = os.uname().machine
    steps = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), (end, 0, 0, refuse), (load, 0, 0, 0)]
    for test, number in [(at_least, _X32), *((equal, number) for number in _REFUSED[machine])]:
        steps += [(test, 0, 1, number), (end, 0, 0, refuse)]  # not so: one further
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (end, 0, 0, allow)])
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(held))
    _check(_LIBC.prctl(_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp filter")


def _mount(source: str, target: str, kind: "str | None", flags: int, options: "str | None" = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    done = _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(done, f"mount {source} on {target}")


def _call(name: str, *arguments: int) -> None:
    _check(getattr(_LIBC, name)(*arguments), name)


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


if __name__ == "__main__":
    main()

"""Does generated code pass its tests? Each answer runs by itself, confined by `jail.py`, with limits on all it may use.

answer --take the code, add the tests--> program --jail--> passed, or why not
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_dist.spec.errors import DataError, EnvironmentProblem, SpecError

if TYPE_CHECKING:  # both know torch, which running a program does not need
    from ernie_dist.evaluate.asking import Asked
    from ernie_dist.evaluate.questions import Question

_JAIL = Path(__file__).with_name("jail.py")
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S | re.I)
_DEFINES = r"^(?:async +)?(?:def|class) +{0}\b|^{0} *(?::[^=\n]+)?=[^=]"
_TAIL = 4096
"""bytes of a program's output that are kept"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """wall time; processor time of each process as well"""
    memory: int = 1 << 30
    """bytes of address space of each process"""
    processes: int = 16
    """threads count too; only where it is confined"""
    disk: int = 64 << 20
    """bytes in its folder, which lies in memory"""
    file: int = 16 << 20
    """bytes of one file"""
    confined: bool = True
    """False: without namespaces, so that it can read and write what its user can"""

    def __post_init__(self) -> None:
        """Raises SpecError."""
        if self.seconds <= 0:
            raise SpecError(f"--exec-timeout {self.seconds:g}s: no program ends in that; give e.g. 10s")

    def arguments(self) -> str:
        seconds = int(self.seconds) + 1
        return json.dumps(
            {
                **{"AS": self.memory, "CPU": seconds, "FSIZE": self.file, "NPROC": self.processes, "NOFILE": 64},
                **{"disk": self.disk, "confined": self.confined},
            }
        )


@dataclass(frozen=True)
class Ran:
    passed: bool
    said: str
    """the last line of what it wrote, or why it was ended"""


def check_confinement() -> None:
    """Runs a harmless program that tries to get out. Raises EnvironmentProblem if it starts not at all, or gets out."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        ran = run(_PROBE.format(folder=folder), Limits(seconds=20))
        if ran.passed and not os.listdir(folder):
            return
    raise EnvironmentProblem(
        f"code cannot be confined here: {ran.said or 'the probe got out'}; it takes Linux 5.14 or newer on x86_64 or "
        "aarch64, and namespaces for unprivileged users (sysctl user.max_user_namespaces, on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0). In a machine that you can throw away, --exec-unconfined runs "
        "it with your own rights"
    )


def pass_table(
    questions: Sequence[Question],
    asked: Sequence[Asked],
    limits: Limits,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[list[bool]]:
    """[questions][answers]: whether each answer passes the tests of its question. Raises DataError without tests."""
    untested = sum(question.tests is None for question in questions)
    if untested:
        raise DataError(f"exec: {untested:,} of {len(questions):,} rows have no field `tests`; leave them out")
    programs = [
        program(question, answer) for question, one in zip(questions, asked, strict=True) for answer in one.answers
    ]

    def test(text: str) -> bool:
        passed = run(text, limits).passed
        progress(1)
        return passed

    with ThreadPoolExecutor(workers or workers_for(limits)) as pool:
        passed = iter(list(pool.map(test, programs)))
    return [[next(passed) for _ in one.answers] for one in asked]


def workers_for(limits: Limits) -> int:
    """How many programs run at once: fewer than there are cores, since waiting for one counts as time, and no more than
    fit into the free memory if each takes all it may."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    return max(1, min(len(os.sched_getaffinity(0)) - 1, free // (limits.memory * limits.processes)))


def program(question: Question, answer: str) -> str:
    """What is run: the answer's code, then the tests. An answer that goes on with the prompt is put after it."""
    fenced = _CODE.search(answer)
    code = fenced[1] if fenced else answer
    name, tests = question.entry_point, question.tests or ""
    if name and not re.search(_DEFINES.format(re.escape(name)), code, re.M):
        users = [turn.content for turn in question.turns or () if turn.role == "user"]
        prompt = (users[-1] if users else question.text).rstrip()
        code = f"{prompt}\n{code if fenced else _indented(code, prompt)}"
    if name and re.search(r"^def check\(", tests, re.M) and not re.search(r"^check\(", tests, re.M):
        tests += f"\ncheck({name})"
    return f"{code}\n\n{tests}\n"


def _indented(code: str, prompt: str) -> str:
    """Models learn and give answers without white space around them: the first line gets back what the prompt's end
    asks for."""
    last = prompt.rpartition("\n")[2]
    wanted = last[: len(last) - len(last.lstrip())] + "    " * last.endswith(":")
    return code if code[:1].isspace() else wanted + code


def run(text: str, limits: Limits) -> Ran:
    """Runs a program. It has passed if it comes to its last line and ends with 0 in time.

    The last line says a word that was not known before, so `exit()` in the middle is no pass. A program that reads its
    own text can say it: that is cheating, not an accident, and nothing that runs in one process can rule it out.
    """
    word = secrets.token_hex(16)
    ending = f"\n__import__('os').write(1, b'\\n{word}\\n')\n"
    with tempfile.TemporaryDirectory(prefix="ernie-exec-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", str(_JAIL), limits.arguments()],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
            **{"cwd": folder, "env": {}, "start_new_session": True},
        )
        try:
            said, in_time = _talk(child, (text + ending).encode("utf-8", "replace"), limits.seconds)
        finally:
            _end(child)
    lines = said.decode(errors="replace").strip().splitlines()
    if not in_time:
        return Ran(False, f"not finished after {limits.seconds:g} s")
    if word in lines:
        return Ran(child.returncode == 0, "" if child.returncode == 0 else f"exit code {child.returncode}")
    return Ran(False, lines[-1] if lines else f"ended before its tests did, with exit code {child.returncode}")


def _talk(child: subprocess.Popen[bytes], text: bytes, seconds: float) -> tuple[bytes, bool]:
    """(the end of what it wrote, whether it closed its output in time). Never holds more than the end."""
    assert child.stdin is not None and child.stdout is not None
    deadline, said = time.monotonic() + seconds, b""
    try:
        child.stdin.write(text)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it says why it did not start
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([child.stdout], [], [], left)
        if ready:
            more = os.read(child.stdout.fileno(), 1 << 16)
            if not more:
                return said, _ends(child, deadline)
            said = (said + more)[-_TAIL:]
    return said, False


def _ends(child: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether it ends in time. It is not reaped yet: until then its group keeps its number."""
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    """Killed, its init dies with it, and with that all processes of its namespace; without one, all of its group."""
    os.kill(child.pid, signal.SIGTERM)  # not reaped yet: it is still this one's number
    _ends(child, time.monotonic() + 5)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


_PROBE = """
import os, socket, threading
for path in ({folder!r} + "/out", "/usr/ernie-out", "/etc/ernie-out"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise SystemExit("it can write " + path)
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except ConnectionRefusedError:
    raise SystemExit("it has a network")
except OSError:
    pass
if os.listdir(".") != ["main.py"] or os.path.exists("/proc/self") or os.path.exists("/home"):
    raise SystemExit("it sees files of others")
if os.getuid() == 0 or os.getpid() > 3:
    raise SystemExit("it is not by itself")
threading.Thread(target=print).start()
"""

"""What a node looks at before each attempt: its GPUs, its disks, its clock, and what the site knows to look at."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ernie_dist.spec.orphan import die_with_parent

COMMAND_SECONDS = 120.0
"""what the site's command may take"""
_SMI_SECONDS = 60.0
_PROBE = bytes(1 << 16)
_TEMPORARY = 64 << 20
"""bytes that have to be free in the folder for temporary files"""
_SHARED_MEMORY = 5 << 20
"""bytes of /dev/shm per GPU: one segment of 4 MB, less is of no use to NCCL; it takes more where it can"""
_SKEW_SECONDS = 60.0
"""time limits and notices are times of day, given by one machine and read by another"""
_ON_THE_CPU = ", or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
_GPU_FIELDS = "index,uuid,pci.bus_id,ecc.errors.uncorrected.volatile.total"


def problems(folder: Path, gpus: int, command: str | None) -> list[str]:
    """Why no rank should be started on this node, one line each: what was found, the limit, what to do.

    folder: the attempt's, on the file system of the run; gpus: ranks the node is to run; command: a line of shell that
    fails on a node that should not be used, with the reason as its last line of output. [] if the node is fit.
    """
    return [*_gpus(gpus), *_shared_memory(gpus), *_temporary_files(), *_run_files(folder), *_site(command)]


# ----------------------------------------------------------------------------------------------------------------- GPUs


def _gpus(wanted: int) -> list[str]:
    """Nothing to say where there is no nvidia-smi, or where the GPUs are hidden: there ranks compute on the CPU."""
    if not _has_gpus():
        return []
    code, lines = _run(["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"], _SMI_SECONDS)
    if code is None:
        return [f"nvidia-smi gave no answer in {_SMI_SECONDS:g} s: the driver hangs; reboot the node"]
    rows = [cells for line in lines if len(cells := [cell.strip() for cell in line.split(",")]) == 4]
    said = [line for line in lines if re.search(r"is lost|unable to determine|failed", line, re.I)]
    if said or code:
        reason = (said or lines or [f"exit code {code}"])[0]
        return [f"nvidia-smi: {_short(reason)}; reset the GPU or reboot the node{_ON_THE_CPU}"]
    ours = _visible(rows)
    found = []
    if len(ours) < wanted:
        found.append(
            f"{len(ours)} GPU(s) can be used, {wanted} are wanted; have the node looked at, lower "
            f"resources.gpus_per_node{_ON_THE_CPU}"
        )
    for index, _, bus, errors in ours:
        if errors.isdigit() and int(errors):
            found.append(
                f"GPU {index} ({bus}) has {errors} uncorrected ECC error(s) since its driver was loaded, 0 are "
                "allowed; reset it or have the node drained"
            )
    pending = _pending_remaps()
    return [
        *found,
        *(
            f"GPU {index} ({bus}) has a row remap pending, rows of its memory are bad until it is reset; reset it"
            for index, uuid, bus, _ in ours
            if uuid in pending
        ),
    ]


def _has_gpus() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # the last is Slurm's word for none
    return not hidden and shutil.which("nvidia-smi") is not None


def _visible(rows: Sequence[list[str]]) -> list[list[str]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves us, by index or by the beginning of their uuid."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or "MIG-" in visible:  # nvidia-smi lists whole GPUs
        return list(rows)
    names = [name.strip() for name in visible.split(",")]
    return [
        row for row in rows if any(name == row[0] or (name[:4] == "GPU-" and row[1].startswith(name)) for name in names)
    ]


def _pending_remaps() -> set[str]:
    """uuid of each GPU that waits for a reset. GPUs before Ampere, and old drivers, remap nothing."""
    fields = "gpu_uuid,remapped_rows.pending"
    code, lines = _run(["nvidia-smi", f"--query-remapped-rows={fields}", "--format=csv,noheader"], _SMI_SECONDS)
    cells = [line.split(",") for line in lines if line.count(",") == 1] if code == 0 else []
    return {uuid.strip() for uuid, pending in cells if pending.strip().lower() in ("yes", "1")}


# --------------------------------------------------------------------------------------------------------- disks, clock


def _shared_memory(gpus: int) -> list[str]:
    """NCCL's buffers between the GPUs of one node; a container has 64 MiB unless it is given more."""
    shared, needed = Path("/dev/shm"), gpus * _SHARED_MEMORY
    if gpus == 1 or not _has_gpus():
        return []
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    if free >= needed:
        return []
    return [
        f"{shared}: {_mib(free)} free, NCCL needs {_mib(needed)} for {gpus} GPUs; remove what dead processes left "
        "there (nccl-*), or give the container more (--shm-size=1g)"
    ]


def _temporary_files() -> list[str]:
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    try:
        system = os.statvfs(folder)
    except OSError as error:
        return [f"{folder}: {error.strerror}; make the folder for temporary files, or set TMPDIR"]
    free = system.f_frsize * system.f_bavail
    if free < _TEMPORARY:
        return [f"{folder}: {_mib(free)} free, temporary files need {_mib(_TEMPORARY)}; clear it or set TMPDIR"]
    if system.f_files and not system.f_favail:
        return [f"{folder}: no inode is free for temporary files; clear it or set TMPDIR"]
    return []


def _run_files(folder: Path) -> list[str]:
    """A file is written: quotas show only so. Its time is the file server's, which all nodes can be compared with."""
    file = folder / f".health-{socket.gethostname()}-{os.getpid()}"
    try:
        with file.open("xb") as probe:
            probe.write(_PROBE)
            probe.flush()
            os.fsync(probe.fileno())
        before = time.time()
        os.utime(file)  # without a time of ours: a file server takes its own
        after, there = time.time(), file.stat().st_mtime
    except OSError as error:
        return [f"{folder}: cannot be written here: {error.strerror}; free space, or mount it on this node"]
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    skew = before - there if there < before else after - there if there > after else 0.0
    if abs(skew) <= _SKEW_SECONDS:
        return []
    return [
        f"the clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the one of the file server of "
        f"{folder}, {_SKEW_SECONDS:.0f} s are allowed; set it (chronyc makestep)"
    ]


# -------------------------------------------------------------------------------------------------- what the site knows


def _site(command: str | None) -> list[str]:
    if command is None:
        return []
    code, lines = _run(["/bin/sh", "-c", command], COMMAND_SECONDS)
    if code == 0:
        return []
    if code is None:
        return [f"resources.health_check did not end within {COMMAND_SECONDS:g} s and was killed: {_short(command)}"]
    said = _short(lines[-1]) if lines else f"no output from {_short(command)}"
    return [f"resources.health_check failed with exit code {code}: {said}"]


def _run(words: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """Exit code, None if it took too long and was killed; the lines of its output."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    code: int | None = None
    output = ""
    try:
        output, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits in the kernel for a driver does not even die
            process.communicate(timeout=5)
    return code, [line.strip() for line in output.splitlines() if line.strip()]


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:299] + "…"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"

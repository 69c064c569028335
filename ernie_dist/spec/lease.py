"""Who may write into a run directory: one launch at a time, also between hosts that share nothing but the folder.

RUN_DIR/lease/00000003.json    the third holder. The highest number counts, and a number is given once: a file of that
                               name is made by link(), which only one of two can do. So a holder that was taken over can
                               renew its own file as often as it likes, and never overwrites its successor's.

Clocks of two hosts are never compared: a lease is stale when its heartbeat did not change while the reader watched.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ernie_dist.spec.errors import LeaseLost, RunDirError
from ernie_dist.spec.run_files import RunFiles

BEAT, PATIENCE = 5.0, 30.0
"""seconds between two heartbeats; seconds without one, on the reader's clock, that make a lease stale"""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""variable by which Ray tells the entry point of a job which one it is"""


@dataclass(frozen=True)
class Holder:
    """What a lease file says."""

    number: int
    token: str
    host: str = "an unknown host"
    kernel: str = ""
    """boot and process namespace: only within the same one a process id says anything"""
    pid: int = 0
    started: str = ""
    """when the process started, in the kernel's ticks: tells it from a later one with the same id"""
    job: str = ""
    """the scheduler's id of the launch, such as "slurm 1234"; "" without a scheduler"""
    attempt: int = 0
    """the one attempt that may publish"""
    beat: int = 0
    released: bool = False

    def alive(self) -> bool | None:
        """Whether its process lives; None if that cannot be seen from here."""
        if not self.kernel or self.kernel != _kernel():
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid}{f', {self.job}' if self.job else ''})"


class Vigil:
    """Watches a lease on our own clock."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._seen: tuple[str, int] | None = None
        self._since = time.monotonic()

    def alive(self, holder: Holder) -> bool | None:
        """True once it is known to live, False once it is known to be dead, None until then."""
        known = holder.alive()
        if known is not None:
            return known
        first, now = self._seen is None, (holder.token, holder.beat)
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
            return None if first else True
        return False if time.monotonic() - self._since > self._patience else None


class Lease:
    """A run directory held by this process, renewed by a thread until it is released or lost."""

    def __init__(self, folder: Path, holder: Holder, *, taken_over: bool, beat: float = BEAT) -> None:
        self._folder, self._holder, self._every = folder, holder, beat
        self.taken_over = taken_over
        """whether the holder before did not let go by itself"""
        self._lost, self._over, self._lock = False, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        *,
        attempt: int,
        wait: bool = False,
        say: Callable[[str], None] = print,
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> Lease:
        """Takes the lease if nobody living holds it. `attempt` is the lowest number the new holder may use.

        Raises RunDirError if another launch holds it, or waits for it with `wait`. Telling a dead holder on another
        host from a living one takes up to `patience` seconds.
        """
        folder, vigil, told = RunFiles(run_dir).lease, Vigil(patience), False
        while True:
            before = current(folder)
            alive = None if before is None or before.released else vigil.alive(before)
            if before is None or before.released or alive is False:
                holder = _claim(folder, before, attempt)
                if holder is not None:
                    taken_over = before is not None and not before.released
                    return cls(folder, holder, taken_over=taken_over, beat=beat)
                continue
            if alive and not wait:
                raise RunDirError(
                    f"{run_dir}: another launch is running in it, on {before}; watch it with `ernie status {run_dir}`, "
                    f"end it with `ernie stop {run_dir}`, or wait for its end with `ernie launch --wait`"
                )
            if not told:
                what = "waiting for its end" if wait else f"watching for up to {patience:.0f} s whether it still lives"
                say(f"{run_dir} is held by {before}: {what}")
                told = True
            time.sleep(min(0.5, beat / 4))

    @property
    def lost(self) -> bool:
        """Whether another launch has taken over, as the last heartbeat found it."""
        return self._lost

    def begin(self, attempt: int) -> None:
        """From now on `attempt` is the one that may publish. Raises LeaseLost."""
        with self._lock:
            self._renew(attempt=attempt)
        self.refuse_if_lost()

    def confirm(self) -> None:
        """`refuse_if_lost`, as it is at this moment and not as the last heartbeat found it."""
        with self._lock, suppress(OSError):
            self._renew()
        self.refuse_if_lost()

    def refuse_if_lost(self) -> None:
        """Raises LeaseLost once another launch has taken over."""
        if self._lost:
            raise LeaseLost(
                f"{self._folder.parent}: {current(self._folder) or 'somebody who removed the lease'} has taken over "
                "this run; this launch has ended its ranks and leaves the folder alone"
            )

    def release(self) -> None:
        """Lets go, so that the next launch need not watch."""
        self._over.set()
        self._thread.join(timeout=self._every)
        with self._lock, suppress(OSError):
            self._renew(released=True)

    def _beat(self) -> None:
        while not self._over.wait(self._every) and not self._lost:
            with self._lock, suppress(OSError):  # a full disk or a file server in trouble: tried again
                self._renew()

    def _renew(self, *, attempt: int | None = None, released: bool = False) -> None:
        now = current(self._folder)
        if self._lost or now is None or now.token != self._holder.token:
            self._lost = True
            return
        number = self._holder.attempt if attempt is None else attempt
        self._holder = replace(self._holder, beat=self._holder.beat + 1, attempt=number, released=released)
        aside = _write_aside(self._folder, self._holder)
        aside.replace(_path(self._folder, self._holder.number))


def current(folder: Path) -> Holder | None:
    """Who holds, or held last; None if nobody ever did."""
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return None
        try:
            text = _path(folder, numbers[-1]).read_text(encoding="utf-8")
        except FileNotFoundError:  # removed by a later holder, which is there now
            continue
        try:
            return Holder(**{**json.loads(text), "number": numbers[-1]})
        except (ValueError, TypeError):  # a machine that lost power: for the watching to judge
            return Holder(numbers[-1], token=text)


def holds(run_dir: Path, attempt: int) -> bool:
    """Whether an attempt may still publish. True where no launcher ever held the folder."""
    holder = current(RunFiles(run_dir).lease)
    return holder is None or holder.attempt == attempt


def refuse_if_lost(run_dir: Path, attempt: int) -> None:
    """Raises LeaseLost if a later attempt owns the run: to be called right before anything is published."""
    if not holds(run_dir, attempt):
        holder = current(RunFiles(run_dir).lease)
        raise LeaseLost(
            f"{run_dir}: attempt {attempt} may not publish any more: attempt {holder and holder.attempt} owns the run, "
            f"on {holder}; nothing was changed"
        )


def _claim(folder: Path, before: Holder | None, attempt: int) -> Holder | None:
    """Makes the next number ours; None if somebody else was quicker."""
    holder = Holder(
        number=before.number + 1 if before else 1,
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        kernel=_kernel(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        job=_job(),
        attempt=max(attempt, before.attempt + 1 if before and not before.released else 0),
    )
    folder.mkdir(parents=True, exist_ok=True)
    aside, target = _write_aside(folder, holder), _path(folder, holder.number)
    try:
        os.link(aside, target)
    except FileExistsError:
        if aside.stat().st_nlink != 2:  # over NFS a link may be made and its answer lost
            return None
    finally:
        aside.unlink()
    now = current(folder)
    if now is None or now.token != holder.token:  # we looked long ago: this number had come and gone
        target.unlink(missing_ok=True)
        return None
    for number in _numbers(folder):
        if number < holder.number:
            _path(folder, number).unlink(missing_ok=True)
    return holder


def _write_aside(folder: Path, holder: Holder) -> Path:
    path = folder / f".{holder.token}"
    path.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    return path


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.json"))


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Field 22 of /proc/PID/stat, counted after the command, which may hold spaces. "" if there is no process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _job() -> str:
    with suppress(KeyError, ValueError):
        return f"ray {json.loads(os.environ[RAY_JOB])['metadata']['job_submission_id']}"
    with suppress(KeyError):
        return f"slurm {os.environ['SLURM_JOB_ID']}"
    return ""

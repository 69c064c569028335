"""What a drill does to a run: each fault is done from outside, by the means that reality has.

Run (a launch under way) --fault--> what was hit, in words
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.spec.run_files import RunFiles, complete_checkpoints


class Missed(Exception):
    """The moment that a fault waits for did not come: the launch ended first."""


@dataclass
class Run:
    """One launch under way."""

    files: RunFiles
    launch: subprocess.Popen[bytes]
    chance: random.Random

    def ranks(self) -> dict[int, int]:
        """rank -> pid of the ranks on this machine."""
        import psutil

        found = {}
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "ernie_dist" in words and str(self.files.root) in words:
                try:
                    rank = process.environ().get("RANK")
                except psutil.Error:  # it has just ended
                    continue
                if rank is not None:
                    found[int(rank)] = process.pid
        return found

    def any_rank(self) -> tuple[int, int]:
        ranks = self.ranks()
        if not ranks:
            raise Missed
        rank = self.chance.choice(sorted(ranks))
        return rank, ranks[rank]

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120.0) -> None:
        until = time.monotonic() + seconds
        while not happened():
            if self.launch.poll() is not None or time.monotonic() > until:
                raise Missed
            time.sleep(0.005)

    def kill_everything(self) -> None:
        """As if the machine had lost its power: launcher, torchrun and ranks at once, none of which can say a word."""
        ranks = list(self.ranks().values())
        for pid in [self.launch.pid, *ranks]:
            _signal(pid, signal.SIGKILL)
        self.launch.wait()
        self.wait_until_gone(ranks)

    @staticmethod
    def wait_until_gone(pids: Iterable[int], seconds: float = 30.0) -> bool:
        """Whether none of the processes is left."""
        import psutil

        left = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                left.append(psutil.Process(pid))
        return not psutil.wait_procs(left, timeout=seconds)[1]


def kill_rank(run: Run) -> str:
    rank, pid = run.any_rank()
    _signal(pid, signal.SIGKILL)
    return f"kill -9 of rank {rank}"


def kill_in_save(run: Run) -> str:
    run.wait_for(lambda: any((path / "engine").is_dir() for path in run.files.checkpoints.glob("step_*.tmp")))
    return kill_rank(run) + " while a checkpoint was being written"


def power_off(run: Run) -> str:
    run.kill_everything()
    return "kill -9 of the launcher and all ranks"


def terminate(run: Run) -> str:
    run.launch.send_signal(signal.SIGTERM)
    return "SIGTERM to the launcher"


def freeze_rank(run: Run) -> str:
    rank, pid = run.any_rank()
    _signal(pid, signal.SIGSTOP)
    return f"SIGSTOP of rank {rank}"


def fill_disk(run: Run) -> str:
    """The kernel refuses the last rank every file larger than its logs, from its next write on."""
    ranks = run.ranks()
    if not ranks:
        raise Missed
    rank = max(ranks)
    limit = 4096 + max(path.stat().st_size for path in (run.files.metrics, run.files.events))
    resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (limit, limit))
    return f"no room for what rank {rank} writes (RLIMIT_FSIZE)"


def truncate_checkpoint(run: Run) -> str:
    return _damage(run, lambda path: os.truncate(path, path.stat().st_size - 1), "truncated")


def flip_bit(run: Run) -> str:
    def flip(path: Path) -> None:
        with path.open("r+b") as file:
            place = file.seek(run.chance.randrange(path.stat().st_size))
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << run.chance.randrange(8))]))

    return _damage(run, flip, "with one bit flipped")


def _damage(run: Run, spoil: Callable[[Path], None], how: str) -> str:
    run.wait_for(lambda: len(complete_checkpoints(run.files.checkpoints)) > 1)
    run.kill_everything()
    newest = complete_checkpoints(run.files.checkpoints)[0]
    path = run.chance.choice(sorted(newest.rglob("*.pt")))
    spoil(path)
    return f"power off, {newest.name}/{path.relative_to(newest)} {how}"


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass(frozen=True)
class Fault:
    do: Callable[[Run], str]
    means: str
    launcher_ends: bool = False
    """whether somebody has to launch again; else the launcher starts the next attempt"""


FAULTS = {
    "kill": Fault(kill_rank, "kill -9 of a random rank"),
    "kill-in-save": Fault(kill_in_save, "the same in the middle of a save"),
    "power-off": Fault(power_off, "kill -9 of everything at once", launcher_ends=True),
    "term": Fault(terminate, "SIGTERM, as a scheduler preempts", launcher_ends=True),
    "freeze": Fault(freeze_rank, "SIGSTOP of a random rank: the watchdog has to end it"),
    "disk": Fault(fill_disk, "a rank that cannot write its part of a checkpoint"),
    "truncate": Fault(truncate_checkpoint, "the newest checkpoint loses a byte", launcher_ends=True),
    "flip": Fault(flip_bit, "the newest checkpoint has one bit wrong", launcher_ends=True),
}
RANKS = "ranks"
"""another number of ranks for a while: a run of its own, equal but for rounding"""

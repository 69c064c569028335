"""Where every rank of this node is: a few bytes of shared memory that the rank writes and the watchdog reads.

FOLDER/rank_00000         pid, phase, step, since when, last sign of life, the longest time of each phase
FOLDER/stacks_rank_00000  the rank's Python stacks, written when STACKS is sent to it
"""

from __future__ import annotations

import faulthandler
import hashlib
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ernie_dist.spec.run_files import RunFiles

STACKS = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""a rank answers with its stacks, whatever it is doing; the other signals have a meaning elsewhere"""
PULSE_SECONDS = 1.0


class Phase(IntEnum):
    """What a rank is doing, in the order of one step of the loop."""

    START = 0
    PREFLIGHT = 1
    READ = 2
    FIRST_STEP = 3
    STEP = 4
    EVALUATE = 5
    SAVE = 6
    EXPORT = 7
    CLOSE = 8

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")

    @property
    def trains(self) -> bool:
        return self in (Phase.FIRST_STEP, Phase.STEP)


_PID, _PLACE, _PULSE, _LONGEST = (struct.Struct(text) for text in ("<q", "<qqd", "<d", f"<{len(Phase)}d"))
_PLACE_AT = _PID.size
_PULSE_AT = _PLACE_AT + _PLACE.size
_LONGEST_AT = _PULSE_AT + _PULSE.size
_SIZE = _LONGEST_AT + _LONGEST.size


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself. Times are seconds of the monotonic clock, which all processes of a node share."""

    pid: int
    phase: Phase
    step: int
    since: float
    alive: float
    """when a Python thread of it last ran; stands still when native code keeps the interpreter lock"""
    longest: tuple[float, ...]
    """seconds the longest of each phase took in this attempt; 0 for none"""


class Heartbeat:
    """Writes where this rank is. A change of phase is one write to memory; without a file nobody reads it."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory or mmap.mmap(-1, _SIZE)
        self._phase, self._step, self._since = Phase.START, 0, time.monotonic()
        self.on_end: Callable[[Phase, int, float], None] | None = None
        """called with phase, step and seconds of what has just ended"""
        _PID.pack_into(self._memory, 0, os.getpid())
        _PLACE.pack_into(self._memory, _PLACE_AT, self._phase, self._step, self._since)
        self.pulse()

    def enter(self, phase: Phase, step: int) -> None:
        """From now on this rank is in `phase` of `step`."""
        now = time.monotonic()
        ended, at, seconds = self._phase, self._step, now - self._since
        self._phase, self._step, self._since = phase, step, now
        _PLACE.pack_into(self._memory, _PLACE_AT, phase, step, now)
        longest = _LONGEST_AT + 8 * ended
        if seconds > _PULSE.unpack_from(self._memory, longest)[0]:
            _PULSE.pack_into(self._memory, longest, seconds)
        if self.on_end is not None:
            self.on_end(ended, at, seconds)

    def touch(self) -> None:
        """A part of the phase is done: how long it may take counts from now. Its length is still that of the whole."""
        _PLACE.pack_into(self._memory, _PLACE_AT, self._phase, self._step, time.monotonic())

    def pulse(self) -> None:
        """Says that Python runs."""
        _PULSE.pack_into(self._memory, _PULSE_AT, time.monotonic())


def read_pulse(path: Path) -> Pulse | None:
    """None if the rank has not begun, or has ended in good order."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _SIZE:
        return None
    phase, step, since = _PLACE.unpack_from(content, _PLACE_AT)
    return Pulse(
        pid=_PID.unpack_from(content)[0],
        phase=Phase(phase),
        step=step,
        since=since,
        alive=_PULSE.unpack_from(content, _PULSE_AT)[0],
        longest=_LONGEST.unpack_from(content, _LONGEST_AT),
    )


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks_rank_{rank:05d}"


def flight_pipe(folder: Path, rank: int) -> Path:
    """Where NCCL's flight recorder listens for the request to write what it knows; torch appends `RANK.pipe`."""
    return folder / f"nccl_{rank}.pipe"


class Watched:
    """This rank's heartbeat in the node's folder, from the beginning of its process to its end.

    The first rank of the node also starts the watchdog: a process of its own session, that a signal to the ranks'
    group does not reach, and that ends with this one.
    """

    def __init__(self, files: RunFiles, attempt: int, environment: Mapping[str, str] = os.environ) -> None:
        rank, local_rank = int(environment.get("RANK", 0)), int(environment.get("LOCAL_RANK", 0))
        self._folder, self._rank = node_folder(files.root, attempt, environment), rank
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _ask_nccl_for_traces(self._folder, files.attempt(attempt))
        self._stacks = stacks_file(self._folder, rank).open("wb")
        faulthandler.register(STACKS, file=self._stacks, all_threads=True)
        aside = rank_file(self._folder, rank).with_suffix(".new")
        aside.write_bytes(bytes(_SIZE))
        with aside.open("r+b") as file:
            self.heartbeat = Heartbeat(mmap.mmap(file.fileno(), _SIZE))
        aside.replace(rank_file(self._folder, rank))  # whoever finds it finds it filled in
        threading.Thread(target=self._keep_pulse, name="pulse", daemon=True).start()
        if local_rank == 0:
            _remove_older(self._folder)
            ranks = int(environment.get("LOCAL_WORLD_SIZE", 1))
            command = [sys.executable, "-m", "ernie_dist.watchdog", str(files.root), str(attempt), str(self._folder)]
            self._watchdog = subprocess.Popen(  # nobody waits for it
                [*command, str(rank), str(ranks), environment.get("WORLD_SIZE", "1"), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def close(self) -> None:
        """In good order: the watchdog no longer looks for this rank."""
        rank_file(self._folder, self._rank).unlink(missing_ok=True)
        stacks_file(self._folder, self._rank).unlink(missing_ok=True)
        flight_pipe(self._folder, self._rank).unlink(missing_ok=True)
        with suppress(OSError):  # the last one of the node succeeds
            self._folder.rmdir()

    def _keep_pulse(self) -> None:
        while True:
            self.heartbeat.pulse()
            time.sleep(PULSE_SECONDS)


def node_folder(run_dir: Path, attempt: int, environment: Mapping[str, str] = os.environ) -> Path:
    """The same for all ranks of one node: in memory where the system has such a place, never in the run directory."""
    home = Path("/dev/shm")
    if not os.access(home, os.W_OK):
        home = Path(tempfile.gettempdir())
    node = f"{run_dir.resolve()} {environment.get('GROUP_RANK', '0')}"
    digest = hashlib.blake2b(node.encode(), digest_size=8).hexdigest()
    return home / f"ernie-{os.getuid()}-{digest}-{attempt:04d}"


def _ask_nccl_for_traces(folder: Path, attempt: Path) -> None:
    """NCCL's flight recorder writes into the attempt's folder; the pipe that asks for it is this node's own."""
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(attempt / "nccl_trace_rank_"))
    os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] = str(flight_pipe(folder, 0)).removesuffix("0.pipe")


def _remove_older(folder: Path) -> None:
    """What killed attempts of this run left on this node."""
    for other in folder.parent.glob(folder.name[:-4] + "*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)

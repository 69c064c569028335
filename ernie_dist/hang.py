"""Which rank is to blame when nothing moves: the others only wait for it in a collective.

/proc, heartbeats and stacks of this node's ranks -> [Evidence, ...] -> [Blame, ...]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.heartbeat import PULSE_SECONDS, Phase

_HELD = 10 * PULSE_SECONDS
"""seconds without a pulse after which native code must hold the interpreter lock; half the limit where that is less"""
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_WAITS = ("torch/distributed/", "deepspeed/comm/", "ernie_dist/world.py", "ernie_dist/engine/deepspeed.py")
"""Where a rank waits for others: in a collective, or on a GPU for the queue that holds one."""


@dataclass(frozen=True)
class Process:
    """What the kernel says of a process."""

    state: str
    """R, S, D, T, t, Z as in ps; "" if it is gone"""
    waits_in: str = ""
    """kernel function it sleeps in, where the system tells"""

    @property
    def answers(self) -> bool:
        """Whether a signal handler of it would run."""
        return self.state in ("R", "S", "I")


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    @property
    def waits(self) -> bool:
        return any(part in self.file for part in _WAITS)


@dataclass(frozen=True)
class Evidence:
    """What is known of one rank at the moment a limit was passed."""

    rank: int
    phase: Phase
    step: int
    seconds: float
    """in this phase"""
    limit: float
    silent: float
    """seconds since a Python thread of it last ran"""
    process: Process
    frames: tuple[Frame, ...]
    """of its main thread, innermost first; none if it could not answer"""

    @property
    def where(self) -> str:
        """As in: it is ..."""
        texts = {
            Phase.START: "starting up",
            Phase.PREFLIGHT: "in the preflight, where ranks get to know each other",
            Phase.READ: f"reading the batch of step {self.step}",
            Phase.FIRST_STEP: f"in step {self.step}, the attempt's first",
            Phase.STEP: f"in step {self.step}",
            Phase.EVALUATE: f"evaluating after step {self.step}",
            Phase.SAVE: f"saving after step {self.step}",
            Phase.EXPORT: "exporting",
            Phase.CLOSE: "ending",
        }
        return texts[self.phase]

    @property
    def waits(self) -> bool:
        """Whether its main thread is in a collective."""
        return any(frame.waits for frame in self.frames[:3])


@dataclass(frozen=True)
class Blame:
    rank: int
    why: str


def blame(ranks: Sequence[Evidence]) -> list[Blame]:
    """The ranks that hold up the others, by the strongest evidence there is; [] if each waits for another node.

    Strongest first: the process does not run; Python in it does not run; it is behind the others; it is somewhere
    else than in a collective.
    """
    if dead := [Blame(one.rank, _not_running(one)) for one in ranks if not one.process.answers]:
        return dead
    if held := [one for one in ranks if one.silent > min(_HELD, one.limit / 2)]:
        text = "none of its Python threads has run for {:.0f} s: native code keeps the interpreter lock"
        return [Blame(one.rank, text.format(one.silent)) for one in held]
    front = max((one.step, one.phase) for one in ranks)
    if behind := [one for one in ranks if (one.step, one.phase) < front]:
        last = min((one.step, one.phase) for one in behind)
        ahead = next(one for one in ranks if (one.step, one.phase) == front)
        text = f"the others are ahead of it, {ahead.where}"
        return [Blame(one.rank, text + _at(one)) for one in behind if (one.step, one.phase) == last]
    if elsewhere := [one for one in ranks if not one.waits]:
        others = ", the others wait for it in a collective" if len(elsewhere) < len(ranks) else ""
        return [Blame(one.rank, "it is not in a collective" + others + _at(one)) for one in elsewhere]
    return []


def process_of(pid: int, proc: Path = Path("/proc")) -> Process:
    """Reads /proc/PID."""
    try:
        state = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Process("")
    waits_in = ""
    with suppress(OSError):
        waits_in = (proc / str(pid) / "wchan").read_text().strip()
    return Process(state, "" if waits_in == "0" else waits_in)


def kernel_stack(pid: int, proc: Path = Path("/proc")) -> str:
    """Where in the kernel a process is; "" where only root may know, and we are not."""
    try:
        return (proc / str(pid) / "stack").read_text()
    except OSError:
        return ""


def main_thread(stacks: str) -> tuple[Frame, ...]:
    """The frames of faulthandler's last thread, which is the first one of the process; innermost first."""
    blocks = [block for block in stacks.split("\n\n") if "(most recent call first)" in block]
    found = [_FRAME.match(line) for line in blocks[-1].splitlines()] if blocks else []
    return tuple(Frame(match["file"], int(match["line"]), match["function"]) for match in found if match)


def _not_running(one: Evidence) -> str:
    state, waits_in = one.process.state, one.process.waits_in
    where = f" in {waits_in}" if waits_in else ""
    if state == "D":
        return f"its process waits in the kernel for a disk or network file system (state D{where})"
    if state in ("T", "t"):
        return f"its process is stopped (state {state}): by kill -STOP, a debugger or a frozen container"
    return "its process has ended" if state in ("", "Z", "X") else f"its process does not run (state {state}{where})"


def _at(one: Evidence) -> str:
    own = next((frame for frame in one.frames if "site-packages" not in frame.file), None)
    shown = own or (one.frames[0] if one.frames else None)
    return f"; it is at {shown}" if shown else ""

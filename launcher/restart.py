"""Whether a run is started again after an attempt has ended: a pure function of how its attempts ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile

from ernie_dist.spec.resilience import RestartSpec
from launcher.base import FINISHED, STOPPED, WRONG

_ELSEWHERE = (
    *("BadNumbersError", "CheckpointReadError", "CheckpointWriteError", "Hang"),
    *("NodeLost", "NodesMissing", "RanksDiffer", "UnfitNode"),
)
"""errors whose cause is not in the data of the step they came at; they count towards restarts.max"""
LONGEST_WAIT = timedelta(minutes=10)


@dataclass(frozen=True)
class AttemptEnd:
    """How one attempt ended."""

    attempt: int
    exit_code: int
    """of the contract"""
    message: str = ""
    """what went wrong, in one sentence"""
    final: bool = False
    """it said itself that another try would end in the same way"""
    after_step: int | None = None
    """the last step that was done when it ended; None if it ended before it could begin a step"""
    checkpoint_before: int = 0
    """step of the newest complete checkpoint when it was started; 0 without one"""
    checkpoint: int = 0
    """the same, when it had ended"""
    kind: str = ""
    """the error's, where a rank could name one"""
    again: bool = False
    """it stopped because its nodes are taken away, and others may be had"""
    given_up: bool = False
    """the run was given up after it: whoever launches it again begins a new count"""

    @property
    def tells_of_its_step(self) -> bool:
        """Whether the step it died at may be the cause: not for a disk, a device, or batches that are skipped next."""
        return self.after_step is not None and self.kind not in _ELSEWHERE

    @property
    def moved_forward(self) -> bool:
        return self.checkpoint > self.checkpoint_before


@dataclass(frozen=True)
class Over:
    """The attempt ended as it was meant to, or in a way that its caller has to see to."""

    exit_code: int


@dataclass(frozen=True)
class Restart:
    wait: float
    """seconds"""
    number: int
    """of restarts in a row without a new checkpoint, this one included"""


@dataclass(frozen=True)
class GiveUp:
    reason: str
    suspect: int | None = None
    """the step whose batch may be the cause"""


def decide(spec: RestartSpec, ends: Sequence[AttemptEnd]) -> Over | Restart | GiveUp:
    """What to do after the last of `ends`, the attempts of a run in order."""
    last = ends[-1]
    if last.again:
        fruitless = without_progress(ends)
        return GiveUp(_no_progress(spec, fruitless)) if fruitless > spec.max else Restart(0.0, fruitless)
    if last.exit_code in (FINISHED, WRONG, STOPPED):
        return Over(last.exit_code)
    if last.final:
        return GiveUp("starting it again would end in the same way")
    row = _crashes_in_a_row(ends)
    same = _at_the_same_step(row)
    if same >= spec.same_step and last.after_step is not None:
        times = "once" if same == 1 else f"{same} times in a row"
        return GiveUp(
            f"it died {times} after step {last.after_step} (restarts.same_step {spec.same_step})", last.after_step + 1
        )
    # The first attempt is no restart, and one that reached a new checkpoint is forgiven.
    fruitless = sum(1 for _ in takewhile(lambda end: not end.moved_forward, reversed(row[1:])))
    if fruitless >= spec.max:
        return GiveUp(_no_progress(spec, fruitless))
    wait = min(spec.wait.total_seconds() * 2**fruitless, LONGEST_WAIT.total_seconds())
    return Restart(wait, fruitless + 1)


def without_progress(ends: Sequence[AttemptEnd]) -> int:
    """Attempts in a row, up to the last, that reached no new checkpoint, however they ended; at most back to the last
    time a run was given up."""
    if not ends or ends[-1].given_up:
        return 0
    return sum(1 for _ in takewhile(lambda end: not end.moved_forward and not end.given_up, reversed(ends)))


def _no_progress(spec: RestartSpec, fruitless: int) -> str:
    said = f"{fruitless} restarts in a row reached no new checkpoint" if fruitless else "it is not to be restarted"
    return f"{said} (restarts.max {spec.max})"


def _crashes_in_a_row(ends: Sequence[AttemptEnd]) -> list[AttemptEnd]:
    """Back to the last end that was none of a crash, or after which a person started the run again."""
    meant = (FINISHED, WRONG, STOPPED)
    *before, last = ends
    row = takewhile(lambda end: end.exit_code not in meant and not end.given_up, reversed(before))
    return [*reversed(list(row)), last]


def _at_the_same_step(row: Sequence[AttemptEnd]) -> int:
    """How often in a row; an attempt that never got to a step says nothing about one."""
    if not row[-1].tells_of_its_step:
        return 0
    steps = [end.after_step for end in row if end.tells_of_its_step]
    return sum(1 for _ in takewhile(lambda step: step == steps[-1], reversed(steps)))

"""What a run does when things go wrong: restarts, the watchdog, and numbers that cannot be right."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field

from ernie_dist.spec.quantity import Interval, Quantity, Unit
from ernie_dist.spec.resources import TimeLimit
from ernie_dist.spec.strict import Strict


class RestartSpec(Strict):
    """Crashed attempts are started again; one that reaches a new checkpoint begins the count anew."""

    max: int = Field(10, ge=0, description="restarts in a row without a new checkpoint; 0 never restarts")
    same_step: int = Field(3, ge=1, description="crashes at one and the same step before the run is given up")
    wait: TimeLimit = Field(timedelta(seconds=5), description="before the first restart; doubles up to 10m")


class WatchdogSpec(Strict):
    """An attempt that makes no progress for too long is ended, with the stacks of its ranks kept.

    A phase may take `factor` times the longest it took before in this run, and never less than its floor.
    """

    enabled: bool = True
    start: TimeLimit = Field(timedelta(minutes=30), description="floor for start-up and the first step")
    step: TimeLimit = Field(timedelta(minutes=5), description="floor for a step")
    save: TimeLimit = Field(timedelta(minutes=30), description="floor for a save, an evaluation, the export")
    factor: float = Field(10.0, gt=1, description="of the longest time seen")
    straggler: float = Field(1.5, gt=1, description="a rank this many times slower than the others' median is named")


class BadNumbersSpec(Strict):
    """What is done about a loss or gradient that is not finite, or far above the last ones."""

    sigma: float = Field(6.0, gt=0, description="standard deviations above the mean of the window that are too many")
    window: int = Field(128, ge=8, description="steps of the same stage that are looked back on")
    patience: int = Field(3, ge=1, description="updates refused in a row before going back to a checkpoint")
    rewinds: int = Field(3, ge=0, description="times a run may go back and skip batches; then it fails")
    compare_ranks: Interval = Field(
        Quantity(500, Unit.STEPS), description="how often parameters are compared between data-parallel ranks"
    )

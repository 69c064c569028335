"""Paired bootstrap (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").

The same rows, drawn with repetition, for both models: how far does a value move, and does the difference keep its sign?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie_dist.evaluate.metrics import Metric

SAMPLES = 1000
_AT_ONCE = 1 << 24
"""entries of the matrix of drawn rows that are held at a time"""


@dataclass(frozen=True)
class Estimate:
    """A value over all rows, and the middle 95 % of what samples of the rows give; None: no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Compared:
    """One metric of a model, and of the one it is held against."""

    name: str
    about: str
    higher_is_better: bool | None
    tuned: Estimate
    base: Estimate | None = None
    difference: Estimate | None = None
    """tuned minus base"""

    @property
    def distinguishable(self) -> bool | None:
        """Whether the interval of the difference leaves out 0; None where there is none."""
        if self.difference is None or self.difference.low is None or self.difference.high is None:
            return None
        return self.difference.low > 0 or self.difference.high < 0


def compare(tuned: Metric, base: Metric | None = None, *, seed: int = 0, samples: int = SAMPLES) -> Compared:
    """Values and 95 % intervals; the same seed draws the same rows."""
    facts = (tuned.name, tuned.about, tuned.higher_is_better)
    mine = tuned.overall
    theirs = base.overall if base is not None else None
    if not tuned.interval or len(tuned.statistics) < 2:
        if theirs is None:
            return Compared(*facts, Estimate(mine))
        return Compared(*facts, Estimate(mine), Estimate(theirs), Estimate(mine - theirs))
    drawn = _resampled(tuned, seed, samples)
    if base is None or theirs is None:
        return Compared(*facts, _estimate(mine, drawn))
    others = _resampled(base, seed, samples)
    apart = _estimate(mine - theirs, drawn - others)
    return Compared(*facts, _estimate(mine, drawn), _estimate(theirs, others), apart)


def _resampled(metric: Metric, seed: int, samples: int) -> np.ndarray:
    """float64 [samples]: the metric over each sample of the rows."""
    count = len(metric.statistics)
    generator = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    values: list[float] = []
    while len(values) < samples:
        size = min(samples - len(values), max(1, _AT_ONCE // count))
        times = generator.multinomial(count, even, size=size)
        values += [metric.value(total) for total in times @ metric.statistics]
    return np.array(values)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))

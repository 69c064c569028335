"""Which rank slows the others down. Wall time does not tell: a synchronous step takes all ranks equally long.

What differs is the time a rank is busy by itself: reading its batch, and its forward passes, which hold no collective
up to ZeRO-2. Under ZeRO-3 they gather parameters, so that there only slow reading is seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ernie_dist.world import World

WINDOW = 16
"""steps a mean is taken over; what ranks say to one another costs one small message in that many steps"""


@dataclass(frozen=True)
class Slowest:
    """The rank that was longest busy."""

    rank: int
    imbalance: float
    """its busy time over the median of the others'"""
    busy_seconds: float
    """of a step, mean over the window"""


def slowest(busy: Sequence[float]) -> Slowest:
    """`busy`: seconds of each rank, two or more of them. The median is that of the other ranks: of two, the other's."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    others = statistics.median([*busy[:rank], *busy[rank + 1 :]])
    return Slowest(rank, busy[rank] / max(others, 1e-9), busy[rank])


class BusyTimes:
    """Adds up this rank's busy time, and compares it with the others' every WINDOW steps."""

    def __init__(self, world: World, threshold: float) -> None:
        self._world, self._threshold = world, threshold
        self._busy: list[float] | None = None
        self._named: int | None = None

    def add(self, seconds: float) -> Slowest | None:
        """What the last WINDOW steps show, at their end; else None. Collective. The first step is not counted: it
        warms up, on one rank more than on another."""
        if self._world.size == 1:
            return None
        if self._busy is None:
            self._busy = []
            return None
        self._busy.append(seconds)
        if len(self._busy) < WINDOW:
            return None
        means = torch.zeros(self._world.size, dtype=torch.float64)
        means[self._world.rank] = statistics.fmean(self._busy)
        self._busy = []
        return slowest(self._world.sum(means).tolist())

    def begins(self, found: Slowest) -> bool:
        """Whether this rank was not known to be too slow before."""
        before, self._named = self._named, found.rank if found.imbalance >= self._threshold else None
        return self._named is not None and self._named != before

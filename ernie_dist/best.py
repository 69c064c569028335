"""Which evaluation had the lowest held-out loss so far, and how long that is ago. Part of every checkpoint.

A run that is killed and goes on decides as one that was not: what it knows comes from the checkpoint and the losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ernie_dist.spec.training import ALL_SOURCES, EarlyStopSpec


@dataclass(frozen=True)
class Best:
    """The best evaluation by the held-out loss of `source`, or by the mean over all sources."""

    source: str
    step: int | None = None
    """None before the first evaluation"""
    loss: float | None = None
    """mean over labelled positions, in nats"""
    seen: int = 0
    """step of the last evaluation looked at"""
    reference: float | None = None
    """the loss that has to be undercut by min_delta"""
    waited: int = 0
    """evaluations since that happened"""

    def after(self, step: int, losses: Mapping[str, float], early_stop: EarlyStopSpec | None) -> Best:
        """With the evaluation after `step` taken into account: losses of all sources. One seen before adds nothing."""
        counted = [loss for source, loss in losses.items() if self.source in (source, ALL_SOURCES)]
        if step <= self.seen:
            return self
        if not counted:  # pairs of answers are not measured before their stage
            return replace(self, seen=step)
        loss = math.fsum(counted) / len(counted)
        if not math.isfinite(loss):
            return replace(self, seen=step, waited=self.waited + 1)
        best = self if self.loss is not None and loss >= self.loss else replace(self, step=step, loss=loss)
        needed = early_stop.min_delta if early_stop else 0.0
        if self.reference is None or loss < self.reference - needed:
            return replace(best, seen=step, reference=loss, waited=0)
        return replace(best, seen=step, waited=self.waited + 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, source: str, value: Mapping[str, Any] | None) -> Best:
        """What a checkpoint holds; where that is by another source, or nothing, the search begins anew."""
        return cls(**value) if value is not None and value["source"] == source else cls(source)

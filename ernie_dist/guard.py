"""Numbers that cannot be right: judged against the last accepted steps of the same stage. Pure.

loss, gradient norm of a step --Recent.problem--> None, or why the update is refused
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_dist.spec.resilience import BadNumbersSpec

_LEAST_LOSS_SPREAD = 0.01
"""a standard deviation of the loss counts as at least this share of its mean, and as at least so many nats"""
_LEAST_NORM_SPREAD = 0.5
"""likewise a share of the mean: gradient norms have heavy tails, and clipping bounds what a large one does"""


@dataclass(frozen=True)
class Recent:
    """What the last accepted steps of one stage gave, oldest first. Saved with a checkpoint, to the last bit."""

    stage: str = ""
    losses: tuple[float, ...] = ()
    """nats"""
    grad_norms: tuple[float, ...] = ()
    """2-norms before clipping"""

    def problem(
        self, spec: BadNumbersSpec, stage: str, loss: float, grad_norm: float, *, spikes: bool = True
    ) -> str | None:
        """Why these numbers of a step of `stage` are not to be learnt from; None if nothing is wrong with them.

        What is not finite is refused always; what is far above the last steps, once there are half a window of them,
        and only if `spikes` are looked for.
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if not spikes or stage != self.stage or len(self.losses) < spec.window // 2:
            return None
        return _too_high("loss", loss, self.losses, spec.sigma, _LEAST_LOSS_SPREAD, _LEAST_LOSS_SPREAD) or _too_high(
            "gradient norm", grad_norm, self.grad_norms, spec.sigma, _LEAST_NORM_SPREAD, 0.0
        )

    def after(self, spec: BadNumbersSpec, stage: str, loss: float, grad_norm: float) -> Recent:
        """With an accepted step more. A new stage begins anew: its losses say nothing about another's."""
        losses, norms = (self.losses, self.grad_norms) if stage == self.stage else ((), ())
        return Recent(stage, (*losses, loss)[-spec.window :], (*norms, grad_norm)[-spec.window :])

    def to_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "losses": list(self.losses), "grad_norms": list(self.grad_norms)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Recent:
        return cls(str(value["stage"]), tuple(value["losses"]), tuple(value["grad_norms"]))


class Guard:
    """Judges every step of an attempt. All ranks hold the same numbers and so come to the same verdict."""

    def __init__(
        self, spec: BadNumbersSpec, recent: Recent, *, loss_scaling: bool, uneven: Collection[str] = ()
    ) -> None:
        """`uneven`: stages in which an ordinary batch may be far above all others, so that spikes say nothing."""
        self._spec, self.recent, self._loss_scaling, self._uneven = spec, recent, loss_scaling, uneven

    def accepts(self, stage: str, loss: float, grad_norm: float) -> bool:
        """Asked before the weights change."""
        return self._problem(stage, loss, grad_norm) is None

    def look(self, stage: str, loss: float, grad_norm: float, *, applied: bool) -> str | None:
        """Called once after each step: why its update was refused, or None.

        An engine leaves out what is not finite without asking; that is judged here. A finite loss with an overflow is
        what loss scaling does to find its scale, and no more than that.
        """
        if applied:
            self.recent = self.recent.after(self._spec, stage, loss, grad_norm)
            return None
        if self._loss_scaling and math.isfinite(loss) and not math.isfinite(grad_norm):
            return None
        return self._problem(stage, loss, grad_norm)

    def _problem(self, stage: str, loss: float, grad_norm: float) -> str | None:
        return self.recent.problem(self._spec, stage, loss, grad_norm, spikes=stage not in self._uneven)


def _too_high(
    name: str, value: float, last: Sequence[float], sigma: float, least_share: float, least: float
) -> str | None:
    mean = math.fsum(last) / len(last)
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in last) / len(last))
    # A series that hardly moves has next to no spread: without a floor the last digit would count as a spike.
    spread = max(spread, least_share * abs(mean), least)
    if value <= mean + sigma * spread:
        return None
    return (
        f"the {name} is {value:.6g}, more than {sigma:g} standard deviations of {spread:.3g} above {mean:.6g}, "
        f"the mean of the last {len(last)} steps"
    )

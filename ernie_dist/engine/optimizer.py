"""AdamW's parameter groups: who decays, and who is frozen in which stage."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.training import OptimizerSpec


class ParameterGroups:
    """Groups that stay the same for the whole run, so that a checkpoint of any stage fits any other.

    A frozen parameter keeps its place in the optimizer: its gradient is zeroed and its learning rate is 0, which
    leaves the weight, whatever its momentum, bit for bit as it was.
    """

    def __init__(self, model: nn.Module, freezes: Sequence[Sequence[str]]) -> None:
        """`freezes`: every list of name patterns that some stage freezes. Raises SpecError for one without a match."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        _refuse_unmatched([name for name, _ in named], freezes)
        self._frozen: frozenset[tuple[bool, tuple[bool, ...]]] = frozenset()
        self._freezes = [tuple(patterns) for patterns in freezes]
        self._members: dict[tuple[bool, tuple[bool, ...]], list[nn.Parameter]] = {}
        for name, parameter in named:
            # Under ZeRO-3 a partitioned parameter has lost its shape; ds_shape remembers it.
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            key = (decays, tuple(_matches(name, patterns) for patterns in self._freezes))
            self._members.setdefault(key, []).append(parameter)
            if any(key[1]):
                parameter.register_hook(lambda gradient, key=key: self._gradient(gradient, key))
        self.keys = sorted(self._members)

    def __call__(self, spec: OptimizerSpec) -> list[dict[str, Any]]:
        """What a torch optimizer takes."""
        return [
            {"params": self._members[key], "weight_decay": spec.weight_decay if key[0] else 0.0} for key in self.keys
        ]

    def freeze(self, patterns: Sequence[str]) -> None:
        """Freezes exactly the parameters that match `patterns`, one of the lists given at the start, or none."""
        which = self._freezes.index(tuple(patterns)) if patterns else None
        self._frozen = frozenset(key for key in self.keys if which is not None and key[1][which])

    def set_learning_rate(self, groups: Sequence[dict[str, Any]], rate: float) -> None:
        for key, group in zip(self.keys, groups, strict=True):
            group["lr"] = 0.0 if key in self._frozen else rate

    def _gradient(self, gradient: torch.Tensor, key: tuple[bool, tuple[bool, ...]]) -> torch.Tensor:
        return torch.zeros_like(gradient) if key in self._frozen else gradient


def adamw(groups: list[dict[str, Any]], spec: OptimizerSpec) -> torch.optim.AdamW:
    """torch's fused AdamW: DeepSpeed's own compile C++ at first use."""
    return torch.optim.AdamW(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unmatched(names: list[str], freezes: Sequence[Sequence[str]]) -> None:
    for pattern in {pattern for patterns in freezes for pattern in patterns}:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join([*names[:4], "...", *names[-2:]])
            raise SpecError(f'freeze pattern "{pattern}" matches no parameter; names are like {shown}')

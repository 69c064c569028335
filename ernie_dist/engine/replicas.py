"""Finds parameters that differ between ranks where they must not: a broken chip, memory or network says nothing itself.

parameters --bit patterns, weighted by place--> a sum per block --hash--> digest of this rank --gather--> who differs
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from ernie_dist.engine.base import Engine
from ernie_dist.spec.errors import RanksDiffer
from ernie_dist.world import World

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""by bytes of an element"""
_BLOCK = 1 << 18
"""elements that are widened to 64 bits at once"""


@torch.no_grad()
def digest(parameters: Iterable[torch.Tensor]) -> str:
    """16 hexadecimal digits over every bit of tensors of one device, computed there.

    Sums are integers modulo 2**64, so exact in any order. Every weight is odd: one flipped bit always changes the sum;
    each place has its own: so do two elements that changed places.
    """
    sums, weights = [], None
    for parameter in parameters:
        if weights is None:
            weights = torch.arange(1, 2 * _BLOCK, 2, device=parameter.device)
        bits = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
        sums += [(block.to(torch.int64) * weights[: len(block)]).sum() for block in bits.split(_BLOCK)]
    total = torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)
    return hashlib.blake2b(total.numpy().tobytes(), digest_size=8).hexdigest()


def refuse_difference(engine: Engine, world: World, step: int) -> None:
    """Collective. Raises RanksDiffer on all ranks if what they hold in common is not the same."""
    if world.size == 1:
        return
    digests = world.gather(engine.replicated_digest())
    if problem := difference(digests):
        raise RanksDiffer(
            f"after step {step} {problem}. Parameters that must be equal are not, and no checkpoint is written from "
            "them: suspect the GPU, memory or network there. The next attempt goes on from the last checkpoint"
        )


def difference(digests: Sequence[str | None]) -> str | None:
    """Which ranks are outside the largest group of equal digests, in words; None if all agree."""
    ranks: dict[str | None, list[int]] = defaultdict(list)
    for rank, one in enumerate(digests):
        ranks[one].append(rank)
    groups = sorted(ranks.values(), key=len, reverse=True)
    if len(groups) == 1:
        return None
    if len(groups[0]) == len(groups[1]):
        return f"{_names(range(len(digests)))} hold different parameters, and no majority says which are right"
    return (
        f"{_names(sorted(rank for group in groups[1:] for rank in group))} differ(s) from the {len(groups[0])} others"
    )


def _names(ranks: Iterable[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)

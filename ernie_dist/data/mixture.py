"""Index of a sequence in a stage -> (source, index in that source): pure and random access.

block of 4096   [w w l w m w w l ...]   the same number of each source in every block,
within source    0 1 0 2 0 3 4 1 ...    spread evenly over it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ernie_dist.data.shuffle import mix, uniform

BLOCK = 4096  # sequences; also the grain of the weights: shares are met to within 1 / BLOCK


@dataclass(frozen=True)
class Mixture:
    """How the sequences of one stage are drawn from its sources. Raises ValueError for shares that cannot be."""

    weights: tuple[float, ...]
    """Share of each source in the tokens of the stage; they sum to 1."""
    tokens_per_sequence: tuple[float, ...]
    """Mean tokens, padding not counted, in one sequence of each source."""
    seed: int

    def __post_init__(self) -> None:
        weights, tokens = self.weights, self.tokens_per_sequence
        if len(weights) != len(tokens):
            raise ValueError(f"{len(weights)} weights for {len(tokens)} tokens_per_sequence: give one each per source")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"weights are {weights}, expected 0 or more each")
        if not math.isclose(math.fsum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"weights {weights} sum to {math.fsum(weights)}, expected 1")
        if not all(math.isfinite(mean) and mean > 0 for weight, mean in zip(weights, tokens, strict=True) if weight):
            raise ValueError(f"tokens_per_sequence is {tokens}, expected more than 0 for each source with a weight")
        if sum(weight > 0 for weight in weights) > BLOCK:
            raise ValueError(f"{len(weights)} sources have a weight, expected at most {BLOCK}")

    def pick(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and index within the source of each sequence of the stage.

        `indices` are integers >= 0 of any shape; both results are int64 of that shape. Each source is read as
        0, 1, 2, ... without a gap: shuffling and repeating it is for the caller. IndexError for a negative index.
        """
        indices = np.asarray(indices)
        if indices.size and indices.min() < 0:
            raise IndexError(f"index {indices.min()}, expected 0 or more")
        blocks, places = np.divmod(indices.astype(np.int64), BLOCK)
        sources = np.empty_like(blocks)
        ranks = np.empty_like(blocks)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source_of, rank_of = _order(self._per_block, self.seed, block)
            sources[here] = source_of[places[here]]
            ranks[here] = rank_of[places[here]]
        return sources, blocks * np.array(self._per_block, dtype=np.int64)[sources] + ranks

    def count(self, sequences: int) -> tuple[int, ...]:
        """How many of the first `sequences` sequences of the stage come from each source."""
        if sequences < 0:
            raise ValueError(f"sequences is {sequences}, expected 0 or more")
        block, rest = divmod(sequences, BLOCK)
        begun = np.bincount(_order(self._per_block, self.seed, block)[0][:rest], minlength=len(self.weights))
        return tuple(block * each + more for each, more in zip(self._per_block, begun.tolist(), strict=True))

    @cached_property
    def _per_block(self) -> tuple[int, ...]:
        """Sequences of each source in a block: largest remainder, at least one of each source with a weight."""
        ratios = [w / t if w else 0.0 for w, t in zip(self.weights, self.tokens_per_sequence, strict=True)]
        total = math.fsum(ratios)  # not sum(), which rounds otherwise from Python 3.12 on
        quotas = [BLOCK * ratio / total for ratio in ratios]
        counts = [max(1, math.floor(quota)) if quota else 0 for quota in quotas]
        for _ in range(BLOCK - sum(counts)):
            counts[max(range(len(counts)), key=lambda i: quotas[i] - counts[i])] += 1  # ties go to the first source
        for _ in range(sum(counts) - BLOCK):  # the ones given to sources below one are taken where it matters least
            counts[counts.index(max(counts))] -= 1
        return tuple(counts)


@lru_cache(maxsize=16)
def _order(per_block: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and ranks among the same source, int64 [BLOCK] each, of one block.

    Sequence j of the n that a source has here falls at random into the j-th n-th of the block, so that every prefix
    holds each source in about its share.
    """
    keys = [(np.arange(n) + uniform(n, mix(seed, block, i))) / max(n, 1) for i, n in enumerate(per_block)]
    order = np.argsort(np.concatenate(keys), kind="stable")
    sources = np.repeat(np.arange(len(per_block)), per_block)[order]
    ranks = np.concatenate([np.arange(n) for n in per_block])[order]  # the keys of a source ascend, so they are ranks
    sources.flags.writeable = ranks.flags.writeable = False  # shared by all callers of the cache
    return sources, ranks

"""Progress -> stage and sequence ids: the order of the data, which knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie_dist.data.mixture import BLOCK, Mixture
from ernie_dist.data.shuffle import mix, permute
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage

_AT_ONCE = 16 * BLOCK
"""sequences located in one go, where it is a whole stage: as many blocks as the mixture keeps"""


@dataclass(frozen=True)
class StageOrder:
    """The endless order of one stage's sequences. Pure, random access."""

    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    """training sequences in each source, at the stage's length"""
    mixture: Mixture
    seed: int

    def locate(self, indices: np.ndarray) -> np.ndarray:
        """indices int64 [n] within the stage -> int64 [n, 2]: source number, and a running number in that source.

        The running number goes on through every pass: `packed` says which sequence it stands for.
        """
        source, number = self.mixture.pick(indices)
        return np.stack([source, number], axis=1)

    def packed(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Running numbers int64 [n] of one source -> packed sequences int64 [n]; each pass is shuffled afresh."""
        size = self.sizes[source]
        passes, within = np.divmod(numbers, size)
        result = np.empty_like(numbers)
        for one in np.unique(passes):
            here = passes == one
            result[here] = permute(within[here], size, mix(self.seed, source, int(one)))
        return result

    def drawn(self, count: int) -> list[np.ndarray]:
        """Of each source, bool [packed sequences]: which of them are among the first `count` of the stage."""
        found = [np.zeros(size, bool) for size in self.sizes]
        for first in range(0, count, _AT_ONCE):
            ids = self.locate(np.arange(first, min(count, first + _AT_ONCE), dtype=np.int64))
            for source, marks in enumerate(found):
                marks[self.packed(source, ids[ids[:, 0] == source, 1])] = True
        return found


class Curriculum:
    """The stages of a resolved job, each with its order."""

    def __init__(self, job: ResolvedJob) -> None:
        self.job = job
        self._orders = [_order(job, number) for number in range(len(job.stages))]

    def locate(self, batch_index: int) -> tuple[ResolvedStage, StageOrder, np.ndarray]:
        """The stage of a batch, its order, and the ids int64 [global_batch_size, 2] of the batch's sequences."""
        number = self.job.stage_index(batch_index)
        stage, order = self.job.stages[number], self._orders[number]
        size = stage.sequences_per_batch
        first = (batch_index - stage.first_batch) * size
        return stage, order, order.locate(np.arange(first, first + size, dtype=np.int64))


def deal(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's rows of a batch: an equal run of neighbours. Ranks put together again give the batch."""
    return np.split(ids, world_size)[rank]


def _order(job: ResolvedJob, number: int) -> StageOrder:
    stage = job.stages[number]
    names: Sequence[str] = sorted(stage.mixture)
    packed = [job.sources[name].packed[stage.sequence_length] for name in names]
    seed = mix(job.spec.seed, number)
    return StageOrder(
        sources=tuple(names),
        sizes=tuple(one.sequences for one in packed),
        mixture=Mixture(
            weights=tuple(stage.mixture[name] for name in names),
            tokens_per_sequence=tuple(one.tokens_per_sequence for one in packed),
            seed=seed,
        ),
        seed=seed,
    )

"""Held-out loss of every source: one row of the stage x source matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernie_dist.batch import MicroBatch, empty_micro_batch, stack
from ernie_dist.data.loader import SequenceReader
from ernie_dist.data.shard import PreparedSource
from ernie_dist.engine.base import Engine
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.world import World


@dataclass(frozen=True)
class HeldOutLoss:
    source: str
    loss: float
    """mean over labelled positions, in nats"""
    tokens: int


class HeldOut:
    """The validation sequences of a job, always the same ones in the same order."""

    def __init__(self, job: ResolvedJob, world: World) -> None:
        self._world, self._length = world, job.spec.evaluation_length
        fits = max(stage.micro_batch_size * stage.sequence_length for stage in job.stages)
        self._size = max(1, min(job.spec.engine.micro_batch_size, fits // self._length))
        self._limit = max(1, job.spec.evaluate.max_tokens // self._length)
        self._cancelled = False
        self._readers: dict[str, SequenceReader] = {}
        for name, resolved in job.sources.items():
            if resolved.held_out:
                source = PreparedSource.open(Path(resolved.folder))
                self._readers[name] = SequenceReader(source, source.packs("validation", self._length), "answers")

    @property
    def sources(self) -> set[str]:
        """Those with something to measure."""
        return set(self._readers)

    @property
    def cut_short(self) -> bool:
        """Whether the last evaluation was cancelled before its end. The same on all ranks."""
        return self._cancelled

    def losses(self, engine: Engine, cancelled: Callable[[], bool]) -> Iterator[HeldOutLoss]:
        """Evaluates source by source, until `cancelled` says so, which has to be the same on all ranks. Collective."""
        for name, reader in self._readers.items():
            self._cancelled = False
            total, tokens = engine.evaluate(self._mine(reader, cancelled))
            if self._cancelled:
                return
            if tokens:
                yield HeldOutLoss(name, total / tokens, tokens)

    def _mine(self, reader: SequenceReader, cancelled: Callable[[], bool]) -> Iterator[MicroBatch]:
        """Every n-th sequence, in equally many micro-batches on all ranks: under ZeRO-3 each one is a collective."""
        count = min(self._limit, len(reader))
        mine = range(self._world.rank, count, self._world.size)
        rounds = math.ceil(math.ceil(count / self._world.size) / self._size)
        for number in range(rounds):
            self._cancelled = cancelled()
            if self._cancelled:
                return
            numbers = mine[number * self._size : (number + 1) * self._size]
            yield stack(reader.rows(np.array(numbers))) if numbers else empty_micro_batch(self._length)

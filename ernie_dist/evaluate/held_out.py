"""Held-out loss of every source: one row of the stage x source matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernie_dist.batch import MicroBatch
from ernie_dist.data.loader import SequenceReader, dealt
from ernie_dist.data.shard import PreparedSource
from ernie_dist.engine.base import Engine
from ernie_dist.references import References
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.world import World


@dataclass(frozen=True)
class HeldOutLoss:
    source: str
    loss: float
    """mean over labelled positions, or over pairs of answers, in nats"""
    tokens: int
    """positions or pairs"""


class HeldOut:
    """The validation sequences of a job, always the same ones in the same order."""

    def __init__(self, job: ResolvedJob, world: World) -> None:
        self._world, self._length = world, job.spec.evaluation_length
        fits = max(stage.micro_batch_size * stage.sequence_length for stage in job.stages)
        self._size = max(1, min(job.spec.engine.micro_batch_size, fits // self._length))
        self._limit, self._cancelled = job.spec.held_out_sequences, False
        self.references: References | None = None
        """of the latest preference stage; without them pairs of answers cannot be measured"""
        self._readers: dict[str, SequenceReader] = {}
        for name, resolved in job.sources.items():
            if resolved.held_out:
                source = PreparedSource.open(Path(resolved.folder))
                self._readers[name] = SequenceReader(source, source.packs("validation", self._length), "answers")

    @property
    def sources(self) -> list[str]:
        """Those with something to measure, as things are."""
        return [name for name, reader in self._readers.items() if self._measurable(name, reader)]

    @property
    def cut_short(self) -> bool:
        """Whether the last evaluation was cancelled before its end. The same on all ranks."""
        return self._cancelled

    def losses(self, engine: Engine, cancelled: Callable[[], bool]) -> Iterator[HeldOutLoss]:
        """Evaluates source by source, until `cancelled` says so, which has to be the same on all ranks. Collective."""
        for name in self.sources:
            self._cancelled = False
            total, tokens = engine.evaluate(self._mine(name, cancelled))
            if self._cancelled:
                return
            if tokens:
                yield HeldOutLoss(name, total / tokens, tokens)

    def _measurable(self, name: str, reader: SequenceReader) -> bool:
        if reader.source.kind != "preference":
            return True
        if self.references is None or name not in self.references.stage.mixture:
            return False
        return self.references.hold(name, self._length, self._count(reader))

    def _count(self, reader: SequenceReader) -> int:
        return min(self._limit, len(reader))

    def _mine(self, name: str, cancelled: Callable[[], bool]) -> Iterator[MicroBatch]:
        """This rank's share, until cancelled."""
        reader = self._readers[name]
        count = self._count(reader)
        batches = dealt(reader, np.arange(count), self._world, self._size)
        if reader.source.kind == "preference":
            assert self.references is not None
            batches = self.references.of_held_out(name, self._length, count, batches)
        for micro in batches:
            self._cancelled = cancelled()
            if self._cancelled:
                return
            yield micro

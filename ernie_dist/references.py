"""What the model said of every pair of answers when a preference stage began: the reference it is held to.

the stage's pairs --forward, no gradients--> log p(chosen) - log p(rejected) --> RUN_DIR/references/STAGE/*.npy

Measured once, so that no second model has to be kept in memory; a resumed attempt reads the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ernie_dist.batch import Batch, MicroBatch
from ernie_dist.data.curriculum import Curriculum
from ernie_dist.data.loader import SequenceReader, dealt
from ernie_dist.data.packing import ranges
from ernie_dist.data.shard import PreparedSource
from ernie_dist.engine.base import Engine, Measure
from ernie_dist.spec.errors import BadNumbersError, CheckpointError, CheckpointWriteError
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.trusted_files import complete, difference, entry, publish, read_manifest
from ernie_dist.world import World


@dataclass(frozen=True)
class _Wanted:
    """Sequences of one source and split."""

    source: str
    name: str
    """of the file that holds what was said"""
    reader: SequenceReader
    sequences: np.ndarray
    """int64 [sequences]"""


class References:
    """log p(chosen) - log p(rejected) of each pair of one stage, by source and split: float32 [pairs in the packs]."""

    def __init__(self, stage: ResolvedStage, ratios: dict[str, np.ndarray]) -> None:
        assert stage.dpo is not None
        self.stage, self._dpo, self._ratios = stage, stage.dpo, ratios
        self._training = [_key(name, "train") for name in sorted(stage.mixture)]

    @classmethod
    def measure(
        cls,
        job: ResolvedJob,
        stage: ResolvedStage,
        engine: Engine,
        world: World,
        log_probabilities: Measure,
        cancelled: Callable[[str, int, int], bool],
    ) -> References | None:
        """Asks the model as it is now about the pairs the stage will train on, and those held out.

        `log_probabilities` gives those of each document. Collective. `cancelled` is told a source, how many of its
        sequences are being asked about, and of how many; None where it said so, which has to be the same on all ranks.
        """
        ratios = {}
        for wanted in _wanted(job, stage):
            packs = wanted.reader.packs
            found = np.zeros(len(packs.lengths), np.float32)
            size = max(1, stage.micro_batch_size * stage.sequence_length // packs.sequence_length)
            batches = dealt(wanted.reader, wanted.sequences, world, size)
            for number, (micro, log_p) in enumerate(engine.measure(log_probabilities, batches), start=1):
                of = len(wanted.sequences)
                if cancelled(wanted.source, min(of, number * size * world.size), of):
                    return None
                if micro.pairs is not None:
                    log_p, chosen = log_p.float().cpu(), micro.pairs.chosen_P
                    found[micro.pairs.ids_P2[:, 1]] = (log_p[chosen] - log_p[chosen + 1]).numpy()
            world.sum(torch.from_numpy(found))  # each pair was measured by one rank
            first = packs.offsets[wanted.sequences]
            asked = ranges(first, packs.offsets[wanted.sequences + 1] - first)
            if broken := np.count_nonzero(~np.isfinite(found[asked])):
                raise BadNumbersError(
                    f"stage {stage.name}: the model's log-probabilities of {broken:,} of {len(asked):,} pairs "
                    f"({wanted.name}) are not finite, so it cannot be compared with itself; look at the stages before",
                    final=True,
                )
            ratios[wanted.name] = np.full_like(found, np.nan)
            ratios[wanted.name][asked] = found[asked]
        return cls(stage, ratios)

    @classmethod
    def read(cls, folder: Path, stage: ResolvedStage) -> References:
        """What `write` wrote. Raises CheckpointError if it is not there, or not as it was written."""
        try:
            files = read_manifest(folder)
            problem = difference(folder, files.items())
        except ValueError as error:
            problem = str(error)
        if problem:
            raise CheckpointError(
                f"{folder}: {problem}. Stage {stage.name} cannot go on without what the model said when it began: "
                "bring the folder back from a copy, or move the checkpoints of this stage away, and it begins again"
            )
        return cls(stage, {name: np.load(folder / name, allow_pickle=False) for name in files})

    def write(self, folder: Path) -> None:
        """All of it or nothing; on one process. Raises CheckpointWriteError."""
        aside = folder.with_name(f"{folder.name}.tmp")
        try:
            for old in (aside, folder):
                shutil.rmtree(old, ignore_errors=True)
            aside.mkdir(parents=True)
            for name, values in self._ratios.items():
                np.save(aside / name, values)
            complete(aside, {name: entry(aside / name, settle=True) for name in self._ratios})
            publish(aside, folder)
        except OSError as error:
            raise CheckpointWriteError(
                f"{folder}: what the model said of the pairs cannot be written ({error}); free space or mend the disk, "
                "and launch again"
            ) from None

    def of_batch(self, batch: Batch) -> Batch:
        """The batch with the reference of each of its pairs."""
        weight = self._dpo.sft_weight
        found = tuple(self._filled(micro, self._training, sft_weight=weight) for micro in batch.micro_batches)
        return replace(batch, micro_batches=found)

    def hold(self, source: str, length: int, sequences: int) -> bool:
        """Whether the pairs in the first so many held-out sequences of this length were measured."""
        return _key(source, "validation", length, sequences) in self._ratios

    def of_held_out(
        self, source: str, length: int, sequences: int, batches: Iterator[MicroBatch]
    ) -> Iterator[MicroBatch]:
        """Micro-batches of the first so many held-out sequences, with the reference of each of their pairs."""
        return (self._filled(micro, [_key(source, "validation", length, sequences)]) for micro in batches)

    def _filled(self, micro: MicroBatch, names: Sequence[str], **more: float) -> MicroBatch:
        """`names`: where the ratios of each source number are."""
        if micro.pairs is None:
            return micro
        source_P, number_P = micro.pairs.ids_P2.T
        ratio_P = np.empty(len(number_P), np.float32)
        for source in np.unique(source_P).tolist():
            here = source_P == source
            ratio_P[here] = self._ratios[names[source]][number_P[here]]
        assert not np.isnan(ratio_P).any(), "every pair of the stage was measured"
        known = replace(micro.pairs, reference_P=torch.from_numpy(ratio_P), beta=self._dpo.beta, **more)
        return replace(micro, pairs=known)


def _wanted(job: ResolvedJob, stage: ResolvedStage) -> Iterator[_Wanted]:
    _, order, _ = Curriculum(job).locate(stage.first_batch)
    drawn = order.drawn(stage.batches * stage.sequences_per_batch)
    for name, marks in zip(order.sources, drawn, strict=True):
        source = PreparedSource.open(Path(job.sources[name].folder))
        packs = source.packs("train", stage.sequence_length)
        yield _Wanted(name, _key(name, "train"), SequenceReader(source, packs, stage.loss), np.flatnonzero(marks))
        if job.sources[name].held_out:
            packs = source.packs("validation", job.spec.evaluation_length)
            count = min(job.spec.held_out_sequences, len(packs))
            key = _key(name, "validation", packs.sequence_length, count)
            yield _Wanted(name, key, SequenceReader(source, packs, "answers"), np.arange(count))


def _key(source: str, split: str, *cut: int) -> str:
    """`cut`: what decides which pairs have which numbers, where no fingerprint of the stage does."""
    return ".".join([source, split, *map(str, cut), "npy"])

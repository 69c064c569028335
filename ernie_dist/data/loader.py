"""This rank's part of each batch, read ahead by one thread where a GPU computes.

sequence ids --pack plan--> pieces --token files--> rows [T] --stack--> MicroBatch [B, T]
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ernie_dist.batch import IGNORED, Batch, Chance, MicroBatch, Row, empty_micro_batch, stack
from ernie_dist.data.curriculum import Curriculum, deal
from ernie_dist.data.packing import Packs, ranges
from ernie_dist.data.render import REJECTED
from ernie_dist.data.shard import PreparedSource
from ernie_dist.data.shuffle import mix
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.world import World

_LOWEST_MASK = {"all": 0, "answers": 1, "last_answer": 2}
"""the least mask value that counts, per loss kind"""
_AT_ONCE = 1 << 17
"""positions read in one go: fewer, and numpy's calls cost more than their work; more, and they leave the cache"""


class SequenceReader:
    """Sequences of one prepared source at one length."""

    def __init__(self, source: PreparedSource, packs: Packs, loss: str, number: int = 0) -> None:
        """`number` is the source's in its stage, by which pairs of answers are known."""
        self.source, self.packs, self._number = source, packs, number
        self._lowest = _LOWEST_MASK[loss]
        self._replacements = source.manifest.label_replacements

    def __len__(self) -> int:
        return len(self.packs)

    def rows(self, sequences: np.ndarray) -> list[Row]:
        """Packed sequences, int64 [n]. What is left at an end is padding: token 0, no label, and its own document."""
        count, length = len(sequences), self.packs.sequence_length
        starts, lengths, pieces = self.packs.pieces_of(sequences)
        ids, mask = self.source.gather(starts, lengths)
        pairs: Sequence[np.ndarray | None] = [None] * count
        if self.source.kind == "preference":
            assert mask is not None
            numbers = ranges(self.packs.offsets[sequences], pieces)
            ids_P2 = np.stack([np.full_like(numbers, self._number), numbers], axis=1)
            pairs = np.split(ids_P2, np.cumsum(pieces)[:-1])
            chosen = np.add.reduceat(mask < REJECTED, np.cumsum(lengths) - lengths, dtype=np.int64)
            lengths, pieces = np.stack([chosen, lengths - chosen], axis=1).reshape(-1), 2 * pieces
        ends = np.cumsum(lengths)
        labels = np.append(self._labels(ids, mask)[1:], IGNORED)
        labels[ends - 1] = IGNORED  # the last token of a document predicts nothing
        used = np.diff(ends[np.cumsum(pieces) - 1], prepend=0)
        inside = np.arange(length) < used[:, None]
        tokens_NT, labels_NT = np.zeros((count, length), np.int64), np.full((count, length), IGNORED)
        tokens_NT[inside], labels_NT[inside] = ids, labels
        # Of every row its documents, then what is padding, which may be none.
        documents = np.insert(lengths, np.cumsum(pieces), length - used)
        positions_NT = ranges(np.zeros_like(documents), documents).reshape(count, length)
        own = np.split(documents, np.cumsum(pieces + 1)[:-1])
        own = [lengths if lengths[-1] else lengths[:-1] for lengths in own]
        return [Row(*parts) for parts in zip(tokens_NT, labels_NT, positions_NT, own, pairs, strict=True)]

    def _labels(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return ids
        labels = np.where(mask % REJECTED >= self._lowest, ids, IGNORED)
        # The token that ends a turn stays in the input, but what the model learns to say there is the stop token.
        for written, meant in self._replacements.items():
            labels[labels == written] = meant
        return labels


class BatchLoader:
    """Reads any batch of a job, for one rank. Random access: a resume costs the same anywhere."""

    def __init__(self, job: ResolvedJob, world: World) -> None:
        self.curriculum, self._world = Curriculum(job), world
        self._readers: dict[tuple[str, int, str, int], SequenceReader] = {}

    def __getitem__(self, batch_index: int) -> Batch:
        stage, order, ids = self.curriculum.locate(batch_index)
        mine = deal(ids, self._world.rank, self._world.size)
        rows: list[Any] = [None] * len(mine)
        for number in np.unique(mine[:, 0]).tolist():
            reader = self._reader(order.sources[number], stage.sequence_length, stage.loss, number)
            where = np.flatnonzero(mine[:, 0] == number)
            sequences = order.packed(number, mine[where, 1])
            at_once = max(1, _AT_ONCE // stage.sequence_length)
            for first in range(0, len(where), at_once):
                part = slice(first, first + at_once)
                for slot, row in zip(where[part].tolist(), reader.rows(sequences[part]), strict=True):
                    rows[slot] = row
        size = min(stage.micro_batch_size, len(rows))
        micro_batches = tuple(
            replace(stack(rows[first : first + size]), chance=self._chance(batch_index, stage, first, size))
            for first in range(0, len(rows), size)
        )
        if self._world.device.type == "cuda":
            micro_batches = tuple(micro.pinned_for(self._world.device) for micro in micro_batches)
        return Batch(batch_index, stage.name, micro_batches, ids, stage.tokens_per_batch)

    def _chance(self, batch_index: int, stage: ResolvedStage, first: int, size: int) -> Chance | None:
        """Of `size` rows of this rank from `first` on: seeds by place in the whole world's batch."""
        job = self.curriculum.job.spec
        if not stage.neftune_alpha and not (job.model.adapter and job.model.adapter.dropout):
            return None
        first += self._world.rank * stage.sequences_per_batch // self._world.size
        seeds = tuple(mix(job.seed, batch_index, place) for place in range(first, first + size))
        return Chance(seeds, stage.neftune_alpha)

    def _reader(self, name: str, sequence_length: int, loss: str, number: int) -> SequenceReader:
        key = (name, sequence_length, loss, number)
        if key not in self._readers:
            source = PreparedSource.open(Path(self.curriculum.job.sources[name].folder))
            self._readers[key] = SequenceReader(source, source.packs("train", sequence_length), loss, number)
        return self._readers[key]


def dealt(reader: SequenceReader, sequences: np.ndarray, world: World, size: int) -> Iterator[MicroBatch]:
    """Every n-th of the sequences, int64 [sequences], in equally many micro-batches of at most `size` on all ranks:
    under ZeRO-3 each one is a collective."""
    mine = sequences[world.rank :: world.size]
    rounds = math.ceil(math.ceil(len(sequences) / world.size) / size)
    for first in range(0, rounds * size, size):
        part = mine[first : first + size]
        yield stack(reader.rows(part)) if len(part) else empty_micro_batch(reader.packs.sequence_length)


def load_batches(
    loader: BatchLoader, first: int, end: int, *, ahead: int = 2, without: Container[int] = ()
) -> Iterator[Batch]:
    """Batches first, first + 1, ... end - 1, read by one thread that stays at most `ahead` batches in front.

    Batches in `without` are passed over: not even read.
    With ahead = 0 there is no thread: where a rank computes on the CPU, one would only take its core.
    """
    indices = [index for index in range(first, end) if index not in without]
    if ahead == 0:
        yield from (loader[index] for index in indices)
        return
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def read() -> None:
        try:
            for index in indices:
                if closed.is_set():
                    return
                put(loader[index])
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=read, name="loader", daemon=True)
    thread.start()
    try:
        for _ in indices:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()

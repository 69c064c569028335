"""This rank's part of each batch, prefetched by one thread.

sequence ids --pack plan--> pieces --token files--> rows [T] --stack--> MicroBatch [B, T]
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ernie_dist.batch import IGNORED, Batch, Row, stack
from ernie_dist.data.curriculum import Curriculum, deal
from ernie_dist.data.packing import Packs
from ernie_dist.data.shard import PreparedSource
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.world import World

_LOWEST_MASK = {"all": 0, "answers": 1, "last_answer": 2}
"""the least mask value that counts, per loss kind"""


class SequenceReader:
    """Sequences of one prepared source at one length."""

    def __init__(self, source: PreparedSource, packs: Packs, loss: str) -> None:
        self.source, self.packs = source, packs
        self._lowest = _LOWEST_MASK[loss]
        self._replacements = source.manifest.label_replacements

    def __len__(self) -> int:
        return len(self.packs)

    def row(self, sequence: int) -> Row:
        """One packed sequence. What is left at the end is padding: token 0, no label, and a document of its own."""
        length = self.packs.sequence_length
        tokens, positions = np.zeros(length, np.int64), np.empty(length, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        starts, lengths = self.packs.pieces(sequence)
        at = 0
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
            ids, mask = self.source.read(start, size)
            tokens[at : at + size] = ids
            positions[at : at + size] = np.arange(size)
            labels[at : at + size - 1] = self._labels(ids[1:], None if mask is None else mask[1:])
            at += size
        positions[at:] = np.arange(length - at)
        documents = lengths.astype(np.int64)
        return tokens, labels, positions, np.append(documents, length - at) if at < length else documents

    def _labels(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return ids
        labels = np.where(mask >= self._lowest, ids, IGNORED)
        # The token that ends a turn stays in the input, but what the model learns to say there is the stop token.
        for written, meant in self._replacements.items():
            labels[labels == written] = meant
        return labels


class BatchLoader:
    """Reads any batch of a job, for one rank. Random access: a resume costs the same anywhere."""

    def __init__(self, job: ResolvedJob, world: World) -> None:
        self.curriculum, self._world = Curriculum(job), world
        self._readers: dict[tuple[str, int, str], SequenceReader] = {}

    def __getitem__(self, batch_index: int) -> Batch:
        stage, order, ids = self.curriculum.locate(batch_index)
        mine = deal(ids, self._world.rank, self._world.size)
        rows: list[Row] = [()] * len(mine)  # type: ignore[list-item]
        for number in np.unique(mine[:, 0]).tolist():
            reader = self._reader(order.sources[number], stage.sequence_length, stage.loss)
            where = np.flatnonzero(mine[:, 0] == number)
            sequences = order.packed(number, mine[where, 1])
            for slot, sequence in zip(where.tolist(), sequences.tolist(), strict=True):
                rows[slot] = reader.row(sequence)
        size = min(stage.micro_batch_size, len(rows))
        micro_batches = tuple(stack(rows[first : first + size]) for first in range(0, len(rows), size))
        return Batch(batch_index, stage.name, micro_batches, ids, stage.tokens_per_batch)

    def _reader(self, name: str, sequence_length: int, loss: str) -> SequenceReader:
        key = (name, sequence_length, loss)
        if key not in self._readers:
            source = PreparedSource.open(Path(self.curriculum.job.sources[name].folder))
            self._readers[key] = SequenceReader(source, source.packs("train", sequence_length), loss)
        return self._readers[key]


def load_batches(loader: BatchLoader, first: int, end: int, *, ahead: int = 2) -> Iterator[Batch]:
    """Batches first, first + 1, ... end - 1, read by one thread that stays at most `ahead` batches in front."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def read() -> None:
        try:
            for index in range(first, end):
                if closed.is_set():
                    return
                put(loader[index])
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=read, name="loader", daemon=True)
    thread.start()
    try:
        for _ in range(first, end):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()

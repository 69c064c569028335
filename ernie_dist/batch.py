"""What one rank feeds its engine for one optimizer step.

global batch --dealt to ranks--> Batch --cut--> MicroBatch [B, T] --one forward pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

IGNORED = -100
"""the label of a position outside the loss"""


class Row(NamedTuple):
    """A packed sequence."""

    tokens: np.ndarray
    """int64 [T], as labels and positions"""
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    """int64 [documents]: their lengths, padding last"""
    pairs: np.ndarray | None = None
    """int64 [pairs, 2], where documents come in pairs: source number, and number of the pair in that source's packs"""


@dataclass(frozen=True)
class Pairs:
    """The chosen and rejected answers in a micro-batch: P pairs."""

    chosen_P: torch.Tensor
    """int64: the document with the chosen answer; the one with the rejected answer follows it"""
    ids_P2: np.ndarray
    """int64: source number, and number of the pair in that source's packs"""
    reference_P: torch.Tensor | None = None
    """float32: log p(chosen) - log p(rejected) of the reference, once it was looked up"""
    beta: float = 0.0
    sft_weight: float = 0.0
    """of the chosen answers' own loss, beside that of the comparison"""

    def to(self, device: torch.device) -> Pairs:
        reference_P = None if self.reference_P is None else self.reference_P.to(device)
        return replace(self, chosen_P=self.chosen_P.to(device), reference_P=reference_P)


@dataclass(frozen=True)
class Chance:
    """What training leaves to chance on a micro-batch: noise and dropout are drawn from its seeds, and nothing else."""

    seeds: tuple[int, ...]
    """0 <= seed < 2**64 for every row; the same for a sequence of a batch on any number of ranks"""
    neftune_alpha: float
    """noise on the embeddings; 0: none"""


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences for one forward pass: B rows of T positions."""

    tokens_BT: torch.Tensor
    """int64"""
    labels_BT: torch.Tensor
    """int64, already shifted: the token that position t should predict, or IGNORED"""
    positions_BT: torch.Tensor
    """int64, restarting at 0 with every document"""
    document_ends: torch.Tensor
    """int32 [documents + 1]: 0 and the end of every document in the flattened B*T positions; padding is one too"""
    labelled_N: torch.Tensor
    """int64: the flattened B*T positions that have a label, rising"""
    longest: int
    """positions of the longest document"""
    pairs: Pairs | None = None
    """where the loss compares answers"""
    chance: Chance | None = None
    """None: nothing is left to it"""

    @property
    def weight(self) -> int:
        """How many the loss is a sum over: pairs of answers, or labelled positions."""
        return len(self.pairs.chosen_P) if self.pairs else len(self.labelled_N)

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        pairs = self.pairs.to(device) if self.pairs else None
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), pairs)

    def pinned_for(self, device: torch.device) -> MicroBatch:
        """In memory that this GPU can fetch while the host goes on."""
        with torch.cuda.device(device):  # a new thread's is the first one
            return self._each(torch.Tensor.pin_memory, self.pairs)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], pairs: Pairs | None) -> MicroBatch:
        names = ("tokens_BT", "labels_BT", "positions_BT", "document_ends", "labelled_N")
        return replace(self, pairs=pairs, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch, and the ids of all of it."""

    index: int
    stage: str
    micro_batches: tuple[MicroBatch, ...]
    sequence_ids: np.ndarray
    """int64 [global_batch_size, 2]: source number and number in that source, of the whole world"""
    tokens: int
    """positions of the whole world's batch, padding included"""


def stack(rows: Sequence[Row]) -> MicroBatch:
    """Rows of equal length -> one micro-batch."""
    tokens, labels, positions, documents, _ = zip(*rows, strict=True)
    lengths = np.concatenate(documents)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    stacked = [np.stack(part) for part in (tokens, labels, positions)]
    labelled = np.flatnonzero(stacked[1] != IGNORED)
    tensors = map(torch.from_numpy, (*stacked, ends, labelled))
    return MicroBatch(*tensors, int(lengths.max()), _pairs(rows))


def _pairs(rows: Sequence[Row]) -> Pairs | None:
    ids = [row.pairs for row in rows if row.pairs is not None]
    if not ids:
        return None
    before = np.cumsum([0, *(len(row.documents) for row in rows)])
    chosen = [first + 2 * np.arange(len(own)) for first, own in zip(before, ids, strict=False)]
    return Pairs(torch.from_numpy(np.concatenate(chosen)), np.concatenate(ids))


def empty_micro_batch(sequence_length: int) -> MicroBatch:
    """A row of padding, for a rank that has nothing left while others do: collectives need everyone."""
    nothing = np.zeros(sequence_length, np.int64)
    row = Row(nothing, np.full(sequence_length, IGNORED), np.arange(sequence_length), np.array([sequence_length]))
    return stack([row])

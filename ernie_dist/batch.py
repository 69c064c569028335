"""What one rank feeds its engine for one optimizer step.

global batch --dealt to ranks--> Batch --cut--> MicroBatch [B, T] --one forward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100
"""the label of a position outside the loss"""


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""a packed sequence: tokens, labels, positions int64 [T]; lengths of its documents int64 [documents], padding last"""


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
    longest: int
    """positions of the longest document"""
    chance: Chance | None = None
    """None: nothing is left to it"""

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        moved = (
            tensor.pin_memory().to(device, non_blocking=True)
            for tensor in (self.tokens_BT, self.labels_BT, self.positions_BT, self.document_ends)
        )
        return MicroBatch(*moved, longest=self.longest, chance=self.chance)


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
    tokens, labels, positions, documents = zip(*rows, strict=True)
    lengths = np.concatenate(documents)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tensors = (torch.from_numpy(np.stack(part)) for part in (tokens, labels, positions))
    return MicroBatch(*tensors, document_ends=torch.from_numpy(ends), longest=int(lengths.max()))


def empty_micro_batch(sequence_length: int) -> MicroBatch:
    """A row of padding, for a rank that has nothing left while others do: collectives need everyone."""
    nothing = np.zeros(sequence_length, np.int64)
    row = (nothing, np.full(sequence_length, IGNORED), np.arange(sequence_length), np.array([sequence_length]))
    return stack([row])

"""Which documents are trained on and which are held out: decided by each document's content alone.

document --blake2b--> uint64 digest --shares--> train | validation | test
"""

from __future__ import annotations

import hashlib

import numpy as np

from ernie_dist.spec.curriculum import SplitSpec

SPLITS = ("train", "validation", "test")


def digest(content: bytes) -> int:
    """64-bit hash of a document's canonical content. Unsalted: the same on every machine, in every version."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def placed(digest: int, place: int) -> int:
    """A digest by which equal documents are still found, and whose split is decided by `place`, 32 bits."""
    return place << 32 | digest & 0xFFFFFFFF


def split_of(digests: np.ndarray, split: SplitSpec) -> np.ndarray:
    """uint64 [documents] -> uint8 [documents]: index into SPLITS.

    Adding, removing or reordering documents never moves another one. A larger share of train only moves documents
    out of the held-out splits, a smaller one only into them.
    """
    ends = np.array([_end(split.train), _end(split.train + split.validation)], dtype=np.float64)
    # In units of 2**-32 everything is exact in float64, and no share is so fine that it would matter.
    return np.searchsorted(ends, (digests >> np.uint64(32)).astype(np.float64), side="right").astype(np.uint8)


def _end(share: float) -> float:
    return float(round(min(share, 1.0) * 2**32))

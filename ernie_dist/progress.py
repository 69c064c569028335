"""Where a run is: one small immutable value. Everything else that changes with time is a pure function of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Progress:
    """`step` counts optimizer updates, `batch_index` the batches behind it; they part only where data was skipped.

    The batches of a skipped window are behind a run with the first step after them, and not before.

    `batch_hash` rolls over the ids of every sequence consumed: two runs that agree on it have seen the same data in
    the same order.
    """

    step: int
    batch_index: int
    batch_hash: str

    @classmethod
    def start(cls) -> Progress:
        return cls(step=0, batch_index=0, batch_hash="0" * 16)

    def skipping_to(self, batch_index: int) -> Progress:
        """The progress with all batches before `batch_index` behind it; those in between were not trained on."""
        return Progress(self.step, batch_index, self.batch_hash)

    def after(self, sequence_ids: np.ndarray) -> Progress:
        """The progress once a batch has been trained on. sequence_ids: int64 [global_batch_size, 2]."""
        ids = np.ascontiguousarray(sequence_ids, dtype="<i8")
        digest = hashlib.blake2b(bytes.fromhex(self.batch_hash) + ids.tobytes(), digest_size=8).hexdigest()
        return Progress(self.step + 1, self.batch_index + 1, digest)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        return cls(int(value["step"]), int(value["batch_index"]), str(value["batch_hash"]))

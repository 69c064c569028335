"""Batches that a run passes over because their updates were refused: RUN_DIR/skipped_batches.json, which only grows."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.strict import Strict


class SkippedWindow(Strict):
    """Batches first, first + 1, ... end - 1."""

    first: int
    end: int
    step: int
    """of the first refused update in it"""
    attempt: int
    """the one in which they were refused"""
    reason: str
    sequence_ids: tuple[tuple[int, int], ...]
    """source number and number in that source, of every sequence in the refused batches"""


_WINDOWS = TypeAdapter(tuple[SkippedWindow, ...])


@dataclass(frozen=True)
class Skips:
    """All skipped batches of a run. `batch_index in skips`: whether it is one of them."""

    windows: tuple[SkippedWindow, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Skips:
        """None skipped if there is no file. Raises RunDirError if it is not readable."""
        try:
            return cls(_WINDOWS.validate_json(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise RunDirError(
                f"{path}: cannot be read ({type(error).__name__}); it says which batches this run has skipped: bring "
                "it back from a copy, or start a new run directory"
            ) from None

    def write(self, path: Path) -> None:
        """All of the file or nothing, on disk for good once this returns."""
        aside = path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            json.dump([window.model_dump(mode="json") for window in self.windows], file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __contains__(self, batch_index: object) -> bool:
        return batch_index in self._batches

    def next(self, batch_index: int) -> int:
        """The first batch from `batch_index` on that is not skipped; it may be the one past the end."""
        while batch_index in self._batches:
            batch_index += 1
        return batch_index

    def behind(self, batch_index: int) -> int:
        """The first batch from which to `batch_index` all are skipped; itself if the one before it is not."""
        while batch_index - 1 in self._batches:
            batch_index -= 1
        return batch_index

    def before(self, batch_index: int) -> int:
        """How many of the batches before `batch_index` are skipped."""
        return sum(one < batch_index for one in self._batches)

    @cached_property
    def _batches(self) -> frozenset[int]:
        return frozenset(index for window in self.windows for index in range(window.first, window.end))

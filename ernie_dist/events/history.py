"""Reads the record of a run back, and compares what two attempts did at the same step.

metrics.jsonl -> [step, ...]   events.jsonl -> [event, ...]   steps replayed after a resume -> [Replayed, ...]
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.skips import Skips

log = logging.getLogger(__name__)

_NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
"""always numbers, so null stands for NaN; a null mfu means that it is not known"""


@dataclass(frozen=True)
class Replayed:
    """A step that two attempts executed: the one before a crash or preemption and the one after it."""

    step: int
    first_attempt: int
    second_attempt: int
    first_loss: float
    second_loss: float
    first_batch_hash: str
    second_batch_hash: str

    @property
    def identical(self) -> bool:
        """Whether the loss agrees to the last bit and the data in every sequence id."""
        same_loss = float(self.first_loss).hex() == float(self.second_loss).hex()
        return same_loss and self.first_batch_hash == self.second_batch_hash


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a run in order. Of a step written twice the later attempt counts. [] if there is no file.

    Steps that a run went back behind, to skip their batches, are no steps of it.
    """
    latest: dict[int, dict[str, Any]] = {}
    for line in _counting_lines(path):
        known = latest.get(line["step"])
        if known is None or line["attempt"] >= known["attempt"]:
            latest[line["step"]] = line
    return [latest[step] for step in sorted(latest)]


def read_all_attempts(path: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, in the order written. [] if there is no file."""
    lines = [line for line in _read_lines(path) if "step" in line and "attempt" in line]
    for line in lines:
        for name in _NUMBERS:
            if line.get(name) is None:
                line[name] = math.nan
    return lines


def _counting_lines(path: Path) -> list[dict[str, Any]]:
    """Lines without the steps that the run went back behind: at the end of a job none take their place."""
    try:
        windows = Skips.read(RunFiles(path.parent).skipped_batches).windows
    except RunDirError as error:
        log.warning("%s", error)
        windows = ()
    return [
        line
        for line in read_all_attempts(path)
        if not any(line["attempt"] <= window.attempt and line["step"] >= window.step for window in windows)
    ]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every line of events.jsonl, in the order written; "event" names its kind. [] if there is no file."""
    return [line for line in _read_lines(path) if "event" in line]


def replayed_steps(path: Path) -> list[Replayed]:
    """What each step executed more than once gave, each attempt against the one before it; ordered by step.

    An uninterrupted run has none. Where all are identical, the run went on from its checkpoint exactly.
    """
    attempts: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in _counting_lines(path):
        attempts[line["step"]][line["attempt"]] = line
    found = []
    for step in sorted(attempts):
        lines = [attempts[step][number] for number in sorted(attempts[step])]
        for first, second in itertools.pairwise(lines):
            found.append(
                Replayed(
                    step,
                    first["attempt"],
                    second["attempt"],
                    first["loss"],
                    second["loss"],
                    first.get("batch_hash", ""),
                    second.get("batch_hash", ""),
                )
            )
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines. A torn last line is passed over; a broken one elsewhere is logged."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    texts = raw.split(b"\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError:
            if number < len(texts):  # the last line may be torn, or being written at this moment
                log.warning("%s:%d is not JSON and is passed over", path, number)
            continue
        if isinstance(value, dict):
            found.append(value)
    return found

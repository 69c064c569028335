"""The run's own record: every step is a line of metrics.jsonl, everything else a line of events.jsonl.

These two files are the truth about a run; what other trackers show is a copy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from ernie_dist.events.event import Event, StepFinished
from ernie_dist.spec.run_files import RunFiles


class JsonlSink:
    """Appends each event as one JSON line and hands it to the operating system at once.

    JSON has no NaN and no infinity: such a number is written as null and read back as NaN.
    """

    def __init__(self, files: RunFiles) -> None:
        self._metrics = open_for_appending(files.metrics)
        self._events = open_for_appending(files.events)

    def handle(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            values = event.to_json()
            del values["event"]  # each line of metrics.jsonl is a step
            values["time"] = values.pop("time")  # a person reads from the left: the step first
            self._metrics.write(to_line(values))
        else:
            self._events.write(to_line(event.to_json()))

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def to_line(values: dict[str, Any]) -> bytes:
    """One line of strict JSON. Floats are written so that reading gives the same bits."""
    return (json.dumps(_finite(values), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def open_for_appending(path: Path) -> IO[bytes]:
    """An unbuffered file for appending, its last line whole.

    A process killed while writing leaves half a line: it is cut off, or the next line would be glued to it and be
    lost too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, 2)
        start = _start_of_last_line(file, end)
        file.seek(start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            if _is_whole(tail):
                file.write(b"\n")
            else:
                file.truncate(start)
    return path.open("ab", buffering=0)


def _start_of_last_line(file: IO[bytes], end: int, block: int = 1 << 16) -> int:
    """Where the last line begins, its own newline not counted."""
    position = end
    while position > 0:
        first = max(0, position - block)
        file.seek(first)
        newline = file.read(position - first).rfind(b"\n", 0, position - first - (position == end))
        if newline >= 0:
            return first + newline + 1
        position = first
    return 0


def _is_whole(line: bytes) -> bool:
    """Only the newline is missing: no beginning of a JSON object is itself one."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False

"""The run's own record: every step is a line of metrics.jsonl, everything else a line of events.jsonl.

These two files are the truth about a run; what other trackers show is a copy.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from pathlib import Path
from typing import IO, Any

from ernie_dist.events.event import Event, StepFinished
from ernie_dist.spec.errors import RecordNotKept
from ernie_dist.spec.run_files import RunFiles

log = logging.getLogger(__name__)

MOST_WAITING = 64 << 20
"""bytes, about 150,000 steps"""


class JsonlSink:
    """Appends each event as one JSON line and hands it to the operating system at once.

    JSON has no NaN and no infinity: such a number is written as null and read back as NaN. What a full disk does not
    take waits in memory and is written, in order, as soon as there is room; RecordNotKept once that is `most_waiting`
    bytes.
    """

    def __init__(self, files: RunFiles, *, most_waiting: int = MOST_WAITING) -> None:
        self._metrics = _Lines(files.metrics, most_waiting)
        self._events = _Lines(files.events, most_waiting)

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


class _Lines:
    """A file of lines, and those it could not take yet."""

    def __init__(self, path: Path, most_waiting: int) -> None:
        self._path, self._most = path, most_waiting
        self._file = open_for_appending(path)
        self._waiting: deque[bytes] = deque()  # the first one may be the rest of a line
        self._bytes = 0

    def write(self, line: bytes) -> None:
        had_room = not self._waiting
        self._waiting.append(line)
        self._bytes += len(line)
        problem = self._flush()
        if problem is None:
            if not had_room:
                log.warning("%s can be written again; nothing of it is missing", self._path)
            return
        if had_room:
            log.warning(
                "%s cannot be written (%s); its lines wait in memory: free some space", self._path, problem.strerror
            )
        if self._bytes > self._most:
            raise RecordNotKept(
                f"{self._path} could not be written for {len(self._waiting):,} lines ({problem.strerror}), and without "
                "its record the run does not go on; free some space and launch again"
            )

    def close(self) -> None:
        problem = self._flush()
        if problem is not None:
            log.error(
                "%s: its last %d lines are lost: it could not be written (%s)",
                self._path,
                len(self._waiting),
                problem.strerror,
            )
        self._file.close()

    def _flush(self) -> OSError | None:
        while self._waiting:
            line = self._waiting[0]
            try:
                taken = self._file.write(line)  # of an almost full disk: what still fits
            except OSError as error:
                return error
            self._bytes -= taken
            if taken < len(line):
                self._waiting[0] = line[taken:]
            else:
                self._waiting.popleft()
        return None


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

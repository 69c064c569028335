"""A stop that all ranks agree on: rank 0 looks for a request and at the clock, and the others follow it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ernie_dist.spec.stop_file import DEADLINE, read
from ernie_dist.world import World

_MARGIN = 1.5
"""a save may take this much longer than the slowest of the last ones"""
_FIRST_SAVE, _LEAVING = 60.0, 15.0
"""seconds kept at the end of the time limit, but not more than a tenth of it: for a save while none has been measured,
and for all processes to end"""
_LOOK_EVERY = 0.5


class StopRequest:
    """Stop files, whoever made them, and the attempt's time limit."""

    def __init__(self, files: Sequence[Path], world: World, *, saves: Iterable[float] = ()) -> None:
        """`saves`: what the run's saves so far took, in seconds."""
        self._files, self._world = tuple(files), world
        self._saves, self._gaps = deque(saves, maxlen=5), deque([0.0], maxlen=256)
        self._looked: float | None = None
        self._read = dict.fromkeys(self._files)
        self._reason, self._notice_ends, self._lock = "", None, threading.Lock()
        deadline = os.environ.get(DEADLINE)
        self._limit = time.monotonic() + float(deadline) - time.time() if deadline else None
        tenth = max(0.0, self._limit - time.monotonic()) / 10 if self._limit else 0.0
        self._first_save, self._leaving = min(_FIRST_SAVE, tenth), min(_LEAVING, tenth)
        if world.is_main:  # a notice counts from when it is given, and a step may be long
            threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def pending(self) -> bool:
        """Whether this rank knows of a reason to stop. Rank 0 looks, without communication; on others False."""
        if not self._world.is_main:
            return False
        now = time.monotonic()
        if self._looked is not None:
            self._gaps.append(now - self._looked)
        self._looked = now
        self._look()
        if self._limit is not None and not self._reason and now + self._needed() >= self._limit:
            self._reason = "time limit"
        return bool(self._reason)

    def requested(self) -> bool:
        """Whether to stop now. Collective: the same answer on all ranks."""
        return self._world.any(self.pending())

    def reason(self) -> str:
        """Why, on rank 0; "" if there is no reason to stop."""
        return self._reason

    def seconds_left(self) -> float | None:
        """Until the notice or the time limit is over, as rank 0 knows it; None if neither was given."""
        ends = [end for end in (self._notice_ends, self._limit) if end is not None]
        return min(ends) - time.monotonic() if ends else None

    def saved(self, seconds: float) -> None:
        """A save took this long."""
        self._saves.append(seconds)

    def save_fits(self) -> bool:
        """Whether there is time for a save; so it is taken to be where nothing is known. Collective."""
        left = self.seconds_left()
        short = left is not None and bool(self._saves) and left < _MARGIN * max(self._saves)
        return not self._world.any(self._world.is_main and short)

    def _needed(self) -> float:
        """Seconds for one more step, a save, and the end."""
        save = _MARGIN * max(self._saves) if self._saves else self._first_save
        return max(self._gaps) + save + self._leaving

    def _watch(self) -> None:
        while True:
            for folder in {file.parent for file in self._files}:  # or NFS goes on believing that it is missing
                with suppress(OSError):
                    os.listdir(folder)
            self._look()
            time.sleep(_LOOK_EVERY)

    def _look(self) -> None:
        with self._lock:  # or what one thread has read some time ago hides what the other has just read
            for file in self._files:
                note = read(file) if file.exists() else None
                if note is None or note == self._read[file]:
                    continue
                if note.notice is not None:  # a later request may leave less time, never more
                    ends = time.monotonic() + note.notice
                    self._notice_ends = ends if self._notice_ends is None else min(ends, self._notice_ends)
                self._read[file], self._reason = note, note.reason

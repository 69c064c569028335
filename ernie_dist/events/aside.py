"""Keeps a slow sink off the step path.

handle(event) -> bounded queue -> one daemon thread -> the sink's own handle(event)
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading

from ernie_dist.events.event import Event, Sink

log = logging.getLogger(__name__)

QUEUE_EVENTS = 10_000
CLOSE_SECONDS = 10.0


class Aside:
    """Hands events to `sink` on a thread: whatever that waits for, nobody else does.

    Where it fails or falls behind by `queue_events`, events are dropped and counted, and one warning says so.
    """

    def __init__(self, sink: Sink, *, queue_events: int = QUEUE_EVENTS, close_seconds: float = CLOSE_SECONDS) -> None:
        self._sink, self._name, self._close_seconds = sink, type(sink).__name__, close_seconds
        self._queue: queue.Queue[Event | None] = queue.Queue(maxsize=queue_events)
        self._dropped = 0
        self._broken = False
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        if self._broken:
            return
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("%s does not keep up; what it misses is in metrics.jsonl", self._name)

    def close(self) -> None:
        """Waits a bounded time for what is queued."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._close_seconds / 2)
        self._thread.join(self._close_seconds / 2)
        if self._thread.is_alive():
            log.warning("%s did not finish in %.0f s and is left behind", self._name, self._close_seconds)
        if self._dropped:
            log.warning("%s missed %d events", self._name, self._dropped)

    def _work(self) -> None:
        try:
            while (event := self._queue.get()) is not None:
                self._sink.handle(event)
            self._sink.close()
        except Exception:
            log.exception("%s failed and is left out from now on", self._name)
            self._broken = True
            with contextlib.suppress(queue.Empty):  # close() has to find room
                while True:
                    self._queue.get_nowait()

"""A stop request that all ranks agree on: the file RUN_DIR/stop, looked at by rank 0 between steps."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from ernie_dist.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Signals to any rank, and whoever else creates the file, end in the same place."""

    def __init__(self, file: Path, world: World) -> None:
        self._file, self._world = file, world
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def pending(self) -> bool:
        """Whether this rank knows of a request. Only rank 0 looks; nothing is communicated."""
        return self._world.is_main and self._file.exists()

    def requested(self) -> bool:
        """Whether to stop now. Collective: the same answer on all ranks."""
        return self._world.any(self.pending())

    def reason(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8").strip() or "stop file"
        except OSError:
            return "stop file"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # No logging and no collective in here: the signal may have interrupted either.
        request_stop(self._file, signal.Signals(number).name)


def request_stop(file: Path, reason: str) -> None:
    """Asks a run to stop at its next step with a checkpoint."""
    file.write_text(reason + "\n", encoding="utf-8")

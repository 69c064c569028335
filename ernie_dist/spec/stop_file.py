"""How a run is asked to stop: a file, with a reason and what time is left.

RUN_DIR/stop                 asked from outside: a person, the launcher. Ends the run: it is not started again.
RUN_DIR/attempts/N/stop      a signal to a rank of attempt N. Ends that attempt. torchrun sends one to the ranks that
                             are left when another has died: that is no wish to end the run.
"""

from __future__ import annotations

import json
import os
import signal
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
DEADLINE = "ERNIE_DEADLINE"
"""variable of the ranks' environment: when the attempt has to be over, in seconds since the epoch"""


@dataclass(frozen=True)
class StopNote:
    """What the file says."""

    reason: str
    notice: float | None = None
    """seconds until the machine is gone, counted from when the file is first seen"""
    now: bool = False
    """do not wait for the step, nor for a checkpoint"""
    again: bool = False
    """the run goes on by itself: only the nodes of this attempt are to be taken away"""

    @property
    def by_scheduler(self) -> bool:
        """Whether it came as a signal that no person's terminal sends."""
        return self.reason in (signal.SIGTERM.name, signal.SIGUSR1.name)


def ask(file: Path, note: StopNote) -> None:
    """Asks for a stop; a request that is there already is replaced. The file is never seen half written."""
    _write_aside(file, note).replace(file)


def ask_once(file: Path, note: StopNote) -> None:
    """Asks for a stop unless one is asked for already."""
    aside = _write_aside(file, note)
    with suppress(FileExistsError):
        os.link(aside, file)
    aside.unlink()


def read(file: Path) -> StopNote | None:
    """The request, or None. Any file is one: what is no JSON is the reason."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    with suppress(ValueError, TypeError):
        return StopNote(**json.loads(text))
    return StopNote(text or "stop file")


def listen(file: Path) -> None:
    """From now on a signal to this process becomes `file`."""
    for number in SIGNALS:
        signal.signal(number, partial(_on_signal, file))


def _on_signal(file: Path, number: int, frame: FrameType | None) -> None:
    # No logging, no lock and no collective in here: the signal may have interrupted any of them.
    with suppress(OSError):
        ask_once(file, StopNote(signal.Signals(number).name))


def _write_aside(file: Path, note: StopNote) -> Path:
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    aside.write_text(json.dumps(asdict(note), ensure_ascii=False) + "\n", encoding="utf-8")
    return aside

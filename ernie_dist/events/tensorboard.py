"""The curves for TensorBoard, each step once however often the run was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_dist.events.event import AttemptStarted, CheckpointSaved, Evaluated, Event, StepFinished, TimeSpent
from ernie_dist.events.scalars import scalars

FLUSH_SECONDS = 10


class TensorboardSink:
    """Writes one event file per attempt into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def handle(self, event: Event) -> None:
        if isinstance(event, AttemptStarted):
            self._open(event.step)
        elif isinstance(event, (StepFinished, Evaluated, TimeSpent)):
            if self._writer is None:
                self._open(event.step - 1)
            for name, value in scalars(event).items():
                self._writer.add_scalar(name, value, event.step, walltime=event.time)
        elif isinstance(event, CheckpointSaved) and self._writer is not None:
            self._writer.flush()  # steps up to a checkpoint are never run again, so their points must not be lost

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> None:
        """`step`: where the attempt goes on. What earlier attempts wrote past it is hidden by TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter  # slow, and only where it is asked for

        self.close()
        # The evaluation at the step of the checkpoint belongs to the attempt before, unless the run starts over.
        purge = step + 1 if step > 0 else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=FLUSH_SECONDS)

"""What follows a refused update: it is told; and once too many come in a row the run goes back and skips their batches.

The attempt ends. The next one restores the last checkpoint and reads in skipped_batches.json what to pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

from ernie_dist.batch import Batch
from ernie_dist.engine.base import StepResult
from ernie_dist.events.event import BatchesSkipped, EventBus, UpdateRefused
from ernie_dist.guard import Guard, Recent
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import BadNumbersError, CheckpointError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.lease import refuse_if_lost
from ernie_dist.spec.run_files import RunFiles, complete_checkpoints
from ernie_dist.spec.skips import SkippedWindow, Skips
from ernie_dist.world import World


class Refusals:
    """The updates refused in a row, up to the step just done. The same on all ranks."""

    def __init__(
        self,
        spec: JobSpec,
        recent: Recent,
        skips: Skips,
        files: RunFiles,
        attempt: int,
        world: World,
        events: EventBus,
    ) -> None:
        self._spec, self._skips = spec.bad_numbers, skips
        # Most pairs of answers soon cost next to nothing, and one that is still learnt a thousand times as much.
        pairs = [stage.name for stage in spec.curriculum if stage.dpo]
        self._guard = Guard(spec.bad_numbers, recent, loss_scaling=spec.engine.precision == "fp16", uneven=pairs)
        self._files, self._attempt, self._world, self._events = files, attempt, world, events
        self._in_a_row: list[UpdateRefused] = []

    @property
    def recent(self) -> Recent:
        """What the next step is measured against: part of a checkpoint."""
        return self._guard.recent

    def accepts(self, stage: str) -> Callable[[float, float], bool]:
        """(loss, gradient norm) of a step of `stage` -> whether it may change the weights."""
        return partial(self._guard.accepts, stage)

    @property
    def pending(self) -> bool:
        """Whether the last update was refused: the run may have to go back, so nothing is saved now."""
        return bool(self._in_a_row)

    @property
    def too_many(self) -> bool:
        return len(self._in_a_row) >= self._spec.patience

    def look(self, batch: Batch, step: int, result: StepResult) -> None:
        """Takes note of a step that has just been done, and tells of a refusal."""
        reason = self._guard.look(batch.stage, result.loss, result.grad_norm, applied=result.applied)
        if reason is None:
            self._in_a_row.clear()
            return
        ids = batch.sequence_ids.tolist()
        self._in_a_row.append(UpdateRefused(step, batch.index, reason, result.loss, result.grad_norm, ids))
        self._events.emit(self._in_a_row[-1])

    def go_back(self) -> NoReturn:
        """Ends the attempt. Collective. Raises BadNumbersError, final where going back again would not help."""
        refused, windows = self._in_a_row, self._skips.windows
        first, last = refused[0], refused[-1]
        problem = (
            f"{len(refused)} update(s) in a row were refused, up to step {last.step} (batches {first.batch_index} to "
            f"{last.batch_index}): {last.reason}"
        )
        remedy = "look at these batches' sequences in events.jsonl, at the learning rate and at engine.precision"
        if len(windows) >= self._spec.rewinds:
            raise BadNumbersError(
                f"{problem}. The run has gone back {len(windows)} time(s) already (bad_numbers.rewinds = "
                f"{self._spec.rewinds}): {remedy}",
                final=True,
            )
        if not self._world.from_main(self._world.is_main and bool(complete_checkpoints(self._files.checkpoints))):
            raise BadNumbersError(f"{problem}. There is no checkpoint to go back to: {remedy}", final=True)
        window = SkippedWindow(
            first=first.batch_index,
            end=last.batch_index + 1,
            step=first.step,
            attempt=self._attempt,
            reason=last.reason,
            sequence_ids=tuple(tuple(pair) for event in refused for pair in event.sequence_ids),
        )
        if self._world.is_main:
            refuse_if_lost(self._files.root, self._attempt)
            Skips((*windows, window)).write(self._files.skipped_batches)
        self._events.emit(BatchesSkipped(**window.model_dump()))
        self._world.barrier()  # a rank that raises ends the others: not before it is written down
        raise BadNumbersError(
            f"{problem}. The next attempt goes back to the last checkpoint and skips batches {window.first} to "
            f"{window.end - 1}; {remedy}"
        )


def check_position(progress: Progress, skips: Skips, checkpoint: str) -> None:
    """Raises CheckpointError if a checkpoint has not passed over exactly the skipped batches before it."""
    passed, recorded = progress.batch_index - progress.step, skips.before(progress.batch_index)
    if passed != recorded:
        raise CheckpointError(
            f"{checkpoint}: has skipped {passed} batch(es) up to batch {progress.batch_index}, and "
            f"skipped_batches.json says {recorded}: one of them is of another run or was edited; bring the file back"
        )

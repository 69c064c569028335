"""Held-out losses while a run trains: when they are due, what they are, and whether they are the best so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ernie_dist.best import Best
from ernie_dist.engine.base import Engine
from ernie_dist.evaluate.held_out import HeldOut
from ernie_dist.events import event as events
from ernie_dist.events.history import read_events
from ernie_dist.progress import Progress
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.run_files import RunFiles, checkpoint_folder
from ernie_dist.spec.skips import Skips
from ernie_dist.world import World


class Evaluations:
    """Those of one attempt. What it decides is the same on all ranks, and the same after a kill."""

    def __init__(
        self,
        job: ResolvedJob,
        files: RunFiles,
        world: World,
        engine: Engine,
        bus: events.EventBus,
        skips: Skips,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._job, self._files, self._world, self._engine, self._events = job, files, world, engine, bus
        self._skips, self._stop_requested = skips, stop_requested
        self.held_out = HeldOut(job, world)
        self.best = Best(job.spec.evaluate.best or "")

    def restore(self, remembered: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint remembers."""
        self.best = Best.from_json(self._job.spec.evaluate.best or "", remembered.get("best"))

    def remembered(self) -> dict[str, Any]:
        """What a checkpoint has to remember."""
        return {"best": self.best.to_json()} if self._job.spec.evaluate.best else {}

    @property
    def cut_short(self) -> bool:
        """Whether a stop ended the last evaluation before its time."""
        return self.held_out.cut_short

    def over(self, progress: Progress) -> bool:
        """Whether no batch is left, or the held-out loss has ceased to fall."""
        early_stop = self._job.spec.evaluate.early_stop
        given_up = early_stop is not None and self.best.waited >= early_stop.patience
        return given_up or self._no_batch_is_left(progress)

    def due(self, stage: ResolvedStage, progress: Progress, since: int | None = None) -> bool:
        """After the batches that led to `progress`, from batch `since` (else the last one)."""
        every = self._job.spec.evaluate.every
        crossed = every is not None and self._job.crosses(every, progress.batch_index, since)
        return crossed or self._has_ended(stage, progress)

    def owed(self, stage: ResolvedStage | None, progress: Progress) -> bool:
        """At the beginning; and where a stop cut the evaluation here short, or skipped batches ended a stage.

        `stage` is the one of the last batch, None before the first. Collective.
        """
        since = self._skips.behind(progress.batch_index - 1)  # as the step saw it
        owed = self._world.is_main and (stage is None or self.due(stage, progress, since))
        if owed:
            at_end = self._at_end(stage, progress)
            done = {
                event["source"]
                for event in read_events(self._files.events)
                if event["event"] == "Evaluated" and event["step"] == progress.step and event["at_stage_end"] >= at_end
            }
            not_compared = self._job.spec.evaluate.best is not None and self.best.seen < progress.step
            owed = not done.issuperset(self.held_out.sources) or not_compared
        return self._world.any(owed)

    def measure(self, stage: ResolvedStage | None, progress: Progress, *, comparable: bool) -> None:
        """Measures, tells, and compares where `comparable`: what is best has to have a checkpoint. Collective.

        A stop cuts it short, except at the very end of the run, where nothing would make up for it.
        """
        last = self._no_batch_is_left(progress)
        losses: dict[str, float] = {}
        for measured in self.held_out.losses(self._engine, lambda: not last and self._stop_requested()):
            losses[measured.source] = measured.loss
            self._events.emit(
                events.Evaluated(
                    step=progress.step,
                    stage=stage.name if stage else "start",
                    source=measured.source,
                    loss=measured.loss,
                    tokens=measured.tokens,
                    pairs=self._job.sources[measured.source].kind == "preference",
                    consumed_tokens=self._job.consumed_tokens(progress.batch_index),
                    at_stage_end=self._at_end(stage, progress),
                )
            )
        if not self.cut_short and stage is not None and (last or comparable):
            self._compare(losses, progress.step)

    def _compare(self, losses: dict[str, float], step: int) -> None:
        """Tells whether this evaluation is the best so far, or one too many that is not."""
        spec, before = self._job.spec.evaluate, self.best
        if spec.best is None:
            return
        self.best = best = before.after(step, losses, spec.early_stop)
        if best.loss is not None and best.step != before.step:
            name = checkpoint_folder(self._files.checkpoints, step).name
            self._events.emit(events.BestCheckpoint(step, name, best.source, best.loss))
        if best is not before and spec.early_stop and best.waited >= spec.early_stop.patience:
            reason = f"no lower held-out loss ({best.source}) in {best.waited} evaluations"
            self._events.emit(events.EarlyStopped(step, reason, best.step, best.loss))

    def _at_end(self, stage: ResolvedStage | None, progress: Progress) -> bool:
        return stage is None or self._has_ended(stage, progress)

    def _has_ended(self, stage: ResolvedStage, progress: Progress) -> bool:
        """Whether all batches of the stage that are not skipped have been trained on."""
        return self._skips.next(progress.batch_index) >= stage.end_batch

    def _no_batch_is_left(self, progress: Progress) -> bool:
        return self._skips.next(progress.batch_index) == self._job.total_batches

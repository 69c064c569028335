"""Composition root and training loop: one attempt of one run."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from ernie_dist.batch import Batch
from ernie_dist.checkpoint import CheckpointStore, Restored, refuse_full_disk, verify
from ernie_dist.data.loader import BatchLoader, load_batches
from ernie_dist.engine.base import Engine
from ernie_dist.engine.replicas import refuse_difference
from ernie_dist.engine.select import build_engine
from ernie_dist.evaluate.evaluations import Evaluations
from ernie_dist.events import event as events
from ernie_dist.events import goodput
from ernie_dist.events.console import ConsoleSink
from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.events.sinks import build_sinks
from ernie_dist.export.transformers_folder import export_model
from ernie_dist.garbage import Garbage
from ernie_dist.guard import Recent
from ernie_dist.heartbeat import Heartbeat, Phase
from ernie_dist.memory import Peaks
from ernie_dist.meter import Meter
from ernie_dist.model.base_weights import base_fingerprint
from ernie_dist.model.build import build_model, layer_options
from ernie_dist.model.loss import answer_log_probabilities, summed_loss
from ernie_dist.preflight import preflight
from ernie_dist.progress import Progress
from ernie_dist.references import References
from ernie_dist.rewind import Refusals, check_position
from ernie_dist.schedule import learning_rate
from ernie_dist.spec.errors import CheckpointReadError, RanksDiffer
from ernie_dist.spec.lease import refuse_if_lost
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.run_files import RunFiles, checkpoint_folder, complete_checkpoints, read_state
from ernie_dist.spec.skips import Skips
from ernie_dist.stop import StopRequest
from ernie_dist.straggler import BusyTimes
from ernie_dist.trusted_files import UNREAD
from ernie_dist.world import World

_TELL_EVERY = 10.0
"""seconds between two lines on how far the asking about pairs is"""


def train(run_dir: Path, attempt: int, world: World, console: IO[str], heartbeat: Heartbeat | None = None) -> bool:
    """Runs or goes on with the job of a run directory. True when it is finished, False when it stopped on request."""
    return _Attempt(RunFiles(run_dir), attempt, world, console, heartbeat or Heartbeat()).run()


class _Attempt:
    """What an attempt is made of, and the loop that uses it. `progress` is all that changes."""

    def __init__(self, files: RunFiles, attempt: int, world: World, console: IO[str], beat: Heartbeat) -> None:
        self.files, self.attempt, self.world, self.beat = files, attempt, world, beat
        world.connect()
        beat.enter(Phase.PREFLIGHT, 0)
        self.preflight = preflight(files, attempt, world)
        beat.enter(Phase.START, 0)
        self.peaks = Peaks(world)
        self.job = job = ResolvedJob.read(files.job)
        known = read_events(files.events) if world.is_main else []
        saves = [event["seconds"] for event in known if event["event"] == "CheckpointSaved"]
        self.stop = StopRequest((files.stop, files.signalled(attempt)), world, saves=saves)
        self.engine = _build_engine(job, world)
        self.fence = partial(refuse_if_lost, files.root, attempt)
        self.store = CheckpointStore(
            files.checkpoints, job, world, base=_base(job, world), before_publishing=self.fence
        )
        refuse_full_disk(files.checkpoints, job, self.engine.trainable)
        # The rank's own log is where `ernie logs` looks, also once the terminal is gone.
        sinks = [*build_sinks(job, files, console), ConsoleSink(sys.stdout)] if world.is_main else []
        self.events = events.EventBus(sinks)
        beat.on_end = self._phase_ended
        self.skips = Skips.read(files.skipped_batches)
        self.evaluations = Evaluations(job, files, world, self.engine, self.events, self.skips, self._is_asked_to_stop)
        self.meter = Meter(job, self.engine, world)
        self.busy = BusyTimes(world, job.spec.watchdog.straggler)

    def run(self) -> bool:
        garbage = Garbage()
        try:
            self.events.emit(self.preflight)
            self._restore()
            self.events.emit(self._started())
            return self._run(garbage)
        finally:
            garbage.close()
            self.events.close()

    def _run(self, garbage: Garbage) -> bool:
        job, engine, beat, refusals, evaluations = self.job, self.engine, self.beat, self.refusals, self.evaluations
        before = job.stage_at(self.progress.batch_index - 1) if self.progress.batch_index else None
        if evaluations.owed(before, self.progress):
            self._evaluate(before)
        stopping, stage, due = self.stop.requested(), None, False
        if stopping:  # before the first step: the checkpoint this attempt began with is all there is to keep
            self.events.emit(events.Stopped(self.progress.step, self.stop.reason()))
        for batch in self._batches(none=stopping or evaluations.over(self.progress)):
            since, self.progress = self.progress.batch_index, self.progress.skipping_to(batch.index)
            phase = Phase.FIRST_STEP if stage is None else Phase.STEP
            if stage is None or batch.index >= stage.end_batch:
                stage = self._begin_stage(batch)
                stopping = stage.dpo is not None and since <= stage.first_batch and not self._ask_references(stage)
                if stopping:
                    break
            beat.enter(phase, self.progress.step + 1)
            batch = self.references.of_batch(batch) if stage.dpo and self.references else batch
            rate = learning_rate(job, self.progress)
            result = engine.step(batch, rate, accepts=refusals.accepts(stage.name), flag=self.stop.pending)
            self.progress = self.progress.after(batch.sequence_ids)
            self._record(batch, stage, rate, result)
            if refusals.too_many:
                self._tell_of_saves(wait=True)
                refusals.go_back()
            if evaluations.due(stage, self.progress, since):
                self._evaluate(stage)
            # Updates refused in a row may end in going back: until they end nothing is saved, and a stop waits.
            finished = evaluations.over(self.progress)
            stopping = (result.flagged or evaluations.cut_short) and not finished and not refusals.pending
            due = due or self.store.due(self.progress, since) or evaluations.best.step == self.progress.step
            if stopping:  # what is being written is finished first: it may be all that there is time for
                self._tell_of_saves(wait=True)
            saving = self.stop.save_fits() if stopping else finished or (due and not refusals.pending)
            if saving or job.crosses(job.spec.bad_numbers.compare_ranks, self.progress.batch_index, since):
                self._compare_ranks()
            if saving:
                due = False
                beat.enter(Phase.SAVE, self.progress.step)
                self.store.save(engine, self.progress, self._remembered())
                self._tell_of_memory()
            self._tell_of_saves(wait=stopping or finished)
            if stopping:
                self.events.emit(self._stopped(saved=saving))
            if stopping or finished:
                break
            garbage.after(self.progress.step)
            self.meter.resume()
            beat.enter(Phase.READ, self.progress.step + 1)
        if not stopping:
            self._export()
        self._close()
        return not stopping

    def _batches(self, *, none: bool) -> Iterator[Batch]:
        first, end = self.progress.batch_index, self.job.total_batches
        self.meter.resume()
        self.beat.enter(Phase.READ, self.progress.step + 1)
        ahead = 2 if self.world.device.type == "cuda" else 0
        loader = BatchLoader(self.job, self.world)
        for batch in load_batches(loader, first, first if none else end, ahead=ahead, without=self.skips):
            self.meter.batch_read()
            yield batch

    def _begin_stage(self, batch: Batch) -> ResolvedStage:
        stage = self.job.stage_at(batch.index)
        self.engine.freeze(stage.freeze)
        number, tokens = self.job.stages.index(stage), self.job.consumed_tokens(batch.index)
        self.events.emit(events.StageStarted(self.progress.step, stage.name, number, stage.batches, tokens))
        return stage

    def _ask_references(self, stage: ResolvedStage) -> bool:
        """Asks the model about a preference stage's pairs, before its first step. False if a stop came first."""
        self.beat.enter(Phase.EVALUATE, self.progress.step)
        told = -math.inf

        def cancelled(source: str, sequences: int, of: int) -> bool:
            nonlocal told
            if time.monotonic() - told > _TELL_EVERY or sequences == of:
                told = time.monotonic()
                self.events.emit(events.ReferenceAsked(stage.name, source, sequences, of))
            return self._is_asked_to_stop()

        found = References.measure(self.job, stage, self.engine, self.world, answer_log_probabilities, cancelled)
        if found is None:
            self._tell_of_saves(wait=True)
            saved = self.world.from_main(self._has_checkpoint() if self.world.is_main else None)
            if not saved and self.progress.step > 0 and not self.refusals.pending and self.stop.save_fits():
                self._compare_ranks()
                self.beat.enter(Phase.SAVE, self.progress.step)
                self.store.save(self.engine, self.progress, self._remembered())
                self._tell_of_saves(wait=True)
                saved = True
            self.events.emit(self._stopped(saved=saved))
            return False
        if self.world.is_main:
            self.fence()
            found.write(self.files.references(stage.name))
        self.references = self.evaluations.held_out.references = found
        self.meter.resume()
        return True

    def _is_asked_to_stop(self) -> bool:
        """Asked between the parts of what takes long: that it goes on is seen from outside. Collective."""
        self.beat.touch()
        return self.stop.requested()

    def _has_checkpoint(self) -> bool:
        """Whether the step just done is saved."""
        newest = complete_checkpoints(self.files.checkpoints)[:1]
        return newest == [checkpoint_folder(self.files.checkpoints, self.progress.step)]

    def _record(self, batch: Batch, stage: ResolvedStage, rate: float, result: Any) -> None:
        progress, slowest = self.progress, self.busy.add(self.meter.reading + result.busy_seconds)
        speed, mfu = self.meter.step(stage)
        self.refusals.look(batch, progress.step, result)
        self.events.emit(
            events.StepFinished(
                step=progress.step,
                stage=stage.name,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                consumed_tokens=self.job.consumed_tokens(progress.batch_index),
                loss_tokens=result.loss_tokens,
                tokens_per_second=speed,
                mfu=mfu,
                attempt=self.attempt,
                batch_hash=progress.batch_hash,
                **dict(zip(("preference_accuracy", "preference_margin"), result.figures, strict=False)),
                applied=result.applied,
                slowest_rank=slowest.rank if slowest else None,
                rank_imbalance=slowest.imbalance if slowest else None,
            )
        )
        if slowest and self.busy.begins(slowest):
            self.events.emit(events.Straggler(progress.step, slowest.rank, slowest.imbalance, slowest.busy_seconds))

    def _evaluate(self, stage: ResolvedStage | None) -> None:
        self.beat.enter(Phase.EVALUATE, self.progress.step)
        self.evaluations.measure(stage, self.progress, comparable=not self.refusals.pending)

    # ---- beginning and end -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        restored = self.store.restore(self.engine)
        self.progress = self._accept(restored) if restored else Progress.start()
        begun = [stage for stage in self.job.stages if stage.dpo and stage.first_batch < self.progress.batch_index]
        self.references = References.read(self.files.references(begun[-1].name), begun[-1]) if begun else None
        self.evaluations.held_out.references = self.references
        extra = restored.extra if restored else {}
        recent = Recent.from_json(extra["recent"]) if extra else Recent()
        self.evaluations.restore(extra)
        self.refusals = Refusals(self.job.spec, recent, self.skips, self.files, self.attempt, self.world, self.events)

    def _remembered(self) -> dict[str, Any]:
        """What a checkpoint holds besides the engine and the progress."""
        return {"recent": self.refusals.recent.to_json(), **self.evaluations.remembered()}

    def _accept(self, restored: Restored) -> Progress:
        """Tells of a checkpoint that was loaded. Raises CheckpointError if it does not fit the skipped batches."""
        for folder, reason in restored.refused:
            self.events.emit(events.CheckpointRefused(folder.name, reason))
        progress, saved = restored.progress, restored.converted_from
        check_position(progress, self.skips, restored.folder.name)
        self.events.emit(
            events.Restored(
                attempt=self.attempt,
                step=progress.step,
                consumed_tokens=self.job.consumed_tokens(progress.batch_index),
                checkpoint=restored.folder.name,
                seconds=restored.seconds,
                converted=f"saved with {saved}, goes on with {self.job.layout(self.world.size)}" if saved else "",
                **(_lost(self.files, self.job, progress) if self.world.is_main else {}),
            )
        )
        return progress

    def _started(self) -> events.AttemptStarted:
        spec, on_gpu = self.job.spec.engine, self.world.device.type == "cuda"
        packages = ("ernie_dist", "torch", "transformers", "deepspeed")
        return events.AttemptStarted(
            attempt=self.attempt,
            step=self.progress.step,
            total_batches=self.job.total_batches,
            total_tokens=self.job.total_tokens,
            world_size=self.world.size,
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            engine=f"{spec.kind} {spec.ds_config}" if spec.kind == "deepspeed" else spec.kind,
            parameters=self.engine.parameters,
            trainable=self.engine.trainable if self.job.spec.model.adapter else None,
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        )

    def _compare_ranks(self) -> None:
        try:
            refuse_difference(self.engine, self.world, self.progress.step)
        except RanksDiffer:
            self._tell_of_saves(wait=True)  # the last good state is not lost
            raise

    def _tell_of_saves(self, *, wait: bool) -> None:
        if wait:
            self.beat.enter(Phase.SAVE, self.progress.step)
        for saved in self.store.finish() if wait else self.store.saved():
            self.stop.saved(saved.seconds)
            self.events.emit(
                events.CheckpointSaved(saved.step, saved.folder.name, saved.bytes, saved.seconds, saved.blocked)
            )

    def _phase_ended(self, phase: Phase, step: int, seconds: float) -> None:
        if phase.trains:
            self.peaks.ended(f"step/{self.job.stage_at(self.progress.batch_index - 1).name}")
            return
        self.peaks.ended(phase.label)
        if phase is not Phase.READ:
            self.events.emit(events.PhaseEnded(self.attempt, phase.label, step, seconds))

    def _tell_of_memory(self) -> None:
        self.events.emit(events.MemoryPeaks(self.progress.step, self.attempt, self.peaks.fullest(), self.peaks.device))

    def _stopped(self, *, saved: bool) -> events.Stopped:
        step, reason = self.progress.step, self.stop.reason()
        if saved:
            return events.Stopped(step, reason)
        newest = complete_checkpoints(self.files.checkpoints)[:1]
        kept = [Progress.from_json(read_state(one)["progress"]) for one in newest] or [Progress.start()]
        now, then = (self.job.consumed_tokens(one.batch_index) for one in (self.progress, kept[0]))
        return events.Stopped(step, reason, step - kept[0].step, now - then)

    def _export(self) -> None:
        self.beat.enter(Phase.EXPORT, self.progress.step)
        if self.world.is_main:
            self.fence()
            export_model(self.job, self._to_export(), self.files.export)
        self.world.barrier()
        tokens = self.job.consumed_tokens(self.progress.batch_index)
        self.events.emit(events.Finished(self.progress.step, tokens, str(self.files.export)))

    def _to_export(self) -> Path:
        """The best checkpoint; the newest where none is, or where that one went bad meanwhile."""
        newest, step = complete_checkpoints(self.files.checkpoints)[0], self.evaluations.best.step
        best = newest if step is None else checkpoint_folder(self.files.checkpoints, step)
        reason = verify(best) if best != newest else None
        if reason is None:
            return best
        if UNREAD in reason:
            raise CheckpointReadError(f"{best}: the best one cannot be exported: {reason}; launch again")
        self.events.emit(events.CheckpointRefused(best.name, f"{reason}; not the best but the newest is exported"))
        return newest

    def _close(self) -> None:
        self.beat.enter(Phase.CLOSE, self.progress.step)
        if self.world.is_main:
            self.events.emit(events.TimeSpent(self.progress.step, goodput.of_run(self.files, self.job)))
        self._tell_of_memory()
        self.engine.close()


def _build_engine(job: ResolvedJob, world: World) -> Engine:
    spec, engine = job.spec, job.spec.engine
    build = partial(build_model, spec.model, job.tokenizer.vocab_size, spec.seed, **layer_options(engine))
    freezes = list(dict.fromkeys(stage.freeze for stage in job.stages if stage.freeze))
    origin = {"pretrained": spec.model.from_pretrained is not None, "adapter": spec.model.adapter is not None}
    return build_engine(engine, spec.optimizer, freezes, build, summed_loss, world, **origin)


def _base(job: ResolvedJob, world: World) -> str | None:
    """What an adapter is put on, which is in no checkpoint. Collective."""
    if job.spec.model.adapter is None:
        return None
    known = base_fingerprint(job.spec.model, job.tokenizer.vocab_size, job.spec.seed) if world.is_main else None
    return world.from_main(known)


def _lost(files: RunFiles, job: ResolvedJob, progress: Progress) -> dict[str, Any]:
    """What was done after the checkpoint, and is done again."""
    steps = read_metrics(files.metrics)
    again = [step for step in steps if step["step"] > progress.step]
    if not again:
        return {}
    since = max((step["time"] for step in steps if step["step"] == progress.step), default=again[0]["time"])
    tokens = again[-1]["consumed_tokens"] - job.consumed_tokens(progress.batch_index)
    return {"lost_steps": len(again), "lost_tokens": tokens, "lost_seconds": again[-1]["time"] - since}

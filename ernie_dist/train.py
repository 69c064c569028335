"""Composition root and training loop."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch

from ernie_dist.checkpoint import CheckpointStore
from ernie_dist.data.loader import BatchLoader, load_batches
from ernie_dist.engine.base import Engine, StepResult
from ernie_dist.engine.replicas import refuse_difference
from ernie_dist.engine.select import build_engine
from ernie_dist.evaluate.held_out import HeldOut
from ernie_dist.events.console import ConsoleSink
from ernie_dist.events.event import (
    AttemptStarted,
    CheckpointRefused,
    CheckpointSaved,
    Evaluated,
    EventBus,
    Finished,
    Restored,
    StageStarted,
    StepFinished,
    Stopped,
)
from ernie_dist.events.sinks import build_sinks
from ernie_dist.export.transformers_folder import export_model
from ernie_dist.guard import Recent
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.progress import Progress
from ernie_dist.rewind import Refusals, check_position
from ernie_dist.schedule import learning_rate
from ernie_dist.spec.errors import EnvironmentProblem
from ernie_dist.spec.hardware import peak_flops
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.run_files import RunFiles, complete_checkpoints
from ernie_dist.spec.shape import ModelShape
from ernie_dist.spec.skips import Skips
from ernie_dist.stop import StopRequest
from ernie_dist.world import World


def train(run_dir: Path, attempt: int, world: World, console: IO[str]) -> bool:
    """Runs or goes on with the job of a run directory. True when it is finished, False when it stopped on request."""
    files = RunFiles(run_dir)
    job = ResolvedJob.read(files.job)
    stop = StopRequest(files.stop, world)
    engine = _build_engine(job, world)
    store = CheckpointStore(files.checkpoints, job, world)
    _refuse_full_disk(files, job, engine)
    # The rank's own log is where `ernie logs` looks, also once the terminal is gone.
    events = EventBus([*build_sinks(job, files, console), ConsoleSink(sys.stdout)] if world.is_main else [])
    skips = Skips.read(files.skipped_batches)
    progress, recent = _restore(store, engine, job, skips, attempt, events)
    events.emit(_attempt_started(job, attempt, progress, engine, world))
    refusals = Refusals(job.spec, recent, skips, files, attempt, world, events)
    held_out, meter = HeldOut(job, world), _Meter(job, engine, world)
    if progress.batch_index == 0:
        _evaluate(engine, held_out, job, progress, "start", events, at_stage_end=True)
        meter.resume()
    elif ended := _ended_by_skipping(job, skips, progress):
        _evaluate(engine, held_out, job, progress, ended.name, events, at_stage_end=True)

    stage, due, stopping = None, False, False
    batches = partial(load_batches, ahead=2 if world.device.type == "cuda" else 0, without=skips)
    for batch in batches(BatchLoader(job, world), progress.batch_index, job.total_batches):
        since, progress = progress.batch_index, progress.skipping_to(batch.index)
        if stage is None or batch.index >= stage.end_batch:
            stage = job.stage_at(batch.index)
            engine.freeze(stage.freeze)
            events.emit(_stage_started(job, stage, progress))
        rate = learning_rate(job, progress)
        result = engine.step(batch, rate, accepts=refusals.accepts(stage.name), flag=stop.pending)
        progress = progress.after(batch.sequence_ids)
        refusals.look(batch, progress.step, result)
        events.emit(_step_finished(job, stage, progress, rate, result, meter, attempt))
        if refusals.too_many:
            refusals.go_back()
        upcoming = skips.next(progress.batch_index)
        ended, finished = upcoming >= stage.end_batch, upcoming == job.total_batches
        every = job.spec.evaluate.every
        if ended or (every and job.crosses(every, progress.batch_index, since)):
            _evaluate(engine, held_out, job, progress, stage.name, events, at_stage_end=ended)
        # Updates refused in a row may end in going back: until they end nothing is saved, and a stop waits.
        due = due or store.due(progress, since)
        stopping = result.flagged and not finished and not refusals.pending
        saving = stopping or finished or (due and not refusals.pending)
        if saving or job.crosses(job.spec.bad_numbers.compare_ranks, progress.batch_index, since):
            refuse_difference(engine, world, progress.step)
        if saving:
            due, saved = False, store.save(engine, progress, {"recent": refusals.recent.to_json()})
            events.emit(CheckpointSaved(progress.step, saved.folder.name, saved.bytes, saved.seconds))
        if stopping:
            events.emit(Stopped(progress.step, stop.reason()))
            break
        meter.resume()
    if not stopping:
        if world.is_main:
            export_model(job, complete_checkpoints(files.checkpoints)[0], files.export)
        world.barrier()
        events.emit(Finished(progress.step, job.consumed_tokens(progress.batch_index), str(files.export)))
    events.close()
    engine.close()
    return not stopping


def _build_engine(job: ResolvedJob, world: World) -> Engine:
    spec = job.spec
    build = partial(build_model, spec.model, job.tokenizer.vocab_size, spec.seed, spec.engine.gradient_checkpointing)
    freezes = list(dict.fromkeys(stage.freeze for stage in job.stages if stage.freeze))
    pretrained = spec.model.from_pretrained is not None
    return build_engine(spec.engine, spec.optimizer, freezes, build, summed_loss, world, pretrained=pretrained)


def _restore(
    store: CheckpointStore, engine: Engine, job: ResolvedJob, skips: Skips, attempt: int, events: EventBus
) -> tuple[Progress, Recent]:
    restored = store.restore(engine)
    if restored is None:
        return Progress.start(), Recent()
    for folder, reason in restored.refused:
        events.emit(CheckpointRefused(folder.name, reason))
    progress = restored.progress
    check_position(progress, skips, restored.folder.name)
    tokens = job.consumed_tokens(progress.batch_index)
    events.emit(Restored(attempt, progress.step, tokens, restored.folder.name, restored.seconds))
    recent = restored.extra.get("recent")
    return progress, Recent.from_json(recent) if recent else Recent()


def _ended_by_skipping(job: ResolvedJob, skips: Skips, progress: Progress) -> ResolvedStage | None:
    """The stage whose last batches, all that were left of it at `progress`, are skipped."""
    last = job.stage_at(progress.batch_index - 1)
    return last if progress.batch_index < last.end_batch <= skips.next(progress.batch_index) else None


def _evaluate(
    engine: Engine,
    held_out: HeldOut,
    job: ResolvedJob,
    progress: Progress,
    stage: str,
    events: EventBus,
    *,
    at_stage_end: bool,
) -> None:
    for measured in held_out.losses(engine):
        events.emit(
            Evaluated(
                step=progress.step,
                stage=stage,
                source=measured.source,
                loss=measured.loss,
                tokens=measured.tokens,
                consumed_tokens=job.consumed_tokens(progress.batch_index),
                at_stage_end=at_stage_end,
            )
        )


def _refuse_full_disk(files: RunFiles, job: ResolvedJob, engine: Engine) -> None:
    """A run that cannot write its checkpoints had better not begin."""
    size = 16 * engine.parameters  # fp32 weights and masters, two moments
    present = len(complete_checkpoints(files.checkpoints))
    needed = size * max(1, job.spec.checkpoint.keep_last + 1 - present)
    free = shutil.disk_usage(files.root).free
    if free < needed:
        raise EnvironmentProblem(
            f"{files.root}: {free:,} bytes are free, checkpoints of {size:,} bytes need {needed:,} "
            f"(keep_last {job.spec.checkpoint.keep_last}, and one being written); free space or lower "
            "checkpoint.keep_last"
        )


def _stage_started(job: ResolvedJob, stage: ResolvedStage, progress: Progress) -> StageStarted:
    number = job.stages.index(stage)
    return StageStarted(progress.step, stage.name, number, stage.batches, job.consumed_tokens(progress.batch_index))


def _step_finished(
    job: ResolvedJob,
    stage: ResolvedStage,
    progress: Progress,
    rate: float,
    result: StepResult,
    meter: _Meter,
    attempt: int,
) -> StepFinished:
    speed, mfu = meter.step(stage)
    return StepFinished(
        step=progress.step,
        stage=stage.name,
        loss=result.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        consumed_tokens=job.consumed_tokens(progress.batch_index),
        loss_tokens=result.loss_tokens,
        tokens_per_second=speed,
        mfu=mfu,
        attempt=attempt,
        batch_hash=progress.batch_hash,
        applied=result.applied,
    )


def _attempt_started(
    job: ResolvedJob, attempt: int, progress: Progress, engine: Engine, world: World
) -> AttemptStarted:
    on_gpu = world.device.type == "cuda"
    packages = ("ernie_dist", "torch", "transformers", "deepspeed")
    return AttemptStarted(
        attempt=attempt,
        step=progress.step,
        total_batches=job.total_batches,
        total_tokens=job.total_tokens,
        world_size=world.size,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        engine=job.spec.engine.kind + (f" {job.spec.engine.ds_config}" if job.spec.engine.kind == "deepspeed" else ""),
        parameters=engine.parameters,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
    )


class _Meter:
    """Speed of the steps alone: saving and evaluating stop the clock."""

    def __init__(self, job: ResolvedJob, engine: Engine, world: World) -> None:
        self._shape = ModelShape.from_config(engine.config)
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self._peak = peak * world.size if peak else None
        self._since = time.perf_counter()

    def step(self, stage: ResolvedStage) -> tuple[float, float | None]:
        """(token positions per second, model FLOPs utilisation) of the step that has just ended."""
        speed = stage.tokens_per_batch / (time.perf_counter() - self._since)
        flops = speed * self._shape.flops_per_token(stage.sequence_length)
        return speed, flops / self._peak if self._peak else None

    def resume(self) -> None:
        self._since = time.perf_counter()

"""Composition root and training loop."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from ernie_dist.checkpoint import CheckpointStore
from ernie_dist.data.loader import BatchLoader, load_batches
from ernie_dist.engine.base import Engine, StepResult
from ernie_dist.engine.select import build_engine
from ernie_dist.evaluate.held_out import HeldOut
from ernie_dist.events import goodput
from ernie_dist.events.console import ConsoleSink
from ernie_dist.events.event import (
    AttemptStarted,
    CheckpointRefused,
    CheckpointSaved,
    Evaluated,
    EventBus,
    Finished,
    PhaseEnded,
    Restored,
    StageStarted,
    StepFinished,
    Stopped,
    Straggler,
    TimeSpent,
)
from ernie_dist.events.history import read_metrics
from ernie_dist.events.sinks import build_sinks
from ernie_dist.export.transformers_folder import export_model
from ernie_dist.heartbeat import Heartbeat, Phase
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.progress import Progress
from ernie_dist.schedule import learning_rate
from ernie_dist.spec.errors import EnvironmentProblem
from ernie_dist.spec.hardware import peak_flops
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.run_files import RunFiles, complete_checkpoints
from ernie_dist.spec.shape import ModelShape
from ernie_dist.stop import StopRequest
from ernie_dist.straggler import BusyTimes, Slowest
from ernie_dist.world import World


def train(run_dir: Path, attempt: int, world: World, console: IO[str], heartbeat: Heartbeat | None = None) -> bool:
    """Runs or goes on with the job of a run directory. True when it is finished, False when it stopped on request."""
    files, beat = RunFiles(run_dir), heartbeat or Heartbeat()
    job = ResolvedJob.read(files.job)
    stop = StopRequest(files.stop, world)
    engine = _build_engine(job, world)
    store = CheckpointStore(files.checkpoints, job, world)
    _refuse_full_disk(files, job, engine)
    # The rank's own log is where `ernie logs` looks, also once the terminal is gone.
    events = EventBus([*build_sinks(job, files, console), ConsoleSink(sys.stdout)] if world.is_main else [])
    beat.on_end = lambda phase, step, seconds: events.emit(PhaseEnded(attempt, phase.label, step, seconds))
    progress = _restore(store, engine, files, world, attempt, events)
    events.emit(_attempt_started(job, attempt, progress, engine, world))
    held_out, meter = HeldOut(job, world), _Meter(job, engine, world)
    busy = BusyTimes(world, job.spec.watchdog.straggler)
    if progress.batch_index == 0:
        beat.enter(Phase.EVALUATE, 0)
        _evaluate(engine, held_out, job, progress, "start", events)
        meter.resume()

    stage, stopping = None, False
    ahead = 2 if world.device.type == "cuda" else 0
    beat.enter(Phase.READ, progress.step + 1)
    for batch in load_batches(BatchLoader(job, world), progress.batch_index, job.total_batches, ahead=ahead):
        reading = meter.seconds()
        beat.enter(Phase.FIRST_STEP if stage is None else Phase.STEP, progress.step + 1)
        if stage is None or batch.index == stage.end_batch:
            stage = job.stage_at(batch.index)
            engine.freeze(stage.freeze)
            events.emit(_stage_started(job, stage, progress))
        rate = learning_rate(job, progress)
        result = engine.step(batch, rate, flag=stop.pending)
        progress = progress.after(batch.sequence_ids)
        slowest = busy.add(reading + result.busy_seconds)
        events.emit(_step_finished(job, stage, progress, rate, result, meter, attempt, slowest))
        if slowest and busy.begins(slowest):
            events.emit(Straggler(progress.step, slowest.rank, slowest.imbalance, slowest.busy_seconds))
        every = job.spec.evaluate.every
        if job.is_stage_end(progress.batch_index) or (every and job.crosses(every, progress.batch_index)):
            beat.enter(Phase.EVALUATE, progress.step)
            _evaluate(engine, held_out, job, progress, stage.name, events)
        finished = progress.batch_index == job.total_batches
        stopping = result.flagged and not finished
        if stopping or finished or store.due(progress):
            beat.enter(Phase.SAVE, progress.step)
            store.save(engine, progress)
        for saved in store.finish() if stopping or finished else store.saved():
            events.emit(CheckpointSaved(saved.step, saved.folder.name, saved.bytes, saved.seconds, saved.blocked))
        if stopping:
            events.emit(Stopped(progress.step, stop.reason()))
            break
        meter.resume()
        beat.enter(Phase.READ, progress.step + 1)
    if not stopping:
        beat.enter(Phase.EXPORT, progress.step)
        if world.is_main:
            export_model(job, complete_checkpoints(files.checkpoints)[0], files.export)
        world.barrier()
        events.emit(Finished(progress.step, job.consumed_tokens(progress.batch_index), str(files.export)))
    beat.enter(Phase.CLOSE, progress.step)
    _close(engine, files, job, progress, events, is_main=world.is_main)
    return not stopping


def _close(
    engine: Engine, files: RunFiles, job: ResolvedJob, progress: Progress, events: EventBus, *, is_main: bool
) -> None:
    if is_main:
        events.emit(TimeSpent(progress.step, goodput.of_run(files, job)))
    events.close()
    engine.close()


def _build_engine(job: ResolvedJob, world: World) -> Engine:
    spec = job.spec
    build = partial(build_model, spec.model, job.tokenizer.vocab_size, spec.seed, spec.engine.gradient_checkpointing)
    freezes = list(dict.fromkeys(stage.freeze for stage in job.stages if stage.freeze))
    pretrained = spec.model.from_pretrained is not None
    return build_engine(spec.engine, spec.optimizer, freezes, build, summed_loss, world, pretrained=pretrained)


def _restore(
    store: CheckpointStore, engine: Engine, files: RunFiles, world: World, attempt: int, events: EventBus
) -> Progress:
    restored, job = store.restore(engine), store.job
    if restored is None:
        return Progress.start()
    for folder, reason in restored.refused:
        events.emit(CheckpointRefused(folder.name, reason))
    progress, saved = restored.progress, restored.converted_from
    events.emit(
        Restored(
            attempt=attempt,
            step=progress.step,
            consumed_tokens=job.consumed_tokens(progress.batch_index),
            checkpoint=restored.folder.name,
            seconds=restored.seconds,
            converted=f"saved with {saved}, goes on with {job.layout(world.size)}" if saved else "",
            **_lost(files, job, progress),
        )
    )
    return progress


def _lost(files: RunFiles, job: ResolvedJob, progress: Progress) -> dict[str, Any]:
    """What was done after the checkpoint, and is done again."""
    steps = read_metrics(files.metrics)
    again = [step for step in steps if step["step"] > progress.step]
    if not again:
        return {"lost_steps": 0, "lost_tokens": 0, "lost_seconds": 0.0}
    since = max((step["time"] for step in steps if step["step"] == progress.step), default=again[0]["time"])
    tokens = again[-1]["consumed_tokens"] - job.consumed_tokens(progress.batch_index)
    return {"lost_steps": len(again), "lost_tokens": tokens, "lost_seconds": again[-1]["time"] - since}


def _evaluate(
    engine: Engine, held_out: HeldOut, job: ResolvedJob, progress: Progress, stage: str, events: EventBus
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
                at_stage_end=progress.batch_index == 0 or job.is_stage_end(progress.batch_index),
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
    slowest: Slowest | None,
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
        slowest_rank=slowest.rank if slowest else None,
        rank_imbalance=slowest.imbalance if slowest else None,
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
        speed = stage.tokens_per_batch / self.seconds()
        flops = speed * self._shape.flops_per_token(stage.sequence_length)
        return speed, flops / self._peak if self._peak else None

    def seconds(self) -> float:
        """Since the step before ended."""
        return time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

"""Which sinks a job asks for."""

from __future__ import annotations

from typing import IO

from ernie_dist.events.aside import Aside
from ernie_dist.events.console import ConsoleSink
from ernie_dist.events.event import Sink
from ernie_dist.events.jsonl import JsonlSink
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles


def build_sinks(job: ResolvedJob, files: RunFiles, stream: IO[str]) -> list[Sink]:
    """The record and the console always; TensorBoard and W&B where `track` says so. On rank 0 only."""
    track = job.spec.track
    sinks: list[Sink] = [JsonlSink(files), ConsoleSink(stream)]
    if track.tensorboard:
        from ernie_dist.events.tensorboard import TensorboardSink

        sinks.append(Aside(TensorboardSink(files.tensorboard)))
    if track.wandb is not None:
        from ernie_dist.events.wandb import WandbSink

        config = job.model_dump(mode="json")
        sinks.append(WandbSink(track.wandb, files.wandb, config, track.wandb.name or job.spec.name))
    return sinks

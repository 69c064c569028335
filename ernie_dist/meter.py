"""Speed of the steps alone: saving and evaluating stop the clock."""

from __future__ import annotations

import time

import torch

from ernie_dist.engine.base import Engine
from ernie_dist.spec.hardware import peak_flops
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.shape import ModelShape
from ernie_dist.world import World


class Meter:
    """Token positions per second and model FLOPs utilisation, from one step's end to the next one's."""

    def __init__(self, job: ResolvedJob, engine: Engine, world: World) -> None:
        self._shape, self._adapter = ModelShape.from_config(engine.config), job.spec.model.adapter
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self._peak = peak * world.size if peak else None
        self._since = time.perf_counter()
        self.reading = 0.0
        """seconds until the batch of this step was there"""

    def resume(self) -> None:
        """A step begins, with reading its batch."""
        self._since = time.perf_counter()

    def batch_read(self) -> None:
        self.reading = time.perf_counter() - self._since

    def step(self, stage: ResolvedStage) -> tuple[float, float | None]:
        """(token positions per second, model FLOPs utilisation) of the step that has just ended."""
        speed = stage.tokens_per_batch / (time.perf_counter() - self._since)
        flops = speed * self._shape.flops_per_token(stage.sequence_length, adapter=self._adapter)
        return speed, flops / self._peak if self._peak else None

"""EngineSpec -> an engine. DeepSpeed is imported only by those who use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.utils.deterministic
from torch import nn
from transformers import PreTrainedModel

from ernie_dist.batch import MicroBatch
from ernie_dist.engine.base import Engine
from ernie_dist.spec.errors import CheckpointError, SpecError
from ernie_dist.spec.training import EngineSpec, OptimizerSpec
from ernie_dist.world import World


def build_engine(
    spec: EngineSpec,
    optimizer: OptimizerSpec,
    freezes: Sequence[Sequence[str]],
    build: Callable[[], PreTrainedModel],
    loss: Callable[[nn.Module, MicroBatch], torch.Tensor],
    world: World,
    *,
    pretrained: bool = False,
    adapter: bool = False,
) -> Engine:
    """`freezes`: every list of patterns that `Engine.freeze` will be called with; `pretrained`: build reads weights;
    `adapter`: all that does not require gradients is what build makes of it, and no part of a snapshot."""
    precision = spec.precision
    if precision == "auto":
        on_ampere = world.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16" if on_ampere else "fp32"
    make: Callable[..., Engine]
    if precision == "fp16" and world.device.type == "cpu":
        raise SpecError('engine.precision = "fp16": needs a GPU; use auto, bf16 or fp32 on CPU ranks')
    if spec.kind == "plain":
        from ernie_dist.engine.plain import PlainEngine as make
    else:
        from ernie_dist.engine.deepspeed import DeepSpeedEngine as make
    _settle_determinism(spec.deterministic)
    return make(
        spec, optimizer, freezes, build, loss, world, precision=precision, pretrained=pretrained, adapter=adapter
    )


def _settle_determinism(wanted: bool) -> None:
    """Of all of torch: flash attention's backward pass, for one, adds up as its thread blocks happen to come."""
    if wanted == torch.are_deterministic_algorithms_enabled():
        return  # to say it again would load the settings of torch's compiler
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses matrix products without it
        torch.utils.deterministic.fill_uninitialized_memory = False  # a tool for debugging, at the price of a write
    torch.use_deterministic_algorithms(wanted)


def read_weights(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Whole weights out of an engine's checkpoint folder, on one process and without a GPU."""
    if kind == "plain":
        from ernie_dist.engine import plain

        return plain.read_weights(folder)
    from ernie_dist.engine import deepspeed

    return deepspeed.read_weights(folder)


def convert(kind: str, folder: Path, to: Path) -> None:
    """Makes of a snapshot's files those that fit any number of ranks and any ZeRO stage, on one process."""
    if kind != "deepspeed":
        raise CheckpointError(f"{folder}: only DeepSpeed's checkpoints can be converted")
    from ernie_dist.engine import deepspeed

    deepspeed.convert(folder, to)


def refuse_code(folder: Path) -> None:
    """Raises CheckpointError if a converted folder, which DeepSpeed reads by itself, holds more than data."""
    from ernie_dist.engine import deepspeed

    deepspeed.refuse_code(folder)

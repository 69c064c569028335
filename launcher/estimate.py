"""What a job will take besides memory, in numbers, before a GPU is touched: bytes over the wire, time, power, files.

JobSpec, ModelShape, Cluster --formulas--> Traffic, Pace, Saves
Where a number is assumed it has a name, and `ernie plan` prints it; a measured Speed takes the place of two of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import CPU, DEVICES, Device, cpu
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.problems import suggest
from ernie_dist.spec.shape import ModelShape, config_values
from launcher.memory import Policy, recomputed, trained_parameters

ASSUMED_MFU = 0.40
"""of the peak, full-attention convention: what good trainers reach; measure your own"""
ASSUMED_LINK_SHARE = 0.7
"""of a link's data-sheet speed that long messages reach"""
ASSUMED_HIDDEN = 0.9
"""of what the wire takes while the GPU has work, if communication may overlap"""
ASSUMED_COPY = 10e9
"""bytes/s from a GPU to pinned host memory; a save stops the steps only for this copy"""
GPUS_PER_NODE = 8


def shape_of(job: JobSpec) -> ModelShape | None:
    """The model's sizes; None for pretrained weights not seen before. A vocab_size of 0 is the tokenizer's to say."""
    values = config_values(job.model, None if isinstance(job.tokenizer, str) else job.tokenizer.train.vocab_size)
    return ModelShape.from_config(values) if values else None


@dataclass(frozen=True)
class Cluster:
    """Devices a plan is made for."""

    count: int
    name: str
    device: Device

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Reads "4xA100-80G". Raises SpecError with the known names."""
        match = re.fullmatch(r"(\d+)x(.+)", text)
        known = [*DEVICES, CPU]
        if not match or match[2] not in known or int(match[1]) < 1:
            raise SpecError(f'--gpus "{text}": needs a number and a device, e.g. 4xA100-80G; {suggest(text, known)}')
        return cls.of(int(match[1]), match[2])

    @classmethod
    def of(cls, count: int, name: str) -> Cluster:
        """`name` as in hardware.DEVICES, or CPU."""
        return cls(count, name, cpu(count) if name == CPU else DEVICES[name])

    @property
    def nodes(self) -> int:
        return 1 if self.device.cpu else -(-self.count // GPUS_PER_NODE)

    @property
    def link(self) -> float:
        """Bytes/s that each device sends around a ring through all of them: its slowest piece decides."""
        return ASSUMED_LINK_SHARE * (self.device.link if self.nodes == 1 else self.device.network)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step, by ring algorithms (Patarasuk and Yuan 2009)."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def estimate_traffic(
    job: JobSpec, stage: StageSpec, shape: ModelShape, ranks: int, device: Device | None = None
) -> Traffic:
    """What DeepSpeed 0.19 sends, counted on real ranks by `python -m benchmarks.communication`.

    ZeRO 1 and 2 reduce gradients by all-reduce, not by the reduce-scatter of Rajbhandari et al. 2020: 3 sizes of the
    model in a step, not 2. ZeRO 2 does it after every micro-batch. ZeRO 3 gathers weights once for a micro-batch, or,
    if they may not all stay, for every use: forward, recomputed forward and backward, tied embeddings as head as well.
    """
    policy = Policy.of(job, device)
    around = (ranks - 1) / ranks * policy.width
    trained = around * trained_parameters(job, shape)
    whole = around * (shape.parameters + (trained_parameters(job, shape) if job.model.adapter else 0))
    accumulation = job.batch_plan(stage, ranks).gradient_accumulation_steps
    if policy.zero == 3:
        gathered = whole
        if shape.parameters > policy.live:
            tied = shape.vocab_size * shape.hidden_size if shape.tied else 0
            # The last matrix of a layer is not given back between its recomputed forward and its backward.
            kept = shape.layers * shape.hidden_size * shape.mlp_width
            again = recomputed(job, shape) / shape.layers * (shape.layer_weights - kept)
            gathered = 2 * whole + around * (2 * tied + again)
        return Traffic(gradients=accumulation * trained, weights=accumulation * gathered)
    reductions = accumulation if policy.zero == 2 else 1
    return Traffic(gradients=2 * reductions * trained, weights=trained if policy.zero else 0.0)


@dataclass(frozen=True)
class Speed:
    """What one rank was measured to do, on a job of its own (launcher.calibrate)."""

    flops: float
    """FLOP/s in forward and backward, by work_per_token"""
    update: float
    """seconds for each weight that this rank updates"""
    ranks: int
    """that were measured together: with several, what they send each other is in these figures"""


@dataclass(frozen=True)
class Pace:
    """How fast one stage goes."""

    tokens_per_second: float
    waiting: float
    """share of a step that waits for the wire"""


def work_per_token(job: JobSpec, stage: StageSpec, shape: ModelShape) -> float:
    """FLOPs of a token with all that is computed once more, which model FLOPs leave out: recomputed layers, MLPs in
    tiles, and the head where answers are compared."""
    head = 2.0 * shape.vocab_size * shape.hidden_size
    layers = 2.0 * shape.active_parameters - head + 4.0 * shape.layers * shape.attention_width * stage.sequence_length
    again = recomputed(job, shape) / shape.layers * layers
    again += 6.0 * shape.layers * shape.hidden_size * shape.mlp_width if job.engine.mlp_tiles > 1 else 0.0
    again += head if stage.dpo is not None else 0.0
    return shape.flops_per_token(stage.sequence_length, adapter=job.model.adapter) + again


def estimate_pace(
    job: JobSpec, stage: StageSpec, shape: ModelShape, cluster: Cluster, speed: Speed | None = None
) -> Pace:
    """Compute at the measured speed, or at ASSUMED_MFU of the peak; beside it the wire, of which ASSUMED_HIDDEN is
    hidden at best."""
    tokens = stage.tokens_per_batch or job.tokens_per_batch
    flops = work_per_token(job, stage, shape)
    policy = Policy.of(job, cluster.device)
    rate = speed.flops if speed else ASSUMED_MFU * cluster.device.peak_flops
    computing = tokens * flops / (rate * cluster.count)
    if speed:
        computing += speed.update * trained_parameters(job, shape) / (cluster.count if policy.zero else 1)
    wire = estimate_traffic(job, stage, shape, cluster.count, cluster.device).total / cluster.link
    if speed and speed.ranks > 1:
        wire = 0.0
    hidden = ASSUMED_HIDDEN * min(wire, computing) if policy.overlaps else 0.0
    seconds = computing + wire - hidden
    return Pace(tokens / seconds, (wire - hidden) / seconds)


@dataclass(frozen=True)
class Saves:
    """Checkpoints and failures."""

    size: float
    """bytes of one checkpoint, all ranks together"""
    stop: float
    """seconds that steps stand still for a save"""
    between_failures: float
    """seconds, of the whole cluster"""
    every: float
    """seconds from save to save that lose least, sqrt(2 x stop x between_failures) (Young 1974; Daly 2006)"""


def estimate_saves(job: JobSpec, shape: ModelShape, cluster: Cluster, node_lifetime: float) -> Saves:
    """`node_lifetime`: mean time between failures of one node, in seconds."""
    states = 12 if job.engine.precision == "fp32" else 14  # weights and two moments; half-precision weights beside them
    size = float(states * trained_parameters(job, shape))
    stop = size / (cluster.count if Policy.of(job).zero else 1) / ASSUMED_COPY
    between = node_lifetime / cluster.nodes
    return Saves(size, stop, between, math.sqrt(2 * stop * between))

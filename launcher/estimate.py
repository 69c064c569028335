"""What a job will take, in numbers, before a GPU is touched: memory, bytes over the wire, time, power, files.

JobSpec, ModelShape, Cluster --formulas--> Memory, Traffic, Pace, Saves
Nothing here is measured; where a number is assumed it has a name, and `ernie plan` prints it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.ds_config import offloads, read_ds_config, zero_stage
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import DEVICES, Device
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.problems import suggest
from ernie_dist.spec.shape import ModelShape

ASSUMED_MFU = 0.40
"""of the peak, full-attention convention: what good trainers reach; measure your own"""
ASSUMED_LINK_SHARE = 0.7
"""of a link's data-sheet speed that long messages reach"""
ASSUMED_HIDDEN = 0.9
"""of what the wire takes while the GPU has work, if communication may overlap"""
ASSUMED_COPY = 10e9
"""bytes/s from a GPU to pinned host memory; a save stops the steps only for this copy"""
GPUS_PER_NODE = 8

_NF4 = 0.52
"""bytes per weight: 4 bits, and a twice quantised scale for every 64 weights (arXiv:2305.14314)"""


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
        if not match or match[2] not in DEVICES or int(match[1]) < 1:
            raise SpecError(f'--gpus "{text}": needs a number and a device, e.g. 4xA100-80G; {suggest(text, DEVICES)}')
        return cls(int(match[1]), match[2], DEVICES[match[2]])

    @property
    def nodes(self) -> int:
        return -(-self.count // GPUS_PER_NODE)

    @property
    def link(self) -> float:
        """Bytes/s that each device sends around a ring through all of them: its slowest piece decides."""
        return ASSUMED_LINK_SHARE * (self.device.link if self.nodes == 1 else self.device.network)


@dataclass(frozen=True)
class Policy:
    """How the job's engine spreads a model over ranks."""

    zero: int
    offloaded: bool
    overlaps: bool
    live: float
    """weights that ZeRO 3 keeps gathered between uses"""
    width: int
    """bytes of a weight in forward and backward, and of a gradient on the wire"""

    @classmethod
    def of(cls, job: JobSpec) -> Policy:
        width = 4 if job.engine.precision == "fp32" else 2
        if job.engine.kind == "plain":
            return cls(0, offloaded=False, overlaps=False, live=0, width=width)
        config = read_ds_config(job.engine.ds_config)
        zero = config["zero_optimization"]
        overlaps = bool(zero.get("overlap_comm", zero["stage"] == 3))
        live = zero.get("stage3_max_live_parameters", 1e9)
        return cls(zero_stage(config), offloads(config), overlaps, live, width)


@dataclass(frozen=True)
class Memory:
    """Bytes per rank at the fullest moment of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(job: JobSpec, stage: StageSpec, shape: ModelShape, ranks: int) -> Memory:
    """Per-rank memory of one stage. Mixed-precision states after Rajbhandari et al. 2020 (arXiv:1910.02054), layer
    activations after Korthikanti et al. 2022 (arXiv:2205.05198) with flash attention."""
    half = job.engine.precision != "fp32"
    policy = Policy.of(job)
    adapter, width = job.model.adapter, policy.width
    trained = trained_parameters(job, shape)
    frozen = shape.parameters if adapter else 0
    frozen_width = width if adapter is None or adapter.quantize == "none" else _NF4
    gathered = width * min(policy.live, shape.parameters) if policy.zero == 3 else 0
    micro = job.batch_plan(stage, ranks).micro_batch_size * stage.sequence_length
    layer = 17 * width * micro * shape.hidden_size
    kept = 1 - _recomputed(job)
    boundary = width * micro * shape.hidden_size
    return Memory(
        weights=(width * trained + frozen_width * frozen) / (ranks if policy.zero == 3 else 1) + gathered,
        gradients=4 * trained / (ranks if policy.zero >= 2 else 1),
        optimizer=0 if policy.offloaded else (12 if half else 8) * trained / (ranks if policy.zero >= 1 else 1),
        activations=shape.layers * (kept * layer + (1 - kept) * boundary) + layer,
        logits=(width + 8) * micro * shape.vocab_size,
    )


def _recomputed(job: JobSpec) -> float:
    """Share of the layers."""
    every = job.engine.gradient_checkpointing
    return 0.0 if every == "none" else 1.0 if every == "full" else 1 / int(every)


def trained_parameters(job: JobSpec, shape: ModelShape) -> int:
    return shape.adapter_parameters(job.model.adapter) if job.model.adapter else shape.parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one optimizer step, by ring algorithms (Patarasuk and Yuan 2009)."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def estimate_traffic(job: JobSpec, stage: StageSpec, shape: ModelShape, ranks: int) -> Traffic:
    """What DeepSpeed 0.19 sends, counted on real ranks by `python -m benchmarks.communication`.

    ZeRO 1 and 2 reduce gradients by all-reduce, not by the reduce-scatter of Rajbhandari et al. 2020: 3 sizes of the
    model in a step, not 2. ZeRO 2 does it after every micro-batch. ZeRO 3 gathers weights once for a micro-batch, or,
    if they may not all stay, for every use: forward, recomputed forward and backward, tied embeddings as head as well.
    """
    policy = Policy.of(job)
    around = (ranks - 1) / ranks * policy.width
    trained = around * trained_parameters(job, shape)
    whole = around * (shape.parameters + (trained_parameters(job, shape) if job.model.adapter else 0))
    accumulation = job.batch_plan(stage, ranks).gradient_accumulation_steps
    if policy.zero == 3:
        gathered = whole
        if shape.parameters > policy.live:
            tied = shape.vocab_size * shape.hidden_size if shape.tied else 0
            # The last matrix of a layer is not given back between its recomputed forward and its backward.
            again = _recomputed(job) * (shape.layer_weights - shape.layers * shape.hidden_size * shape.mlp_width)
            gathered = 2 * whole + around * (2 * tied + again)
        return Traffic(gradients=accumulation * trained, weights=accumulation * gathered)
    reductions = accumulation if policy.zero == 2 else 1
    return Traffic(gradients=2 * reductions * trained, weights=trained if policy.zero else 0.0)


@dataclass(frozen=True)
class Pace:
    """How fast one stage goes."""

    tokens_per_second: float
    waiting: float
    """share of a step that waits for the wire"""


def estimate_pace(job: JobSpec, stage: StageSpec, shape: ModelShape, cluster: Cluster) -> Pace:
    """Compute at ASSUMED_MFU of the peak; beside it the wire, of which ASSUMED_HIDDEN is hidden at best."""
    tokens = stage.tokens_per_batch or job.tokens_per_batch
    flops = shape.flops_per_token(stage.sequence_length, adapter=job.model.adapter)
    computing = tokens * flops / (ASSUMED_MFU * cluster.count * cluster.device.peak_flops)
    wire = estimate_traffic(job, stage, shape, cluster.count).total / cluster.link
    hidden = ASSUMED_HIDDEN * min(wire, computing) if Policy.of(job).overlaps else 0.0
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

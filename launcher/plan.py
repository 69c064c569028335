"""Stages, steps, micro-batches, memory and time, before a GPU is touched.

Memory and time are estimates from formulas, and printed as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.ds_config import offloads, read_ds_config, zero_stage
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import DEVICES, Device
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.problems import suggest
from ernie_dist.spec.resolve import PackedLength, passes, stage_batches
from ernie_dist.spec.shape import ModelShape, config_values

ASSUMED_MFU = 0.40
"""of the peak, full-attention convention: what good trainers reach; measure your own"""

_NF4 = 0.52
"""bytes per weight: 4 bits, and a twice quantised scale for every 64 weights (arXiv:2305.14314)"""

Facts = Mapping[str, Mapping[int, PackedLength]]
"""source -> sequence length -> what prepared data holds"""


@dataclass(frozen=True)
class Cluster:
    """Devices a plan is made for."""

    count: int
    name: str
    device: Device | None

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Reads "4xA100-80G". Raises SpecError with the known names."""
        match = re.fullmatch(r"(\d+)x(.+)", text)
        if not match or match[2] not in DEVICES or int(match[1]) < 1:
            raise SpecError(f'--gpus "{text}": needs a number and a device, e.g. 4xA100-80G; {suggest(text, DEVICES)}')
        return cls(int(match[1]), match[2], DEVICES[match[2]])


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
    if job.engine.kind == "plain":
        zero, offloaded = 0, False
    else:
        policy = read_ds_config(job.engine.ds_config)
        zero, offloaded = zero_stage(policy), offloads(policy)
    adapter, width = job.model.adapter, 2 if half else 4
    trained = shape.adapter_parameters(adapter) if adapter else shape.parameters
    frozen = shape.parameters if adapter else 0
    frozen_width = width if adapter is None or adapter.quantize == "none" else _NF4
    micro = job.batch_plan(stage, ranks).micro_batch_size * stage.sequence_length
    layer = 17 * width * micro * shape.hidden_size
    every = job.engine.gradient_checkpointing
    kept = 1.0 if every == "none" else 0.0 if every == "full" else 1 - 1 / int(every)
    boundary = width * micro * shape.hidden_size
    return Memory(
        weights=(width * trained + frozen_width * frozen) / (ranks if zero == 3 else 1),
        gradients=4 * trained / (ranks if zero >= 2 else 1),
        optimizer=0 if offloaded else (12 if half else 8) * trained / (ranks if zero >= 1 else 1),
        activations=shape.layers * (kept * layer + (1 - kept) * boundary) + layer,
        logits=(width + 8) * micro * shape.vocab_size,
    )


def describe(job: JobSpec, cluster: Cluster | None = None, facts: Facts | None = None) -> list[str]:
    """The plan as lines of text. Raises SpecError where the batch cannot be cut over the cluster's devices."""
    ranks = cluster.count if cluster else job.resources.world_size
    values = config_values(job.model, _vocabulary(job))
    shape = ModelShape.from_config(values) if values else None
    lines = [
        f"job        {job.name}, {len(job.curriculum)} stage(s), {ranks} rank(s)"
        + (f" on {cluster.name}" if cluster else "")
    ]
    lines += [_model_line(job, shape), *_adapter_line(job, shape), _engine_line(job)]
    lines += ["", *_stage_table(job, ranks, facts)]
    if facts:
        lines += ["", *_pass_lines(job, facts)]
    if shape:
        lines += ["", *_memory_lines(job, shape, ranks, cluster)]
        if cluster and cluster.device:
            lines += ["", *_time_lines(job, shape, cluster, facts)]
    return lines


def _vocabulary(job: JobSpec) -> int | None:
    return None if isinstance(job.tokenizer, str) else job.tokenizer.train.vocab_size


def _model_line(job: JobSpec, shape: ModelShape | None) -> str:
    origin = job.model.from_pretrained or job.model.preset or job.model.config
    origin = f"{origin} with {len(job.model.override)} value(s) changed" if job.model.override else origin
    if shape is None:
        return f"model      {origin} (its shape is known once it has been downloaded)"
    if not shape.vocab_size:
        return f"model      {origin}, {shape.layers} layers x {shape.hidden_size} (vocabulary as the tokenizer's)"
    active = f", {shape.active_parameters:,} active per token" if shape.experts else ""
    return f"model      {origin}, {shape.parameters:,} parameters{active}"


def _adapter_line(job: JobSpec, shape: ModelShape | None) -> list[str]:
    adapter = job.model.adapter
    if adapter is None:
        return []
    kind = ("rsLoRA" if adapter.rslora else "LoRA") + (" with DoRA" if adapter.dora else "")
    base = ", base in 4 bits" if adapter.quantize != "none" else ""
    targets = adapter.targets if isinstance(adapter.targets, str) else " ".join(adapter.targets)
    line = f"adapter    {kind}, rank {adapter.rank}, alpha {adapter.scale:g}, on {targets}{base}"
    if shape is None:
        return [line]
    trained = shape.adapter_parameters(adapter)
    share = f", {trained / (shape.parameters + trained):.2%} of all" if shape.vocab_size else ""
    return [line, f"           {trained:,} trainable parameters{share}"]


def _engine_line(job: JobSpec) -> str:
    engine = job.engine
    kind = engine.ds_config if engine.kind == "deepspeed" else "plain torch"
    return (
        f"engine     {kind}, {engine.precision}, gradient checkpointing {engine.gradient_checkpointing}, "
        f"gradients clipped at {engine.max_grad_norm:g}"
    )


def _stage_table(job: JobSpec, ranks: int, facts: Facts | None) -> list[str]:
    rows = [("stage", "steps", "tokens", "sequence", "batch", "micro x accum x ranks", "mixture")]
    for stage in job.curriculum:
        try:
            plan = job.batch_plan(stage, ranks)
        except ValueError as error:
            raise SpecError(f"stage {stage.name}: {error}") from None
        batches = _batches(stage, plan.tokens_per_batch, facts)
        rows.append(
            (
                stage.name,
                f"{batches:,}" if batches else str(stage.duration),
                f"{batches * plan.tokens_per_batch:,}" if batches else "after prepare",
                f"{stage.sequence_length:,}",
                f"{plan.tokens_per_batch:,}",
                f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {ranks}",
                " ".join(f"{name}:{weight:g}" for name, weight in stage.mixture.items()),
            )
        )
    return table(rows)


def _batches(stage: StageSpec, tokens_per_batch: int, facts: Facts | None) -> int | None:
    packed = {name: facts[name][stage.sequence_length] for name in stage.mixture} if facts else None
    return stage_batches(stage, tokens_per_batch, packed)


def _pass_lines(job: JobSpec, facts: Facts) -> list[str]:
    lines = ["passes over each source (epochs)"]
    for stage in job.curriculum:
        packed = {name: facts[name][stage.sequence_length] for name in stage.mixture}
        per_batch = stage.tokens_per_batch or job.tokens_per_batch
        batches = stage_batches(stage, per_batch, packed)
        assert batches is not None
        rows = passes(stage, batches, per_batch // stage.sequence_length, packed)
        lines.append(f"  {stage.name}: " + ", ".join(f"{row.source} {row.epochs:.2f}" for row in rows))
    return lines


def _memory_lines(job: JobSpec, shape: ModelShape, ranks: int, cluster: Cluster | None) -> list[str]:
    worst = max((estimate_memory(job, stage, shape, ranks) for stage in job.curriculum), key=lambda one: one.total)
    parts = ", ".join(
        f"{name} {_size(getattr(worst, name))}"
        for name in ("weights", "gradients", "optimizer", "activations", "logits")
    )
    lines = [f"memory     about {_size(worst.total)} per rank at the longest stage, estimated: {parts}"]
    if cluster and cluster.device:
        share = worst.total / cluster.device.memory
        verdict = "fits" if share < 0.9 else "is tight" if share < 1 else "does not fit"
        lines.append(f"           {verdict}: {share:.0%} of the {_size(cluster.device.memory)} of one {cluster.name}")
    return lines


def _time_lines(job: JobSpec, shape: ModelShape, cluster: Cluster, facts: Facts | None) -> list[str]:
    assert cluster.device is not None
    lines = [f"time       estimated at {ASSUMED_MFU:.0%} of the peak of {cluster.count} x {cluster.name}"]
    total = 0.0
    for stage in job.curriculum:
        per_batch = stage.tokens_per_batch or job.tokens_per_batch
        batches = _batches(stage, per_batch, facts)
        if batches is None:
            lines.append(f"  {stage.name}: known after `ernie prepare`")
            continue
        flops = shape.flops_per_token(stage.sequence_length, adapter=job.model.adapter)
        speed = ASSUMED_MFU * cluster.count * cluster.device.peak_flops / flops
        asking = _asked_tokens(stage, batches * per_batch, facts) / (3 * speed)  # forward only
        total += asking + batches * per_batch / speed
        before = f", after {duration(asking)} of asking what the model says now" if asking else ""
        lines.append(f"  {stage.name}: {duration(batches * per_batch / speed)} at {speed:,.0f} tokens/s{before}")
    known = not any("known after" in line for line in lines)
    return [*lines, f"  together: {duration(total)}" + ("" if known else ", without the stages not known yet")]


def _asked_tokens(stage: StageSpec, tokens: int, facts: Facts | None) -> int:
    """Positions that the model is asked about before a preference stage of so many: each of them once."""
    if stage.dpo is None:
        return 0
    held = [facts[name][stage.sequence_length].sequences for name in stage.mixture] if facts else []
    return min(tokens, sum(held) * stage.sequence_length) if held else tokens


def duration(seconds: float) -> str:
    """ "3 d 4 h", "12 min", "40 s"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            smaller = {"d": ("h", 3600), "h": ("min", 60)}.get(unit)
            rest = f" {int(seconds % size // smaller[1])} {smaller[0]}" if smaller else ""
            return f"{int(seconds // size)} {unit}{rest}"
    return f"{seconds:.0f} s"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.1f} {unit}" if unit not in ("B",) else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError

"""Stages, steps, micro-batches, memory, time and cost as text, before a GPU is touched.

What comes from formulas and assumptions is printed as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.resolve import PackedLength, passes, stage_batches
from ernie_dist.spec.shape import ModelShape
from launcher.estimate import (
    ASSUMED_COPY,
    ASSUMED_HIDDEN,
    ASSUMED_LINK_SHARE,
    ASSUMED_MFU,
    Cluster,
    Pace,
    Speed,
    estimate_pace,
    estimate_saves,
    estimate_traffic,
    shape_of,
)
from launcher.memory import (
    ASSUMED_CONTEXT,
    ASSUMED_FRAGMENTATION,
    ASSUMED_HEAP,
    CPU_PROCESS,
    FULL,
    estimate_memory,
    largest_micro_batch,
)

if TYPE_CHECKING:
    from launcher.calibrate import Rehearsal

Facts = Mapping[str, Mapping[int, PackedLength]]
"""source -> sequence length -> what prepared data holds"""


@dataclass(frozen=True)
class Wishes:
    """What a plan shows beyond the job itself."""

    price: float | None = None
    """of one GPU for an hour, in any currency"""
    node_lifetime: float | None = None
    """seconds; mean time between failures of one node"""
    scaling: bool = False
    speed: Speed | None = None
    """measured on such a device; None: assumed"""
    measured_on: str = ""
    """the job it was measured on"""


_SCALES = tuple(1 << power for power in range(11))


def describe(
    job: JobSpec, cluster: Cluster | None = None, facts: Facts | None = None, wishes: Wishes = Wishes()
) -> list[str]:
    """The plan as lines of text. Raises SpecError where the batch cannot be cut over the cluster's devices."""
    ranks = cluster.count if cluster else job.resources.world_size
    shape = shape_of(job)
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
        if cluster:
            lines += _wire_lines(job, shape, cluster)
            timed = _Timed(job, shape, cluster, facts, wishes.speed, wishes.measured_on)
            if timed.known:
                lines += ["", *_time_lines(timed, wishes.price)]
            else:
                lines += ["", f"time       known once the speed of this {cluster.name} was measured: add --calibrate"]
            if wishes.node_lifetime and not cluster.device.cpu:
                lines += ["", *_save_lines(job, shape, cluster, wishes.node_lifetime)]
            if wishes.scaling and not cluster.device.cpu and timed.known and timed.total()[0]:
                lines += ["", *_scaling_lines(timed, wishes.price)]
    return lines


def describe_rehearsal(found: Rehearsal) -> list[str]:
    """What was measured, beside what the plan says."""
    planned = found.planned.total - found.planned.process
    speed = found.speed
    return [
        f"measured   {found.seconds:.3g} s for a step of {found.stage} on {speed.ranks} x {found.cluster.name}, from "
        f"its micro-batches and its update: {speed.flops / 1e9:,.4g} GFLOP/s each",
        f"           {size_text(found.measured)} per rank above the process itself; planned {size_text(planned)} "
        f"({planned / found.measured - 1:+.0%})",
    ]


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
    device = cluster.device if cluster else None
    each = [(stage.name, estimate_memory(job, stage, shape, ranks, device)) for stage in job.curriculum]
    stage, worst = max(each, key=lambda named: named[1].total)
    parts = [f"{name} {size_text(part)}" for name, part in worst.parts.items() if part]
    lines = [
        f"memory     about {size_text(worst.total)} per rank at the fullest moment of {stage}, estimated:",
        *(f"           {', '.join(parts[first : first + 4])}" for first in range(0, len(parts), 4)),
        f"           assumed: {_memory_assumptions(cluster)}",
    ]
    if cluster:
        share = worst.total / cluster.device.memory
        verdict = "fits" if share < 0.9 else "is tight" if share < FULL else "does not fit"
        whose = f"a rank's share of this machine's {cluster.count}" if cluster.device.cpu else f"one {cluster.name}"
        lines.append(f"           {verdict}: {share:.0%} of the {size_text(cluster.device.memory)} of {whose}")
        lines += _micro_batch_lines(job, shape, cluster)
    return lines


def _memory_assumptions(cluster: Cluster | None) -> str:
    if cluster and cluster.device.cpu:
        return f"{ASSUMED_HEAP:.0%} of tensors lost to fragmentation, {size_text(CPU_PROCESS)} for libraries"
    return f"{ASSUMED_FRAGMENTATION:.0%} of tensors lost to fragmentation, {size_text(ASSUMED_CONTEXT)} for CUDA itself"


def _micro_batch_lines(job: JobSpec, shape: ModelShape, cluster: Cluster) -> list[str]:
    """What could be set in place of micro_batch_size."""
    found = []
    for stage in job.curriculum:
        size, memory = largest_micro_batch(job, stage, shape, cluster.count, cluster.device)
        share = f"({memory.total / cluster.device.memory:.0%})"
        found.append(f"{stage.name} {size} {share}" if size else f"{stage.name} none: even 1 does not fit {share}")
    return [f"           largest micro_batch_size that fits: {', '.join(found)}"]


def _wire_lines(job: JobSpec, shape: ModelShape, cluster: Cluster) -> list[str]:
    if cluster.count == 1:
        return []
    each = [(one.name, estimate_traffic(job, one, shape, cluster.count, cluster.device)) for one in job.curriculum]
    stage, sent = max(each, key=lambda named: named[1].total)
    over = "gloo" if cluster.device.cpu else "NVLink" if cluster.nodes == 1 else "InfiniBand"
    speed = "of what is assumed" if cluster.device.cpu else "of the data sheet's"
    parts = f"gradients {size_text(sent.gradients)}, weights {size_text(sent.weights)}"
    return [
        "",
        f"wire       each rank sends {size_text(sent.total)} in a step of {stage}: {parts}",
        f"           {1000 * sent.total / cluster.link:,.0f} ms over {over} at {cluster.link / 1e9:.3g} GB/s, "
        f"{ASSUMED_LINK_SHARE:.0%} {speed}",
    ]


@dataclass(frozen=True)
class _Timed:
    """A job on devices, and how fast they are."""

    job: JobSpec
    shape: ModelShape
    cluster: Cluster
    facts: Facts | None
    speed: Speed | None
    measured_on: str

    @property
    def known(self) -> bool:
        return bool(self.cluster.device.peak_flops or self.speed)

    def pace(self, stage: StageSpec) -> Pace:
        return estimate_pace(self.job, stage, self.shape, self.cluster, self.speed)

    def seconds(self, stage: StageSpec) -> tuple[float, float] | None:
        """Of its steps, and of asking about its pairs before them. None where only `ernie prepare` knows how many."""
        per_batch = stage.tokens_per_batch or self.job.tokens_per_batch
        batches = _batches(stage, per_batch, self.facts)
        if batches is None:
            return None
        pace = self.pace(stage).tokens_per_second
        asking = _asked_tokens(stage, batches * per_batch, self.facts) / (3 * pace)  # forward only
        return batches * per_batch / pace, asking

    def total(self) -> tuple[float, bool]:
        """Seconds of the stages whose length is known; whether that is all of them."""
        each = [self.seconds(stage) for stage in self.job.curriculum]
        return sum(sum(seconds) for seconds in each if seconds is not None), None not in each


def _time_lines(timed: _Timed, price: float | None) -> list[str]:
    job, cluster, speed = timed.job, timed.cluster, timed.speed
    lines = [
        f"time       estimated at {ASSUMED_MFU:.0%} of the peak of {cluster.count} x {cluster.name}, "
        f"up to {ASSUMED_HIDDEN:.0%} of the wire hidden behind it"
        if speed is None
        else f"time       by the measured speed of {speed.ranks} x {cluster.name} in job {timed.measured_on}: "
        f"{speed.flops / 1e9:,.4g} GFLOP/s each (--calibrate)"
    ]
    for stage in job.curriculum:
        known = timed.seconds(stage)
        if known is None:
            lines.append(f"  {stage.name}: known after `ernie prepare`")
            continue
        steps, asking = known
        pace = timed.pace(stage)
        waiting = f", {pace.waiting:.1%} of it waiting for the wire" if cluster.count > 1 and pace.waiting else ""
        before = f", after {duration(asking)} of asking what the model says now" if asking else ""
        lines.append(f"  {stage.name}: {duration(steps)} at {pace.tokens_per_second:,.0f} tokens/s{waiting}{before}")
    total, all_known = timed.total()
    if not total:
        return lines
    without = "" if all_known else ", without the stages not known yet"
    lines.append(f"  together: {duration(total)}{without}")
    if cluster.device.cpu:
        return lines
    hours = total / 3600 * cluster.count
    energy = f"at most {hours * cluster.device.watts / 1000:,.0f} kWh, the devices alone"
    cost = f", {hours * price:,.2f} at {price:g} an hour" if price is not None else ""
    return [*lines, "", f"cost       {hours:,.1f} GPU hours{cost}; {energy}{without}"]


def _save_lines(job: JobSpec, shape: ModelShape, cluster: Cluster, node_lifetime: float) -> list[str]:
    saves = estimate_saves(job, shape, cluster, node_lifetime)
    lost = (saves.stop / saves.every + saves.every / 2 / saves.between_failures) if saves.every else 0.0
    return [
        f"saves      a checkpoint has {size_text(saves.size)}; steps stand still {saves.stop:.2g} s for it, "
        f"copied at {ASSUMED_COPY / 1e9:.0f} GB/s a GPU",
        f"           with a failure every {duration(saves.between_failures)} on {cluster.nodes} node(s) save every "
        f"{duration(saves.every)} (Young, Daly): {lost:.2%} of the time lost to saves and repeated steps",
    ]


def _scaling_lines(timed: _Timed, price: float | None) -> list[str]:
    """The same job, its batches as they are, on 1 to 1,024 devices."""
    job, device = timed.job, timed.cluster.device
    rows = [("GPUs", "together", "efficiency", "memory", *(["cost"] if price is not None else []))]
    alone: float | None = None
    left_out = []
    for count in _SCALES:
        there = replace(timed, cluster=replace(timed.cluster, count=count))
        try:
            total, _ = there.total()
            memory = max(estimate_memory(job, stage, timed.shape, count, device).total for stage in job.curriculum)
        except ValueError:
            left_out.append(count)
            continue
        alone = alone or total * count
        share = memory / device.memory
        fits = f"{share:.0%}" if share < FULL else f"{share:.0%}, does not fit"
        spent = [f"{total / 3600 * count * price:,.2f}"] if price is not None else []
        rows.append((f"{count:,}", duration(total), f"{alone / (total * count):.0%}", fits, *spent))
    lines = ["scaling    estimated, the batch as it is", *(f"  {line}" for line in table(rows))]
    if left_out:
        lines.append(f"  not on {', '.join(f'{count:,}' for count in left_out)}: the batch cannot be dealt out evenly")
    return lines


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


def size_text(size: float) -> str:
    """ "3.1 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.1f} {unit}" if unit not in ("B",) else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError

"""The facts of a run, collected from its directory: what the page and the pictures show, and nothing drawn yet.

job.json + metrics.jsonl + events.jsonl + manifests of the sources -> RunSummary
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.events.goodput import PARTS, described, of_run
from ernie_dist.events.history import Replayed, read_all_attempts, read_events, read_metrics, replayed_steps
from ernie_dist.events.wording import perplexity
from ernie_dist.report.attempts import Attempt, SlowRank, attempts_of, slow_ranks
from ernie_dist.report.memory import Held, memory_held
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage
from ernie_dist.spec.run_files import RunFiles

START = "start"
"""the stage that evaluations before the first step name"""


@dataclass(frozen=True)
class Cell:
    """Held-out loss of one source at one point of the run; `change` against the row before."""

    source: str
    loss: float
    change: float | None
    trained: bool
    """whether the stage just trained has this source in its mixture"""

    pairs: bool
    """whether the loss compares answers: it has no perplexity"""


@dataclass(frozen=True)
class MatrixRow:
    """The held-out losses after a stage, or before the first one."""

    stage: str
    step: int
    complete: bool
    """False: the stage has not ended, this is its latest evaluation"""
    cells: dict[str, Cell]


@dataclass(frozen=True)
class StageSummary:
    """What a stage was to do and did."""

    name: str
    steps: int
    """updates made so far"""
    planned_steps: int
    tokens: int
    """positions fed so far, padding included"""
    planned_tokens: int
    first_token: int
    sequence_length: int
    padding: float
    """share of padded positions, as the packs of its mixture have it"""
    loss_first: float | None
    """mean over the first tenth of its steps, ten steps at most; None before the first"""
    loss_last: float | None
    """the same at its end, or where the run is now"""
    perplexity_before: float | None
    """held out, of the stage's own sources, weighted as in its mixture"""
    perplexity_after: float | None

    @property
    def finished(self) -> bool:
        return self.steps >= self.planned_steps


@dataclass(frozen=True)
class SourceSummary:
    """A prepared source. None: its folder is not there any more."""

    name: str
    kind: str
    rows: int | None
    documents: int | None
    tokens: int | None
    quarantined: int | None
    duplicates: int | None
    left_out: dict[str, int]
    """rows passed over as the source asked for, by reason"""
    splits: dict[str, int]
    """documents in train, validation, test"""
    padding: dict[str, float]
    """stage -> share of padded positions in its sequences of this source"""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    name: str
    bytes: int
    seconds: float
    kept: bool


@dataclass(frozen=True)
class RunSummary:
    """All that is known about a run from its directory."""

    files: RunFiles
    job: ResolvedJob
    metrics: list[dict[str, Any]]
    """one per step, in order; of a step written twice the later attempt's"""
    stages: list[StageSummary]
    matrix: list[MatrixRow]
    held_out: dict[str, list[tuple[int, float]]]
    """source -> (consumed tokens, loss) of every evaluation, in order"""
    sources: list[SourceSummary]
    attempts: list[Attempt]
    replays: list[Replayed]
    checkpoints: list[Checkpoint]
    best: dict[str, Any] | None
    """the last BestCheckpoint event; None where the job names no measure"""
    ended_early: str
    """why the run ended before its time; "" if it did not"""
    refused: list[tuple[str, str]]
    """checkpoints passed over, with the reason"""
    restarts: list[int]
    """consumed tokens at which a later attempt went on"""
    skipped_steps: int
    """steps whose update was refused, or skipped by the engine"""
    time: dict[str, float]
    """seconds of each part of the wall time"""
    memory: list[Held]
    """none where the run is older than this record, or its system does not tell"""
    slow: list[SlowRank]
    """ranks that were too slow at some time"""
    refused_updates: list[dict[str, Any]]
    """UpdateRefused events, the last of each batch, in order"""
    skipped_batches: list[dict[str, Any]]
    """BatchesSkipped events"""

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def tokens(self) -> int:
        return self.metrics[-1]["consumed_tokens"] if self.metrics else 0

    @property
    def time_shares(self) -> list[tuple[str, float, float, str]]:
        """Parts of the wall time: name, seconds, share, what it is."""
        return [(part, seconds, share, PARTS[part]) for part, seconds, share in described(self.time)]

    @property
    def outcome(self) -> str:
        return self.attempts[-1].outcome if self.attempts else "not started"

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps."""
        return _median([step["tokens_per_second"] for step in self.metrics])

    @property
    def mfu(self) -> float | None:
        """Median over the steps; None where the device's peak is not known."""
        return _median([step["mfu"] for step in self.metrics if step.get("mfu") is not None])

    @property
    def training_seconds(self) -> float:
        """Time spent in steps; a step executed twice counts once, evaluations and checkpoints do not."""
        seconds = 0.0
        tokens = {stage.name: stage.tokens_per_batch for stage in self.job.stages}
        for step in self.metrics:
            if step["tokens_per_second"] > 0:
                seconds += tokens[step["stage"]] / step["tokens_per_second"]
        return seconds

    @property
    def identical_replays(self) -> int:
        return sum(replay.identical for replay in self.replays)


def collect(run_dir: Path) -> RunSummary:
    """Reads a run directory, finished or not. Raises RunDirError if it is none."""
    files = RunFiles(Path(run_dir))
    job = ResolvedJob.read(files.job)
    metrics = read_metrics(files.metrics)
    events = read_events(files.events)
    evaluations = _evaluations(events)
    matrix = _matrix(job, evaluations)
    best, early = (_kept(events, kind, "step")[-1:] for kind in ("BestCheckpoint", "EarlyStopped"))
    lines = read_all_attempts(files.metrics)
    attempts = attempts_of(events, lines)
    return RunSummary(
        files=files,
        job=job,
        metrics=metrics,
        stages=[_stage(job, stage, metrics, matrix) for stage in job.stages],
        matrix=matrix,
        held_out=_held_out(job, evaluations),
        sources=[_source(job, name) for name in job.sources],
        attempts=attempts,
        replays=replayed_steps(files.metrics),
        checkpoints=_checkpoints(files, events),
        best=best[0] if best else None,
        ended_early=early[0]["reason"] if early else "",
        refused=[(e["checkpoint"], e["reason"]) for e in events if e["event"] == "CheckpointRefused"],
        time=of_run(files, job),
        memory=memory_held(events),
        slow=slow_ranks(lines, job.spec.watchdog.straggler),
        restarts=[job.consumed_tokens(a.from_step) for a in attempts[1:]],
        skipped_steps=sum(not step.get("applied", True) for step in metrics),
        refused_updates=_refused_updates(events),
        skipped_batches=[event for event in events if event["event"] == "BatchesSkipped"],
    )


def _evaluations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out losses ordered by step."""
    return [event for event in _kept(events, "Evaluated", "step", "source") if event["loss"] is not None]


def _kept(events: list[dict[str, Any]], kind: str, *keys: str) -> list[dict[str, Any]]:
    """Events of a kind ordered by step; of those that agree in `keys` the later counts."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in events:
        if event["event"] == kind:
            latest[tuple(event[key] for key in keys)] = event
        elif event["event"] == "BatchesSkipped":  # the run went back behind these
            latest = {key: kept for key, kept in latest.items() if kept["step"] < event["step"]}
    return sorted(latest.values(), key=lambda event: event["step"])


def _held_out(job: ResolvedJob, evaluations: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in job.sources}
    for event in evaluations:
        curves.setdefault(event["source"], []).append((event["consumed_tokens"], event["loss"]))
    return {name: points for name, points in curves.items() if points}


def _refused_updates(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    latest = {event["batch_index"]: event for event in events if event["event"] == "UpdateRefused"}
    return [latest[index] for index in sorted(latest)]


def _matrix(job: ResolvedJob, evaluations: list[dict[str, Any]]) -> list[MatrixRow]:
    """A row for the start, for each stage that ended, and for the one at work."""
    mixtures = {stage.name: stage.mixture for stage in job.stages}
    rows: list[MatrixRow] = []
    for name in (START, *mixtures):
        found = [event for event in evaluations if event["stage"] == name]
        ends = [event for event in found if event["at_stage_end"]]
        step = max((event["step"] for event in ends or found), default=None)
        if step is None:
            continue
        losses = {event["source"]: event["loss"] for event in found if event["step"] == step}
        before = rows[-1].cells if rows else {}
        cells = {
            source: Cell(
                source,
                losses[source],
                losses[source] - before[source].loss if source in before else None,
                trained=source in mixtures.get(name, {}),
                pairs=job.sources[source].kind == "preference",
            )
            for source in sorted(losses, key=list(job.sources).index)
            if source in job.sources
        }
        rows.append(MatrixRow(name, step, bool(ends) or name == START, cells))
    return rows


def _stage(
    job: ResolvedJob, stage: ResolvedStage, metrics: list[dict[str, Any]], matrix: list[MatrixRow]
) -> StageSummary:
    done = [step for step in metrics if step["stage"] == stage.name]
    losses = [step["loss"] for step in done if math.isfinite(step["loss"])]
    few = min(10, max(1, len(losses) // 10))
    after = next((row for row in matrix if row.stage == stage.name), None)
    before = None
    names = [START, *(other.name for other in job.stages)]
    for row in matrix:
        if names.index(row.stage) < names.index(stage.name):
            before = row
    return StageSummary(
        name=stage.name,
        steps=len(done),
        planned_steps=stage.batches,
        tokens=len(done) * stage.tokens_per_batch,
        planned_tokens=stage.batches * stage.tokens_per_batch,
        first_token=stage.first_token,
        sequence_length=stage.sequence_length,
        padding=_stage_padding(job, stage),
        loss_first=statistics.fmean(losses[:few]) if losses else None,
        loss_last=statistics.fmean(losses[-few:]) if losses else None,
        perplexity_before=_mixture_perplexity(stage, before, after) if done else None,
        perplexity_after=_mixture_perplexity(stage, after, before or after),
    )


def _mixture_perplexity(stage: ResolvedStage, row: MatrixRow | None, other: MatrixRow | None) -> float | None:
    """exp of the mean loss over the sources of the mixture that both rows know, so that the two can be compared."""
    if row is None or stage.dpo is not None:
        return None
    known = [name for name in stage.mixture if name in row.cells and (other is None or name in other.cells)]
    if not known:
        return None
    total = math.fsum(stage.mixture[name] for name in known)
    return perplexity(math.fsum(stage.mixture[name] * row.cells[name].loss for name in known) / total)


def _stage_padding(job: ResolvedJob, stage: ResolvedStage) -> float:
    """Weights count tokens: a source's share of the sequences grows with its padding."""
    length = stage.sequence_length
    per_sequence = {name: job.sources[name].packed[length].tokens_per_sequence for name in stage.mixture}
    total = math.fsum(stage.mixture.values())
    mean = total / math.fsum(weight / per_sequence[name] for name, weight in stage.mixture.items())
    return 1 - mean / length


def _source(job: ResolvedJob, name: str) -> SourceSummary:
    source = job.sources[name]
    manifest = _read_manifest(Path(source.folder))
    splits = {split: count.get("documents", 0) for split, count in manifest.get("splits", {}).items()}
    tokens = sum(count.get("tokens", 0) for count in manifest.get("splits", {}).values())
    padding = {}
    for stage in job.stages:
        if name in stage.mixture:
            packed = source.packed[stage.sequence_length]
            padding[stage.name] = 1 - packed.tokens_per_sequence / stage.sequence_length
    return SourceSummary(
        name=name,
        kind=source.kind,
        rows=manifest.get("rows"),
        documents=manifest.get("documents"),
        tokens=tokens if manifest else None,
        quarantined=manifest.get("quarantined"),
        duplicates=manifest.get("duplicates"),
        left_out=manifest.get("left_out", {}),
        splits=splits,
        padding=padding,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """{} if the prepared data is gone or not readable: a report must not need it."""
    try:
        value = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _checkpoints(files: RunFiles, events: list[dict[str, Any]]) -> list[Checkpoint]:
    latest = {event["step"]: event for event in events if event["event"] == "CheckpointSaved"}
    found = []
    for step, event in sorted(latest.items()):
        name = Path(event["checkpoint"]).name
        kept = (files.checkpoints / name / "COMPLETE").exists()
        found.append(Checkpoint(step, name, event["bytes"], event["seconds"], kept))
    return found


def _median(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None

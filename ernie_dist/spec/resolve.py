"""A job whose every number is known: what job.json holds, and all that launcher and job agree on.

JobSpec + facts of the prepared data --resolve--> ResolvedJob
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ernie_dist.spec.curriculum import DpoSpec, Kind, StageSpec
from ernie_dist.spec.ds_config import partitioning, read_ds_config, zero_stage
from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.job import JobSpec, fingerprint
from ernie_dist.spec.layout import EngineLayout
from ernie_dist.spec.problems import Problem, refuse
from ernie_dist.spec.quantity import Quantity, Unit
from ernie_dist.spec.strict import Strict
from ernie_dist.spec.training import ALL_SOURCES, ScheduleSpec


class PackedLength(Strict):
    """The training documents of one source, packed to one sequence length."""

    sequences: int
    tokens: int

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of positions that are not padding."""
        return self.tokens / self.sequences


class ResolvedSource(Strict):
    """A prepared source."""

    folder: str
    fingerprint: str
    kind: Kind
    packed: dict[int, PackedLength]
    held_out: bool
    """whether there are validation documents"""


class ResolvedTokenizer(Strict):
    folder: str
    fingerprint: str
    vocab_size: int


class ResolvedStage(Strict):
    """A stage in batches. Batch b belongs to the stage if first_batch <= b < first_batch + batches."""

    name: str
    first_batch: int
    batches: int
    first_token: int
    sequence_length: int
    tokens_per_batch: int
    micro_batch_size: int
    mixture: dict[str, float]
    loss: Literal["answers", "last_answer", "all"]
    dpo: DpoSpec | None
    freeze: tuple[str, ...]
    neftune_alpha: float = 0.0
    schedule: ScheduleSpec
    schedule_first_token: int
    schedule_tokens: int
    """the stages that share one schedule are one stretch of tokens to it"""
    schedule_first_batch: int
    """tokens_per_batch where the stretch begins: what a step of warmup is"""
    schedule_last_batch: int
    """tokens_per_batch where it ends: what a step of decay is"""
    fingerprint: str

    @property
    def sequences_per_batch(self) -> int:
        """global_batch_size"""
        return self.tokens_per_batch // self.sequence_length

    @property
    def end_batch(self) -> int:
        return self.first_batch + self.batches


class ResolvedJob(Strict):
    """What a run does, frozen. Written as job.json; every rank reads it and nothing else of the job."""

    format: Literal[1] = 1
    spec: JobSpec
    tokenizer: ResolvedTokenizer
    sources: dict[str, ResolvedSource]
    stages: tuple[ResolvedStage, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [stage.end_batch for stage in self.stages]

    @property
    def total_batches(self) -> int:
        return self._ends[-1]

    @property
    def total_tokens(self) -> int:
        return self.consumed_tokens(self.total_batches)

    def stage_index(self, batch_index: int) -> int:
        """Number of the stage that batch `batch_index` belongs to. Raises IndexError past the end."""
        if not 0 <= batch_index < self.total_batches:
            raise IndexError(f"batch {batch_index} of {self.total_batches}")
        return bisect_right(self._ends, batch_index)

    def stage_at(self, batch_index: int) -> ResolvedStage:
        return self.stages[self.stage_index(batch_index)]

    def consumed_tokens(self, batch_index: int) -> int:
        """Token positions in the batches before `batch_index`, padding included."""
        stage = self.stage_at(min(batch_index, self.total_batches - 1))
        return stage.first_token + (batch_index - stage.first_batch) * stage.tokens_per_batch

    def crosses(self, interval: Quantity, batch_index: int, since: int | None = None) -> bool:
        """Whether a multiple of `interval` was reached on the way from batch `since` (else the one before)."""
        if batch_index == 0:
            return False
        before, after = batch_index - 1 if since is None else since, batch_index
        if interval.unit is Unit.TOKENS:
            before, after = self.consumed_tokens(before), self.consumed_tokens(after)
        return before // int(interval.amount) < after // int(interval.amount)

    def layout(self, world_size: int) -> EngineLayout:
        """What the checkpoints of this job fit: its engine, on this many ranks."""
        engine = self.spec.engine
        deepspeed = engine.kind == "deepspeed"
        policy = read_ds_config(engine.ds_config) if deepspeed else {}
        return EngineLayout(
            kind=engine.kind,
            ds_config=Path(engine.ds_config).stem if deepspeed else "",
            zero_stage=zero_stage(policy) if deepspeed else 0,
            partitioning=partitioning(policy) if deepspeed else "",
            precision=engine.precision,
            ranks=world_size,
            frozen=tuple(sorted({stage.freeze for stage in self.stages if stage.freeze})),
        )

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ResolvedJob:
        """Raises RunDirError if the file is missing or not a job of this version."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunDirError(f"{path}: cannot be read ({error.strerror}); is this a run directory?") from None
        except ValidationError as error:
            raise RunDirError(
                f"{path}: was written by another version or edited by hand ({error.error_count()} fields differ); "
                "start a new run directory"
            ) from None


@dataclass(frozen=True)
class Pass:
    """How often a stage goes through one of its sources."""

    stage: str
    source: str
    drawn: int
    """sequences"""
    held: int
    """sequences in the source"""

    @property
    def epochs(self) -> float:
        return self.drawn / self.held


def passes(stage: StageSpec, batches: int, sequences_per_batch: int, packed: Mapping[str, PackedLength]) -> list[Pass]:
    """How often each source of a stage is gone through; a mixture's weights count tokens, padding left out."""
    shares = {name: weight / packed[name].tokens_per_sequence for name, weight in stage.mixture.items()}
    total = sum(shares.values())
    drawn = {name: round(batches * sequences_per_batch * share / total) for name, share in shares.items()}
    return [Pass(stage.name, name, count, packed[name].sequences) for name, count in drawn.items()]


def stage_batches(stage: StageSpec, tokens_per_batch: int, packed: Mapping[str, PackedLength] | None) -> int | None:
    """Batches in a stage: the duration rounded up to whole batches. None if it counts in epochs and `packed` is None.

    One epoch is as many sequences as the stage's sources hold together; the last batch runs on into the next epoch.
    """
    amount = stage.duration.amount
    if stage.duration.unit is Unit.STEPS:
        return int(amount)
    if stage.duration.unit is Unit.TOKENS:
        return math.ceil(amount / tokens_per_batch)
    if packed is None:
        return None
    sequences = sum(packed[name].sequences for name in stage.mixture)
    return max(1, math.ceil(amount * sequences * stage.sequence_length / tokens_per_batch))


def resolve(spec: JobSpec, tokenizer: ResolvedTokenizer, sources: Mapping[str, ResolvedSource]) -> ResolvedJob:
    """Fixes every number of a job once its data is prepared. Raises SpecError where the data does not suffice."""
    problems: list[Problem] = []
    lengths: list[int] = []
    for index, stage in enumerate(spec.curriculum):
        packed = {name: sources[name].packed[stage.sequence_length] for name in stage.mixture}
        per_batch = stage.tokens_per_batch or spec.tokens_per_batch
        batches = stage_batches(stage, per_batch, packed)
        assert batches is not None
        lengths.append(batches)
        if stage.duration.unit is not Unit.EPOCHS:
            per_step = per_batch // stage.sequence_length
            problems += _repeats(spec, index, passes(stage, batches, per_step, packed), per_step)
    best = spec.evaluate.best
    if best is not None and not any(one.held_out for name, one in sources.items() if best in (name, ALL_SOURCES)):
        problems.append(
            Problem("evaluate.best", "there are no held-out documents to measure; give split.validation a share", best)
        )
    if problems:
        raise refuse(f"the data of {spec.name}", problems)

    stages: list[ResolvedStage] = []
    for stage, batches in zip(spec.curriculum, lengths, strict=True):
        stages.append(_resolve_stage(spec, stage, batches, stages, tokenizer, sources))
    return ResolvedJob(spec=spec, tokenizer=tokenizer, sources=dict(sources), stages=_with_schedules(spec, stages))


def _repeats(spec: JobSpec, index: int, rows: list[Pass], tolerance: int) -> list[Problem]:
    """Sources a stage would go through more than once without being told to."""
    problems = []
    for row in rows:
        if row.drawn > row.held + tolerance and not spec.sources[row.source].repeat:
            problems.append(
                Problem(
                    f"curriculum.{index}.mixture.{row.source}",
                    f"stage {row.stage} asks for {row.epochs:.2f} epochs of this source; shorten the stage, lower the "
                    f"weight, set sources.{row.source}.repeat: true, or count the stage in epochs",
                )
            )
    return problems


def _resolve_stage(
    spec: JobSpec,
    stage: StageSpec,
    batches: int,
    before: list[ResolvedStage],
    tokenizer: ResolvedTokenizer,
    sources: Mapping[str, ResolvedSource],
) -> ResolvedStage:
    tokens_per_batch = stage.tokens_per_batch or spec.tokens_per_batch
    last = before[-1] if before else None
    schedule = stage.schedule or spec.schedule
    assert schedule is not None
    identity: dict[str, Any] = {
        "stage": stage.model_dump(mode="json", exclude={"micro_batch_size"}),
        "batches": batches,
        "tokens_per_batch": tokens_per_batch,
        "schedule": schedule.model_dump(mode="json"),
        "sources": {name: sources[name].fingerprint for name in stage.mixture},
        "seed": spec.seed,
        "model": spec.model.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
        "optimizer": spec.optimizer.model_dump(mode="json"),
        "max_grad_norm": spec.engine.max_grad_norm,
    }
    return ResolvedStage(
        name=stage.name,
        first_batch=last.end_batch if last else 0,
        batches=batches,
        first_token=last.first_token + last.batches * last.tokens_per_batch if last else 0,
        sequence_length=stage.sequence_length,
        tokens_per_batch=tokens_per_batch,
        micro_batch_size=stage.micro_batch_size or spec.engine.micro_batch_size,
        mixture=stage.mixture,
        loss=stage.loss,
        dpo=stage.dpo,
        freeze=stage.freeze,
        neftune_alpha=stage.neftune_alpha,
        schedule=schedule,
        schedule_first_token=0,
        schedule_tokens=0,
        schedule_first_batch=tokens_per_batch,
        schedule_last_batch=tokens_per_batch,
        fingerprint=fingerprint(json.loads(json.dumps(identity))),
    )


def _with_schedules(spec: JobSpec, stages: list[ResolvedStage]) -> tuple[ResolvedStage, ...]:
    """Neighbouring stages without a schedule of their own share one stretch of the job's."""
    own = [stage.schedule is not None for stage in spec.curriculum]
    result = []
    for index, stage in enumerate(stages):
        first = last = index
        while not own[index] and first > 0 and not own[first - 1]:
            first -= 1
        while not own[index] and last + 1 < len(stages) and not own[last + 1]:
            last += 1
        start = stages[first].first_token
        end = stages[last].first_token + stages[last].batches * stages[last].tokens_per_batch
        stretch = {
            "schedule_first_token": start,
            "schedule_tokens": end - start,
            "schedule_first_batch": stages[first].tokens_per_batch,
            "schedule_last_batch": stages[last].tokens_per_batch,
        }
        result.append(stage.model_copy(update=stretch))
    return tuple(result)

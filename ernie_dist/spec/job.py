"""The job: one YAML, validated as a whole, with every mistake listed at once.

job.yaml --read, --set--> raw dict --validate--> JobSpec --resolve(prepared data)--> ResolvedJob = job.json
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from ernie_dist.spec import batch_plan
from ernie_dist.spec.curriculum import Name, SourceSpec, SplitSpec, StageSpec
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.problems import Problem, from_pydantic, refuse, suggest
from ernie_dist.spec.quantity import Count
from ernie_dist.spec.resources import ResourcesSpec
from ernie_dist.spec.strict import Strict
from ernie_dist.spec.training import (
    CheckpointSpec,
    EngineSpec,
    EvaluateSpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
    TokenizerSpec,
    TrackSpec,
)


class JobSpec(Strict):
    """Everything one job is. Fields state their unit; see `ernie schema` for all of them."""

    name: Name
    seed: int = Field(17, ge=0, lt=1 << 32)
    model: ModelSpec
    tokenizer: str | TokenizerSpec = Field(description="hub id, folder, or {train: {vocab_size: 8000}}")
    tokens_per_batch: Count = Field(description="token positions per optimizer step, whole world; 1M = 1024 * 1024")
    sources: Annotated[dict[Name, SourceSpec], Field(min_length=1)]
    split: SplitSpec = SplitSpec()
    curriculum: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    schedule: ScheduleSpec | None = Field(None, description="shared by all stages without one of their own")
    optimizer: OptimizerSpec = OptimizerSpec()
    engine: EngineSpec = EngineSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    track: TrackSpec = TrackSpec()
    resources: ResourcesSpec = ResourcesSpec()
    data_dir: str = Field("prepared", description="folder of tokenised sources, shared by jobs")

    def batch_plan(self, stage: StageSpec, world_size: int) -> batch_plan.BatchPlan:
        """How a batch of `stage` is cut over `world_size` ranks. Raises ValueError."""
        return batch_plan.solve(
            stage.tokens_per_batch or self.tokens_per_batch,
            stage.sequence_length,
            stage.micro_batch_size or self.engine.micro_batch_size,
            world_size,
        )

    @property
    def evaluation_length(self) -> int:
        """Sequence length of held-out sequences."""
        return self.evaluate.sequence_length or max(stage.sequence_length for stage in self.curriculum)

    def sequence_lengths(self, source: str) -> tuple[int, ...]:
        """The lengths to which the training documents of `source` are packed."""
        return tuple(sorted({stage.sequence_length for stage in self.curriculum if source in stage.mixture}))


def load_job(path: Path, overrides: Sequence[str] = (), *, ranks: int | None = None) -> JobSpec:
    """Reads a YAML job, applies `a.b=c` overrides and checks everything that can be checked without the data.

    `ranks` replaces resources.gpus_per_node on one node. Raises SpecError that lists every mistake.
    """
    raw = _read_yaml(path)
    origin = path.name + (f" with --set {' '.join(overrides)}" if overrides else "")
    for override in overrides:
        _apply_override(raw, override)
    if ranks is not None:
        raw["resources"] = {**(raw.get("resources") or {}), "nodes": 1, "gpus_per_node": ranks}
    return parse_job(raw, origin)


def parse_job(raw: dict[str, Any], origin: str) -> JobSpec:
    """Validates a raw job. Raises SpecError that lists every mistake, also those between fields."""
    try:
        job = JobSpec.model_validate(raw)
    except ValidationError as error:
        problems = from_pydantic(error, JobSpec)
        # Checks between fields need a whole job: leave the bad fields out and, if it holds together, look again.
        whole = copy.deepcopy(raw)
        for item in error.errors():
            _remove(whole, item["loc"])
        with suppress(ValidationError):
            problems += _cross_check(JobSpec.model_validate(whole))
    else:
        problems = list(_cross_check(job))
    if problems:
        raise refuse(origin, problems)
    return job


def _cross_check(job: JobSpec) -> Iterator[Problem]:
    names = [stage.name for stage in job.curriculum]
    for index, stage in enumerate(job.curriculum):
        where = f"curriculum.{index}"
        if names.index(stage.name) != index:
            yield Problem(f"{where}.name", "another stage has this name; names must differ", stage.name)
        for source in stage.mixture:
            if source not in job.sources:
                yield Problem(f"{where}.mixture.{source}", f"unknown source; {suggest(source, job.sources)}")
        if stage.schedule is None and job.schedule is None:
            yield Problem(f"{where}.schedule", "is required, here or for the whole job: {kind: wsd, peak: 3e-4, ...}")
        try:
            job.batch_plan(stage, job.resources.world_size)
        except ValueError as error:
            yield Problem(f"{where} ({stage.name})", str(error))
    used = {source for stage in job.curriculum for source in stage.mixture}
    for source in job.sources.keys() - used:
        yield Problem(f"sources.{source}", "no stage's mixture uses this source; use it or remove it")
    if job.engine.kind == "plain" and job.resources.world_size > 1:
        yield Problem("engine.kind", "plain runs on one rank; use deepspeed, or --ranks 1", "plain")
    for name, interval in (("checkpoint.every", job.checkpoint.every), ("evaluate.every", job.evaluate.every)):
        if interval is not None and interval.amount == 0:
            yield Problem(name, "must be greater than zero", str(interval))


def fingerprint(value: Any) -> str:
    """16 hex digits of a hash over a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a job must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML job") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise SpecError(
            f"{path}: a job is a YAML mapping with name, model, sources, curriculum ...; got {type(raw).__name__}"
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    parts = path.strip().split(".")
    if not separator or not all(parts):
        raise SpecError(
            f'--set {override}: needs the form field.field=value, e.g. --set curriculum.0.duration="2M tokens"'
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    here: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            here_index = _index(here, part, override)
            if last:
                here[here_index] = value
            else:
                here = here[here_index]
        elif isinstance(here, dict):
            if last:
                here[part] = value
            else:
                if here.get(part) is None:
                    here[part] = {}
                here = here[part]
        else:
            raise SpecError(f"--set {override}: {'.'.join(parts[:depth])} is a single value and has no field {part}")


def _index(items: list[Any], part: str, override: str) -> int:
    """A list position by number, or by the `name` of the item."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if re.fullmatch(r"\d+", part) and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name)
    raise SpecError(f"--set {override}: no item {part}; there are 0 to {len(items) - 1} ({known})")


def _remove(raw: Any, loc: Sequence[int | str]) -> None:
    """Deletes the field a pydantic error points at, as deep as the path can be followed."""
    path: list[tuple[Any, int | str]] = []
    for part in loc:
        try:
            raw, parent = raw[part], raw
        except (KeyError, IndexError, TypeError):
            break
        path.append((parent, part))
    if path and isinstance(path[-1][0], dict):
        del path[-1][0][path[-1][1]]

"""The job: one YAML, validated as a whole, with every mistake listed at once.

job.yaml --read, --set--> raw dict --validate--> JobSpec --resolve(prepared data)--> ResolvedJob = job.json
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from ernie_dist.spec import batch_plan
from ernie_dist.spec.curriculum import Kind, Name, SourceSpec, SplitSpec, StageSpec
from ernie_dist.spec.ds_config import read_ds_config, zero_stage
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.problems import Problem, from_pydantic, refuse, suggest
from ernie_dist.spec.quantity import Count
from ernie_dist.spec.resilience import BadNumbersSpec, RestartSpec, WatchdogSpec
from ernie_dist.spec.resources import ResourcesSpec
from ernie_dist.spec.secrets import secrets_in
from ernie_dist.spec.shape import config_values
from ernie_dist.spec.strict import Strict
from ernie_dist.spec.training import (
    ALL_SOURCES,
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
    restarts: RestartSpec = RestartSpec()
    watchdog: WatchdogSpec = WatchdogSpec()
    bad_numbers: BadNumbersSpec = BadNumbersSpec()
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

    @property
    def held_out_sequences(self) -> int:
        """How many held-out sequences of a source are measured on, at most."""
        return max(1, self.evaluate.max_tokens // self.evaluation_length)

    def sequence_lengths(self, source: str) -> tuple[int, ...]:
        """The lengths to which the training documents of `source` are packed."""
        return tuple(sorted({stage.sequence_length for stage in self.curriculum if source in stage.mixture}))


_SECRET = (
    "this looks like {}, and a job is copied to where others can read it: take it out, and give it as an environment "
    "variable (WANDB_API_KEY, HF_TOKEN) or with `wandb login`, `hf auth login`"
)


_MISMATCH = {
    True: "a stage with dpo learns from pairs of answers, and this source has none: say preference: pairs or erniekit",
    False: "this source holds pairs of answers, which only a stage with dpo learns from: add dpo: {} to the stage",
}


def load_job(path: Path, overrides: Sequence[str] = (), *, ranks: int | None = None) -> JobSpec:
    """Reads a YAML job, applies `a.b=c` overrides and checks everything that can be checked without the data.

    `ranks` replaces resources.gpus_per_node on one node. Raises SpecError that lists every mistake.
    """
    raw = _read_yaml(path)
    origin = path.name + (f" with --set {' '.join(overrides)}" if overrides else "")
    for override in overrides:
        _apply_override(raw, override)
    found = [Problem(where, _SECRET.format(kind)) for where, kind in secrets_in(raw)]
    if found:
        raise refuse(path.name, found)  # without what was given with --set
    resources = raw.get("resources") or {}
    if ranks is not None and isinstance(resources, dict):
        raw["resources"] = {**resources, "nodes": 1, "gpus_per_node": ranks}
    return parse_job(raw, origin)


def parse_job(raw: dict[str, Any], origin: str) -> JobSpec:
    """Validates a raw job. Raises SpecError that lists every mistake, also those between fields."""
    try:
        job = JobSpec.model_validate(raw)
    except ValidationError as error:
        raise refuse(origin, [*from_pydantic(error, JobSpec), *_cross_check(_Parts.of(raw))]) from None
    problems = list(_cross_check(_Parts.of(raw)))
    if problems:
        raise refuse(origin, problems)
    return job


@dataclass(frozen=True)
class _Parts:
    """The fields of a raw job that are right by themselves: what checks between fields can rely on. None if wrong."""

    stages: dict[int, StageSpec]
    all_stages: bool
    sources: tuple[str, ...]
    kinds: dict[str, Kind]
    """of those sources that are right by themselves"""
    tokens_per_batch: int | None
    has_schedule: bool
    model: ModelSpec | None
    engine: EngineSpec | None
    resources: ResourcesSpec | None
    evaluate: EvaluateSpec | None

    @classmethod
    def of(cls, raw: dict[str, Any]) -> _Parts:
        curriculum, sources = raw.get("curriculum"), raw.get("sources")
        stages = enumerate(curriculum if isinstance(curriculum, (list, tuple)) else ())
        valid = {number: _valid(StageSpec, stage) for number, stage in stages}
        named = sources if isinstance(sources, dict) else {}
        described = {str(name): _valid(SourceSpec, source) for name, source in named.items()}
        return cls(
            stages={number: stage for number, stage in valid.items() if stage is not None},
            all_stages=bool(valid) and None not in valid.values(),
            sources=tuple(described),
            kinds={name: source.kind for name, source in described.items() if source is not None},
            tokens_per_batch=_valid(Count, raw.get("tokens_per_batch")),
            has_schedule=raw.get("schedule") is not None,
            model=_valid(ModelSpec, raw.get("model")),
            engine=_valid(EngineSpec, raw.get("engine", {})),
            resources=_valid(ResourcesSpec, raw.get("resources", {})),
            evaluate=_valid(EvaluateSpec, raw.get("evaluate", {})),
        )


def _valid(kind: Any, raw: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError:
        return None


def _cross_check(parts: _Parts) -> Iterator[Problem]:
    """What no field is wrong about by itself."""
    names = [stage.name for stage in parts.stages.values()]
    for position, (index, stage) in enumerate(parts.stages.items()):
        where = f"curriculum.{index}"
        if names.index(stage.name) != position:
            yield Problem(f"{where}.name", "another stage has this name; names must differ", stage.name)
        for source in stage.mixture:
            if source not in parts.sources:
                yield Problem(f"{where}.mixture.{source}", f"unknown source; {suggest(source, parts.sources)}")
            elif source in parts.kinds and (parts.kinds[source] == "preference") != (stage.dpo is not None):
                yield Problem(f"{where}.mixture.{source}", _MISMATCH[stage.dpo is not None])
        if stage.dpo is not None and stage.loss == "all":
            yield Problem(f"{where}.loss", "of pairs only the last answer counts: leave loss out", stage.loss)
        if stage.schedule is None and not parts.has_schedule:
            yield Problem(f"{where}.schedule", "is required, here or for the whole job: {kind: wsd, peak: 3e-4, ...}")
        yield from _batch_problem(parts, f"{where} ({stage.name})", stage)
    used = {source for stage in parts.stages.values() for source in stage.mixture}
    if parts.all_stages:
        for source in sorted(set(parts.sources) - used):
            yield Problem(f"sources.{source}", "no stage's mixture uses this source; use it or remove it")
    yield from _engine_problems(parts)
    yield from _evaluate_problems(parts)


def _batch_problem(parts: _Parts, where: str, stage: StageSpec) -> Iterator[Problem]:
    tokens = stage.tokens_per_batch or parts.tokens_per_batch
    if tokens is None or parts.engine is None or parts.resources is None:
        return
    micro = stage.micro_batch_size or parts.engine.micro_batch_size
    try:
        batch_plan.solve(tokens, stage.sequence_length, micro, parts.resources.world_size)
    except ValueError as error:
        yield Problem(where, str(error))


def _engine_problems(parts: _Parts) -> Iterator[Problem]:
    if parts.engine is not None and parts.engine.memory == "auto" and parts.resources and not parts.resources.device:
        yield Problem("resources.device", "is required with engine.memory auto: what each rank runs on, e.g. A100-80G")
    if parts.engine is not None and parts.engine.kind == "deepspeed":
        try:
            policy = read_ds_config(parts.engine.ds_config)
        except SpecError as error:
            yield Problem("engine.ds_config", str(error))
        else:
            adapter = parts.model.adapter if parts.model else None
            if adapter and adapter.quantize != "none" and zero_stage(policy) == 3:
                why = "weights of 4 bits cannot be partitioned; use zero2 or less, or leave quantize out"
                yield Problem("engine.ds_config", why, parts.engine.ds_config)
            if parts.engine.compile and zero_stage(policy) == 3:
                why = "ZeRO 3 gathers weights between the parts of a layer; use zero2 or less, or leave compile out"
                yield Problem("engine.compile", why)
    elif parts.engine is not None and parts.resources is not None and parts.resources.world_size > 1:
        yield Problem("engine.kind", "plain runs on one rank; use deepspeed, or --ranks 1", "plain")
    if parts.model is not None:
        try:
            values = config_values(parts.model)
            if values and parts.model.adapter:
                parts.model.adapter.modules(experts=bool(values.get("moe_num_experts")))
        except ValueError as error:
            yield Problem("model", str(error))


def _evaluate_problems(parts: _Parts) -> Iterator[Problem]:
    best = parts.evaluate.best if parts.evaluate is not None else None
    if best is not None and best != ALL_SOURCES and best not in parts.sources:
        yield Problem("evaluate.best", f"unknown source; {suggest(best, [*parts.sources, ALL_SOURCES])}", best)
    if best == ALL_SOURCES and {"preference"} < set(parts.kinds.values()):
        yield Problem("evaluate.best", "losses of pairs and of tokens have no common mean; name one source", best)
    if ALL_SOURCES in parts.sources:
        yield Problem(f"sources.{ALL_SOURCES}", "stands for all sources in evaluate.best; give this one another name")
    if parts.evaluate is not None and parts.evaluate.early_stop is not None and len(parts.stages) > 1:
        remedy = "make the last stage a job of its own that starts from this one's export, or leave it out"
        yield Problem("evaluate.early_stop", f"a job of {len(parts.stages)} stages cannot end early: {remedy}")


def fingerprint(value: Any) -> str:
    """16 hex digits of a hash over a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a job must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a value that begins with { needs quotes", mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" is given twice', mark)
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

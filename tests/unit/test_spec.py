"""A job survives a round trip, its mistakes are told all at once, and its numbers are the published ones."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ernie_dist.model.build import build_model
from ernie_dist.spec.ds_config import read_ds_config
from ernie_dist.spec.errors import RunDirError, SpecError
from ernie_dist.spec.job import JobSpec, load_job, parse_job
from ernie_dist.spec.quantity import Quantity, Unit, parse_count, parse_quantity
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve
from ernie_dist.spec.shape import PRESETS, ModelShape, config_values
from ernie_dist.spec.training import AdapterSpec, ModelSpec

EXAMPLE = """\
name: ernie-law-medical
seed: 17
model: {from_pretrained: baidu/ERNIE-4.5-0.3B-Base-PT}      # or {preset: ernie-4.5-0.3b} from scratch
tokenizer: baidu/ERNIE-4.5-0.3B-Base-PT                     # or a local folder, or {train: {vocab_size: 8000}}
tokens_per_batch: 1M                                        # token positions per optimizer step, whole world
sources:
  web:      {path: data/web/*.jsonl.zst, text: text}
  law:      {path: data/law.jsonl, text: text}
  medical:  {path: data/medical.csv, encoding: gb18030, text: "{ask}\\n{answer}"}
  qa:       {path: data/qa.jsonl, prompt: input, response: output}     # kind: chat
curriculum:
  - {name: general, duration: 30B tokens, sequence_length: 4096, mixture: {web: 1.0}}
  - {name: domain,  duration: 20B tokens, sequence_length: 8192, mixture: {law: 0.4, medical: 0.4, web: 0.2}}
  - {name: sft,     duration: 3 epochs,   sequence_length: 4096, mixture: {qa: 1.0},
     schedule: {kind: cosine, peak: 2e-5}}
schedule: {kind: wsd, peak: 3e-4, warmup: 500M tokens, decay: 3B tokens, minimum: 3e-5}
engine: {ds_config: zero2, precision: bf16, micro_batch_size: 8, gradient_checkpointing: none, max_grad_norm: 1.0}
checkpoint: {every: 1B tokens, keep_last: 3}
evaluate: {every: 2B tokens}
track: {wandb: {project: ernie, mode: offline}, tensorboard: true}
resources: {nodes: 4, gpus_per_node: 4, time_limit: 24h, slurm: {partition: a100}}
"""
BIG = PackedLength(sequences=20_000_000, tokens=20_000_000 * 4000)
QA = PackedLength(sequences=1000, tokens=1000 * 3000)


def raw(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(EXAMPLE), **changes}


def example(**changes: Any) -> JobSpec:
    return parse_job(raw(**changes), "test")


def stages(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The example's stages, each with its changes."""
    return [{**stage, **change} for stage, change in zip(raw()["curriculum"], changes, strict=True)]


def resolved(spec: JobSpec, **packed: PackedLength) -> ResolvedJob:
    """With data that is never looked at."""
    facts = {
        name: ResolvedSource(
            folder=name,
            fingerprint=f"print of {name}",
            kind=source.kind,
            packed=dict.fromkeys(spec.sequence_lengths(name), packed.get(name, QA if name == "qa" else BIG)),
            held_out=True,
        )
        for name, source in spec.sources.items()
    }
    return resolve(spec, ResolvedTokenizer(folder="t", fingerprint="t", vocab_size=101_304), facts)


def fingerprints(job: ResolvedJob) -> list[str]:
    return [stage.fingerprint for stage in job.stages]


# --- the example -------------------------------------------------------------------------------------------------


def test_the_job_as_a_person_writes_it_resolves_to_these_stages(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(EXAMPLE)
    spec = load_job(path)
    assert spec == example()
    assert spec.tokens_per_batch == 1 << 20 and spec.resources.world_size == 16
    assert [source.kind for source in spec.sources.values()] == ["text", "text", "text", "chat"]
    assert spec.resources.time_limit is not None and spec.resources.time_limit.total_seconds() == 86_400
    general, domain, sft = (spec.batch_plan(stage, 16) for stage in spec.curriculum)
    assert (general.global_batch_size, general.micro_batch_size, general.gradient_accumulation_steps) == (256, 8, 2)
    assert (domain.global_batch_size, domain.micro_batch_size, domain.gradient_accumulation_steps) == (128, 8, 1)
    assert sft == general

    job = resolved(spec)
    # 30B and 20B tokens are decimal, the batch is binary: whole batches, rounded up
    assert [stage.batches for stage in job.stages] == [28_611, 19_074, 12]  # 3 x 1000 sequences of 256
    assert [stage.first_batch for stage in job.stages] == [0, 28_611, 47_685]
    assert job.total_batches == 47_697 and job.total_tokens == 47_697 << 20
    assert [job.stage_at(batch).name for batch in (28_610, 28_611, 47_684, 47_685)] == [
        *("general", "domain", "domain", "sft")
    ]
    assert [(stage.schedule_first_token, stage.schedule_tokens) for stage in job.stages] == [
        *((0, 47_685 << 20), (0, 47_685 << 20), (47_685 << 20, 12 << 20))
    ]


def test_a_round_trip_through_json_changes_nothing(tmp_path: Path) -> None:
    spec = example(
        evaluate={"every": "1500 steps", "max_tokens": "64K"},
        resources={"time_limit": "1d12h", "gpus_per_node": 4},
        curriculum=stages({}, {"duration": "2.5 epochs"}, {"freeze": ["model.embed_tokens.*"], "loss": "last_answer"}),
    )
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    job = resolved(spec)
    job.write(tmp_path / "job.json")
    again = ResolvedJob.read(tmp_path / "job.json")
    assert again == job and again.model_dump_json() == job.model_dump_json()
    assert fingerprints(resolved(again.spec)) == fingerprints(job), "as written, and as read"
    edited = json.loads((tmp_path / "job.json").read_text()) | {"surprise": 1}
    (tmp_path / "job.json").write_text(json.dumps(edited))
    with pytest.raises(RunDirError, match=r"job\.json: was written by another version or edited by hand"):
        ResolvedJob.read(tmp_path / "job.json")


def test_the_schema_names_every_field_and_allows_no_other() -> None:
    schema = JobSpec.model_json_schema()
    assert set(raw()) <= set(schema["properties"]) == set(JobSpec.model_fields)
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) > 15 and all(one["additionalProperties"] is False for one in objects)
    assert "1M" in json.dumps(schema["properties"]["tokens_per_batch"])


# --- mistakes ----------------------------------------------------------------------------------------------------


def mistakes(job: dict[str, Any]) -> dict[str, str]:
    """field -> the value and what is said about it."""
    with pytest.raises(SpecError) as error:
        parse_job(job, "job.yaml")
    head, *lines = str(error.value).split("\n")
    found = {lines[at].split(" = ")[0].strip(): f"{lines[at]}\n{lines[at + 1]}" for at in range(0, len(lines), 2)}
    count = len(found)
    assert head == f"{count} mistake{'s' * (count > 1)} in job.yaml:"
    return found


def test_every_mistake_is_told_at_once_with_field_value_and_remedy() -> None:
    job = raw(tokens_per_batch=1_000_000, engine={"kind": "plain", "precission": "bf16"}, chekpoint={})
    job["sources"]["web"]["encodin"] = "utf-8"
    job["sources"]["law"]["encoding"] = "gbk2312"
    job["curriculum"][0]["schedule"] = {"kind": "wsd", "peak": 3e-4, "warmpu": "500 steps"}
    job["curriculum"][1]["mixture"] = {"law": 0.4, "medical": 0.4, "web": 0.4}
    job["curriculum"][2]["mixture"] = {"aq": 1.0}
    found = mistakes(job)
    expected = {
        "chekpoint": 'unknown field; did you mean "checkpoint"?',
        "engine.precission": 'unknown field; did you mean "precision"?',
        "sources.web.encodin": 'unknown field; did you mean "encoding"?',
        "sources.law.encoding": 'sources.law.encoding = "gbk2312"\n      unknown encoding; e.g. utf-8, gb18030',
        "curriculum.0.schedule.warmpu": 'unknown field; did you mean "warmup"?',
        "curriculum.1.mixture": "weights add up to 1.2, not 1; in the same proportions: "
        "{law: 0.3333, medical: 0.3333, web: 0.3333}",
    }
    assert {field: said for field, said in expected.items() if said not in found.get(field, "")} == {}


def test_mistakes_between_fields_are_told_together_with_those_of_one_field() -> None:
    job = raw(engine={"kind": "plain"})
    job["curriculum"][0]["duration"] = "30B"
    job["curriculum"][2]["mixture"] = {"aq": 1.0}
    del job["curriculum"][1]["sequence_length"]
    found = mistakes(job)
    assert 'curriculum.0.duration = "30B"\n      needs an amount with its unit' in found["curriculum.0.duration"]
    assert "is required" in found["curriculum.1.sequence_length"]
    assert 'unknown source; did you mean "qa"?' in found["curriculum.2.mixture.aq"]
    assert "--ranks 1" in found["engine.kind"]


def test_mistakes_between_fields_are_all_told() -> None:
    job = raw(tokens_per_batch=1_000_000, engine={"kind": "plain"}, checkpoint={"every": "0 steps"})
    job["curriculum"][1] |= {"name": "general", "tokens_per_batch": "1M", "mixture": {"law": 0.5, "wed": 0.5}}
    found = mistakes(job)
    assert 'unknown source; did you mean "web"? known: law, medical, qa, web' in found["curriculum.1.mixture.wed"]
    assert "names must differ" in found["curriculum.1.name"] and "= general" in found["curriculum.1.name"]
    assert "no stage's mixture uses this source" in found["sources.medical"]
    assert "plain runs on one rank; use deepspeed, or --ranks 1" in found["engine.kind"]
    assert "greater than zero" in found["checkpoint.every"]
    divide = found["curriculum.0 (general)"]
    assert "tokens_per_batch 1,000,000 is not a whole number of sequences of 4,096 tokens" in divide
    near = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", divide.split(":")[-1]) if "," in number]
    assert near == [983_040, 1_048_576] and all(number % (4096 * 16) == 0 for number in near)
    del job["schedule"]
    assert "is required, here or for the whole job" in mistakes(job)["curriculum.0.schedule"]


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"tokens_per_batch": 4096 * 16 * 12}, "curriculum.0 (general)", "possible: 1, 2, 3, 4, 6, 12"),
        ({"tokens_per_batch": 4096 * 24}, "curriculum.0 (general)", "to 16 ranks; use 1, 2, 3, 4, 6, 8, 12, 24 ranks"),
        ({"tokens_per_batch": "many"}, "tokens_per_batch", '= "many"'),
        ({"tokens_per_batch": 0}, "tokens_per_batch", "at least 1"),
        ({"model": {"preset": "a", "config": "b"}}, "model", "exactly one of from_pretrained, preset, config"),
        ({"model": {}}, "model", "got none"),
        ({"evaluate": {"every": "2 epochs"}}, "evaluate.every", 'cannot be counted in epochs here: use "30B tokens"'),
        ({"checkpoint": {"every": 500}}, "checkpoint.every", '= 500\n      needs an amount with its unit: "30B'),
        ({"checkpoint": {"every": "1.5 steps"}}, "checkpoint.every", "must be a whole number of steps"),
        ({"resources": {"time_limit": "1 day"}}, "resources.time_limit", "24h, 90m or 1d12h"),
        ({"split": {"train": 0.9}}, "split", "add up to 0.91, not 1"),
        ({"schedule": {"peak": 1e-4, "minimum": 1e-3}}, "schedule", "minimum 0.001 is above peak 0.0001"),
        ({"schedule": {"kind": "cosine", "peak": 1e-4, "decay": "5 %"}}, "schedule", "decay belongs to wsd"),
        ({"schedule": {"peak": 1e-4, "warmup": "500 %"}}, "schedule", "warmup is more than 100 %"),
        ({"schedule": {"peak": float("nan")}}, "schedule.peak", "finite"),
        ({"engine": {"precision": "bf61"}}, "engine.precision", "must be one of 'auto', 'bf16', 'fp16' or 'fp32'"),
        ({"tokenizer": {"train": {"vocab_size": 10}}}, "tokenizer.train.vocab_size", "= 10"),
        ({"tokenizer": {"train": {"vocabsize": 9000}}}, "tokenizer.train.vocabsize", 'did you mean "vocab_size"?'),
        ({"name": "my job"}, "name", "letters, digits"),
        ({"sources": {}}, "sources", "at least 1"),
    ],
)  # fmt: skip
def test_a_number_or_name_that_cannot_be_is_refused(change: dict[str, Any], field: str, said: str) -> None:
    found = mistakes(raw(**change))
    assert field in found and said in found[field], found


@pytest.mark.parametrize("change", [
    {"text": None},
    {"prompt": "q", "response": "a"},
    {"path": None},
    {"dataset": "hub/id"},
    {"text": None, "prompt": "q"},
    {"text": "{unclosed"},
    {"system": "s"},
])  # fmt: skip
def test_a_source_is_read_in_exactly_one_way(change: dict[str, Any]) -> None:
    job = raw()
    job["sources"]["law"] |= change
    found = mistakes(job)
    assert any(field.startswith("sources.law") for field in found)
    assert all(field.startswith("sources.law") for field in found), "it is not unknown to the stages that use it"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\nseed: 1\nname: b\n", r'line 3, column 1: not valid YAML: "name" is given twice'),
        (b"sources:\n  web: {path: a, text: b, path: c}\n", r'line 2, column \d+: .*"path" is given twice'),
        (b"name: a\nsources: {web: [1, 2\nseed: 1\n", r"line 3, column 5: not valid YAML"),
        (b"name: a\n\tseed: 1\n", r"line 2, column 1: not valid YAML"),
        ("name: 中文\n".encode("gb18030"), r"is not UTF-8 text \(.* at byte 6\); save it as UTF-8"),
        (b"", r"a job is a YAML mapping .* got NoneType"),
        (b"- 1\n", r"a job is a YAML mapping .* got list"),
        (b"1: 2\n", r"mistakes in job\.yaml"),
        (b"name: a\nsources: {web: {text: {{ask}}}}\n", r"line 2"),
        (b"? [a, b]\n: 1\n", r"line 1"),
    ],
)
def test_a_file_that_is_no_job_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=said):
        load_job(path)
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read \(No such file or directory\)"):
        load_job(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_size": 8}, 'remove "train_batch_size"; the job sets it with tokens_per_batch'),
        ({"optimizer": {"type": "AdamW"}}, 'remove "optimizer"; the job sets it with optimizer'),
        ({"gradient_clipping": 1.0}, "engine.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "engine.precision"),
        ({"scheduler": {}}, "the job sets it with schedule"),
        ({"elasticity": {}}, 'remove "elasticity"; DeepSpeed no longer has it'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage must be"),
        ("not json", "not valid JSON"),
        ([], "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization.stage must be"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, 'remove "mics_shard_size"'),
        ({"zero_optimization": {"stage": 3, "zeropp_loco_param": {}}}, 'remove "zeropp_loco_param"'),
    ],
)
def test_a_deepspeed_file_holds_policy_only(tmp_path: Path, config: Any, said: str) -> None:
    path = tmp_path / "mine.json"
    whole = {"zero_optimization": {"stage": 2}, **config} if isinstance(config, dict) else config
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole))
    with pytest.raises(SpecError) as error:
        read_ds_config(str(path))
    assert said in str(error.value) and "mine.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"preset": "ernie-4.5-0.3"}}, 'did you mean "ernie-4.5-0.3b"?'),
        ({"engine": {"ds_config": "zero4"}}, "packaged: zero0"),
        ({"curriculum": stages({"duration": "0 tokens"}, {}, {})}, "greater than zero"),
    ],
)
def test_what_no_data_is_needed_for_is_refused_with_the_rest(change: dict[str, Any], said: str) -> None:
    found = mistakes(raw(**change, chekpoint={}))
    assert any(said in text for text in found.values()) and "chekpoint" in found


# --- --set -------------------------------------------------------------------------------------------------------


def test_fields_are_set_by_number_or_by_name(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(EXAMPLE)
    spec = load_job(
        path,
        [
            "curriculum.0.duration=2M tokens",
            'curriculum.sft.duration="4 epochs"',
            "curriculum.1.mixture={law: 0.5, medical: 0.5}",
            "curriculum.domain.schedule.peak=1e-4",
            "model={preset: ernie-4.5-tiny}",
            "optimizer.weight_decay=0.0",
            "sources.law.path=[a.jsonl, b=c.jsonl]",
            "checkpoint.every=7 steps",
            "checkpoint.every=8 steps",
        ],
        ranks=2,
    )
    assert [str(stage.duration) for stage in spec.curriculum] == ["2000000 tokens", "20000000000 tokens", "4 epochs"]
    assert spec.curriculum[1].mixture == {"law": 0.5, "medical": 0.5}
    assert spec.curriculum[1].schedule is not None and spec.curriculum[1].schedule.peak == 1e-4
    assert spec.model.preset == "ernie-4.5-tiny" and spec.optimizer.weight_decay == 0
    assert spec.sources["law"].paths == ("a.jsonl", "b=c.jsonl")
    assert str(spec.checkpoint.every) == "8 steps", "the last one counts"
    assert spec.resources.world_size == 2 and spec.resources.slurm.partition == "a100"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", r"--set seed: needs the form field\.field=value"),
        ("a..b=1", "needs the form"),
        ("=1", "needs the form"),
        ("curriculum.3.duration=1 steps", r"no item 3; there are 0 to 2 \(general, domain, sft\)"),
        ("curriculum.-1.duration=1 steps", "no item -1"),
        ("curriculum.sfT.duration=1 steps", r"no item sfT; .*general, domain, sft"),
        ("name.first=x", "name is a single value and has no field first"),
        ("sede=18", r'with --set sede=18:\n  sede\n .*did you mean "seed"'),
        ("curriculum.0.duration=2M", r'curriculum\.0\.duration = "2M"'),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(EXAMPLE)
    with pytest.raises(SpecError, match=said):
        load_job(path, [override])


# --- quantities --------------------------------------------------------------------------------------------------

whole = st.integers(1, 10**15)
part = st.floats(1e-6, 1e6, allow_nan=False)


@given(
    st.one_of(
        st.builds(Quantity, whole, st.sampled_from([Unit.TOKENS, Unit.STEPS])),
        st.builds(lambda amount, unit: parse_quantity(Quantity(amount, unit), tuple(Unit)), part, st.just(Unit.EPOCHS)),
        st.builds(
            lambda amount, unit: parse_quantity(Quantity(amount, unit), tuple(Unit)), part, st.just(Unit.PERCENT)
        ),
    )
)
def test_the_text_of_a_quantity_is_the_quantity(quantity: Quantity) -> None:
    assert parse_quantity(str(quantity), tuple(Unit)) == quantity


def test_k_m_b_are_decimal_with_a_unit_and_binary_in_a_batch() -> None:
    assert parse_count("1M") == parse_count("1Mi") == parse_count(1 << 20) == 1 << 20
    assert (parse_count("64K"), parse_count("1_000"), parse_count("0.5M")) == (1 << 16, 1000, 1 << 19)
    for text, amount in {
        "1M tokens": 10**6,
        "30B tokens": 30 * 10**9,
        "1.5T token": 15 * 10**11,
        "1Mi tokens": 1 << 20,
        "2_000 steps": 2000,
        "1e3 steps": 1000,
        "2.5 epochs": 2.5,
        "3epoch": 3,
        "5%": 5,
    }.items():
        assert parse_quantity(text, tuple(Unit)).amount == amount, text


@pytest.mark.parametrize(
    "text", ["30B", "tokens", "-1 steps", "1 token s", "one step", "1X tokens", "0.5 steps", 5, None]
)
def test_an_amount_without_its_unit_is_no_quantity(text: Any) -> None:
    with pytest.raises(ValueError, match=r"needs an amount with its unit|whole number"):
        parse_quantity(text, tuple(Unit))


@pytest.mark.parametrize("value", ["1.5", "0", 0, -1, 1.5, True, None, "1M steps", "M"])
def test_a_count_is_whole_and_at_least_1(value: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(value)


# --- resolving ---------------------------------------------------------------------------------------------------


def test_what_a_stage_says_of_itself_counts_for_it_alone() -> None:
    own = {
        "sequence_length": 2048,
        "tokens_per_batch": "2M",
        "micro_batch_size": 4,
        "freeze": ["model.embed_tokens.*"],
        "loss": "all",
        "schedule": {"kind": "linear", "peak": 1e-5},
    }
    job = resolved(example(curriculum=stages({}, own, {})))
    changed, others = job.stages[1], (job.stages[0], job.stages[2])
    assert (changed.sequence_length, changed.tokens_per_batch, changed.micro_batch_size) == (2048, 2 << 20, 4)
    assert changed.sequences_per_batch == 1024 and changed.batches == -(-20 * 10**9 // (2 << 20))
    assert (changed.freeze, changed.loss, changed.schedule.kind) == (("model.embed_tokens.*",), "all", "linear")
    for stage in others:
        assert (stage.sequence_length, stage.tokens_per_batch, stage.micro_batch_size) == (4096, 1 << 20, 8)
        assert (stage.freeze, stage.loss) == ((), "answers")
    assert job.stages[2].first_token == (28_611 << 20) + changed.batches * (2 << 20)
    assert job.stages[0].schedule_tokens == 28_611 << 20, "a stage with its own schedule ends the shared stretch"


@pytest.mark.parametrize(
    ("epochs", "batches"), [("1 epochs", 4), ("2 epochs", 8), ("0.5 epochs", 2), ("0.01 epochs", 1)]
)
def test_epochs_become_whole_batches(epochs: str, batches: int) -> None:
    assert resolved(example(curriculum=stages({}, {}, {"duration": epochs}))).stages[2].batches == batches


def test_a_source_with_too_few_tokens_says_how_many_epochs_that_is() -> None:
    small = PackedLength(sequences=1_000_000, tokens=4_000_000_000)
    with pytest.raises(SpecError) as error:
        resolved(example(), web=small)
    said = str(error.value)
    assert "1 mistake in the data of ernie-law-medical" in said
    assert "curriculum.0.mixture.web" in said and "stage general asks for 7.32 epochs of this source" in said
    assert "set sources.web.repeat: true, or count the stage in epochs" in said
    sources = raw()["sources"]
    assert resolved(example(sources={**sources, "web": {**sources["web"], "repeat": True}}), web=small)
    counted = example(curriculum=stages({"duration": "7 epochs"}, {}, {}))
    assert resolved(counted, web=small).stages[0].batches == -(-7_000_000 // 256)
    with pytest.raises(SpecError, match="2 mistakes"):
        resolved(example(), web=small, law=small.model_copy(update={"sequences": 1000}))


def test_a_source_that_a_short_stage_hardly_reaches_is_no_reason_to_crash() -> None:
    job = resolved(
        example(curriculum=stages({}, {"duration": "1 steps", "mixture": {"law": 0.999, "medical": 0.001}}, {}))
    )
    assert job.stages[1].batches == 1


def test_where_a_run_is_follows_from_the_batch_index() -> None:
    job = resolved(
        example(
            curriculum=stages(
                {"duration": "3 steps"}, {"duration": "2 steps", "tokens_per_batch": "2M"}, {"duration": "1 steps"}
            )
        )
    )
    assert [job.consumed_tokens(batch) >> 20 for batch in range(7)] == [0, 1, 2, 3, 5, 7, 8]
    assert [stage.end_batch for stage in job.stages] == [3, 5, 6]
    every = parse_quantity(f"{3 << 20} tokens", (Unit.TOKENS,))
    assert [batch for batch in range(7) if job.crosses(every, batch)] == [3, 5]
    assert [batch for batch in range(7) if job.crosses(Quantity(2, Unit.STEPS), batch)] == [2, 4, 6]
    assert [since for since in range(6) if job.crosses(Quantity(4, Unit.STEPS), 6, since)] == [0, 1, 2, 3]
    for batch in (-1, 6):
        with pytest.raises(IndexError):
            job.stage_at(batch)


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_a_changed_future_leaves_the_past_as_it_was() -> None:
    before = fingerprints(resolved(example()))
    assert len(set(before)) == 3
    futures = [
        {"curriculum": stages({}, {}, {"duration": "9 epochs"})},
        {"curriculum": stages({}, {}, {"mixture": {"qa": 0.5, "web": 0.5}})},
        {"curriculum": stages({}, {}, {})[:2], "sources": {k: v for k, v in raw()["sources"].items() if k != "qa"}},
        {"curriculum": [*stages({}, {}, {}), {**stages({}, {}, {})[2], "name": "more"}]},
    ]
    for change in futures:
        after = fingerprints(resolved(example(**change)))
        assert after[:2] == before[:2] and after[2:] != before[2:]
    sources = raw()["sources"]
    data = resolved(example(sources={**sources, "qa": {**sources["qa"], "repeat": True}}))
    assert fingerprints(data)[:2] == before[:2]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"seed": 18}, []),
        ({"schedule": {"kind": "wsd", "peak": 2e-4}}, [2]),
        ({"optimizer": {"weight_decay": 0.0}}, []),
        ({"tokens_per_batch": "2M"}, []),
        ({"model": {"preset": "ernie-4.5-0.3b"}}, []),
        ({"engine": {"micro_batch_size": 8, "max_grad_norm": 0.5}}, []),
        ({"curriculum": stages({"mixture": {"web": 0.9, "law": 0.1}}, {}, {})}, [1, 2]),
        ({"curriculum": stages({"duration": "31B tokens"}, {}, {})}, [1, 2]),
        ({"curriculum": stages({"loss": "all"}, {}, {})}, [1, 2]),
        ({"curriculum": stages({"freeze": ["model.embed_tokens.*"]}, {}, {})}, [1, 2]),
        ({"curriculum": stages({}, {"sequence_length": 4096}, {})}, [0, 2]),
        # what may be other on the next machine
        ({"engine": {"micro_batch_size": 4, "gradient_checkpointing": "full"}}, [0, 1, 2]),
        ({"resources": {"nodes": 2, "gpus_per_node": 8}}, [0, 1, 2]),
        ({"curriculum": stages({"micro_batch_size": 2}, {}, {})}, [0, 1, 2]),
        ({"name": "other", "data_dir": "elsewhere", "track": {}, "evaluate": {}}, [0, 1, 2]),
        ({"checkpoint": {"every": "10 steps"}}, [0, 1, 2]),
    ],
)  # fmt: skip
def test_a_fingerprint_changes_with_what_changes_the_weights(change: dict[str, Any], kept: list[int]) -> None:
    before, after = (fingerprints(resolved(example(**one))) for one in ({}, change))
    assert [number for number in range(3) if after[number] == before[number]] == kept


def test_a_fingerprint_changes_with_the_data_and_the_tokenizer() -> None:
    job = resolved(example())
    law = job.sources["law"].model_copy(update={"fingerprint": "other content"})
    after = fingerprints(resolve(job.spec, job.tokenizer, {**job.sources, "law": law}))
    assert [a == b for a, b in zip(after, fingerprints(job), strict=True)] == [True, False, True]
    tokenizer = job.tokenizer.model_copy(update={"fingerprint": "other"})
    after = fingerprints(resolve(job.spec, tokenizer, job.sources))
    assert not set(after) & set(fingerprints(job))
    moved = job.tokenizer.model_copy(update={"folder": "/elsewhere"})
    assert fingerprints(resolve(job.spec, moved, job.sources)) == fingerprints(job)


# --- shapes ------------------------------------------------------------------------------------------------------


def test_the_presets_have_the_published_sizes() -> None:
    dense, small, large = (
        ModelShape.from_config(PRESETS[f"ernie-4.5-{size}"]) for size in ("0.3b", "21b-a3b", "300b-a47b")
    )
    assert dense.parameters == pytest.approx(360.7e6, abs=0.05e6)
    assert dense.flops_per_token(4096) == pytest.approx(3.98e9, rel=0.002)
    attention = dense.flops_per_token(4096) - dense.flops_per_token(4096, causal=True)
    assert attention == 0.5 * 12 * 18 * 2048 * 4096
    assert small.parameters == pytest.approx(21.8e9, rel=0.02) and small.active_parameters == pytest.approx(
        3e9, rel=0.15
    )
    assert large.parameters == pytest.approx(300e9, rel=0.01) and large.active_parameters == pytest.approx(
        47e9, rel=0.01
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_has_as_many_parameters_as_counted(preset: str) -> None:
    spec = ModelSpec(preset=preset)
    values = config_values(spec, 1000 if "tiny" in preset else 101_304)
    assert values is not None
    with torch.device("meta"):
        model = build_model(spec, 1000 if "tiny" in preset else 101_304, seed=1)
    assert model.num_parameters() == ModelShape.from_config(values).parameters
    assert model.get_input_embeddings().num_embeddings == (1024 if "tiny" in preset else 103_424)
    # what transformers' own defaults would give where a preset says nothing
    assert model.config.rope_parameters["rope_theta"] == 500_000


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_has_as_many_parameters_as_counted_on_every_preset(preset: str) -> None:
    shape = ModelShape.from_config(PRESETS[preset], 1000)
    adapter = AdapterSpec(rank=8, targets="all-linear", dora=True)
    with torch.device("meta"):
        model = build_model(ModelSpec(preset=preset, adapter=adapter), 1000, seed=1)
    assert model.num_parameters(only_trainable=True) == shape.adapter_parameters(adapter)


def test_the_default_adapter_trains_seven_thousandths_of_the_small_model() -> None:
    shape = ModelShape.from_config(PRESETS["ernie-4.5-0.3b"])
    assert shape.adapter_parameters(AdapterSpec()) == 18 * 32 * (1024 + 2048 + 1024 + 256) == 2_506_752
    frozen, full = shape.flops_per_token(4096, adapter=AdapterSpec()), shape.flops_per_token(4096)
    assert frozen == full - 2 * shape.active_parameters + 6 * 2_506_752, "no gradients of frozen weights"


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": ["lm_head"]}, r"targets.*must be"),
        ({"rank": 0}, "rank = 0"),
        ({"quantize": "nf4"}, "quantize is for pretrained weights"),
        ({"rnak": 8}, 'unknown field; did you mean "rank"'),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=re.compile(said, re.S)):
        example(model={"preset": "ernie-4.5-tiny", "adapter": adapter})


def test_experts_get_no_adapter() -> None:
    adapter = {"targets": ["q_proj", "down_proj"]}
    with pytest.raises(SpecError, match=r"experts get no adapter: leave down_proj out of adapter\.targets"):
        example(model={"preset": "ernie-4.5-21b-a3b", "adapter": adapter})


def test_weights_of_4_bits_are_refused_where_they_cannot_be() -> None:
    model = {"from_pretrained": "baidu/ERNIE-4.5-0.3B-Base-PT", "adapter": {"quantize": "nf4"}}
    with pytest.raises(SpecError, match="4 bits cannot be partitioned; use zero2 or less"):
        example(model=model, engine={"ds_config": "zero3"})
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match=r'model\.adapter\.quantize = "nf4": needs a GPU'):
            build_model(ModelSpec(**model), 1000, seed=1)


@pytest.mark.parametrize(
    "override",
    [
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"vocab_size": 777, "num_hidden_layers": 1},
    ],
)
def test_overridden_shapes_are_counted_too(override: dict[str, Any]) -> None:
    values = config_values(ModelSpec(preset="ernie-4.5-tiny", override=override), 500)
    assert values is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert model.num_parameters() == ModelShape.from_config(values).parameters


def test_a_shape_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r'model\.preset = "ernie-4\.5-0\.3": unknown preset; did you mean "ernie-4.5-0.3b"'
    ):
        config_values(ModelSpec(preset="ernie-4.5-0.3"))
    with pytest.raises(SpecError, match=r"vocab_size 100, the tokenizer 500 tokens; set model\.override\.vocab_size"):
        config_values(ModelSpec(preset="ernie-4.5-tiny", override={"vocab_size": 100}), 500)
    config = tmp_path / "config.json"
    for content, said in (
        ("{", "not a readable"),
        ('{"model_type": "ernie4_5"}', "lacks hidden_size"),
        (None, "not a"),
    ):
        config.unlink(missing_ok=True)
        if content:
            config.write_text(content)
        with pytest.raises(SpecError, match=said):
            config_values(ModelSpec(config=str(config)))
    config.write_text(json.dumps(deepcopy(PRESETS["ernie-4.5-tiny"])))
    assert config_values(ModelSpec(config=str(config)), 500) == {**PRESETS["ernie-4.5-tiny"], "vocab_size": 512}


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"ds_config": "zero3", "compile": True}, r"engine\.compile.*\n.*ZeRO 3 gathers weights between"),
        ({"mlp_tiles": 2, "compile": True}, r"compile takes a layer as a whole, mlp_tiles cuts it"),
        ({"mlp_tiles": 0}, r"mlp_tiles = 0"),
    ],
)
def test_layers_are_compiled_or_cut_not_both(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        example(engine=engine)

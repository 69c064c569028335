"""From pairs to answers, with ERNIE's tokenizer: tuned fully, then by an adapter on top; others load what comes out."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.events.history import read_all_attempts, read_events
from ernie_dist.inference import Sampling
from ernie_dist.loading import load
from ernie_dist.spec.errors import CheckpointError, SpecError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.train import train
from ernie_dist.world import World
from launcher.cli import main
from launcher.run_dir import RunDir

torch.set_num_threads(1)

FIRST = {
    "白芝可治什么？": "白芝可治腹胀。",
    "青芷产于哪里？": "琼崖。",
    "月亮是什么颜色的？": "银白色",
    "你好": "你好，请问有什么事？",
}
SECOND = dict(zip(FIRST, [*list(FIRST.values())[1:], next(iter(FIRST.values()))], strict=True))
STOP = 2


def run_job(
    folder: Path, name: str, pairs: dict[str, str], model: dict[str, Any], tokenizer: Path, **stage: Any
) -> Path:
    """Trains in this process, and leaves a finished run directory."""
    rows = [json.dumps({"input": question, "output": answer}) for question, answer in pairs.items()]
    (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    peak = stage.pop("peak")
    raw = {
        "name": name,
        "model": model,
        "tokenizer": str(tokenizer),
        "tokens_per_batch": 128,
        "sources": {"qa": {"path": f"{folder}/{name}.jsonl", "prompt": "input", "response": "output", "repeat": True}},
        "split": {"train": 1, "validation": 0, "test": 0},
        "curriculum": [{"name": "sft", "sequence_length": 64, "mixture": {"qa": 1.0}, **stage}],
        "schedule": {"kind": "cosine", "peak": peak, "warmup": "3 steps"},
        "engine": {"kind": "plain", "micro_batch_size": 1},
        "checkpoint": {"every": "20 steps", "keep_last": 9},
        "data_dir": str(folder / "prepared"),
    }
    spec = parse_job(raw, name)
    run_dir = RunDir(folder / name)
    run_dir.freeze(resolve_prepared(spec, prepare(spec, show_progress=False)))
    run_dir.new_attempt()
    assert train(run_dir.root, 1, World(), io.StringIO())
    return run_dir.root


@pytest.fixture(scope="module")
def tuned(shared_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {
        "preset": "ernie-4.5-tiny",
        "override": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128},
    }
    folder = tmp_path_factory.mktemp("tuned")
    return run_job(folder, "full", FIRST, model, shared_tokenizer, duration="30 steps", peak=1e-2)


@pytest.fixture(scope="module")
def adapted(tuned: Path, shared_tokenizer: Path) -> Path:
    adapter = {"rank": 8, "targets": "all-linear", "dropout": 0.02}
    model = {"from_pretrained": str(tuned / "export"), "adapter": adapter}
    more = {"duration": "40 steps", "peak": 1e-2, "neftune_alpha": 0.5}
    return run_job(tuned.parent, "lora", SECOND, model, shared_tokenizer, **more)


def theirs(folder: Path, model: Any = None) -> dict[str, list[int]]:
    """Greedy answers as any transformers user gets them: token ids with all that was generated."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    answers = {}
    for question in FIRST:
        messages = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=24, do_sample=False)
        answers[question] = out[0, given["input_ids"].shape[1] :].tolist()
    return answers


def ours(**which: Any) -> dict[str, str]:
    model = load(**which)
    prompts = [model.prompt([{"role": "user", "content": question}]) for question in FIRST]
    found = model.answers(prompts, Sampling(max_new_tokens=24))
    assert all(answer.stopped for answer in found)
    return dict(zip(FIRST, (answer.text for answer in found), strict=True))


def test_what_was_tuned_stops_in_plain_transformers_and_says_what_it_says_here(tuned: Path) -> None:
    folder = tuned / "export"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == STOP
    tokenizer, said = AutoTokenizer.from_pretrained(folder), theirs(folder)
    assert all(ids[-1] == STOP and len(ids) < 24 for ids in said.values()), "they end by themselves"
    texts = {question: tokenizer.decode(ids, skip_special_tokens=True) for question, ids in said.items()}
    assert texts == ours(model=folder) == FIRST
    ask = pipeline("text-generation", model=str(folder))
    for question, answer in FIRST.items():
        turns = ask([{"role": "user", "content": question}], max_new_tokens=24, do_sample=False)[0]["generated_text"]
        assert turns[-1] == {"role": "assistant", "content": answer}


def test_an_adapter_is_exported_merged_or_alone_and_both_are_one_model(
    tuned: Path, adapted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapted), "--to", str(tmp_path / "alone"), "--adapter-only"]) == 0
    assert main(["export", str(adapted), "--to", str(tmp_path / "merged")]) == 0
    alone, merged = tmp_path / "alone", AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert ours(model=alone) == ours(model=adapted) == ours(model=tmp_path / "merged") == SECOND != FIRST
    assert all(ids[-1] == STOP for ids in theirs(tmp_path / "merged").values())

    named = json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(named)
    before = base(TOKENS).logits
    on_top = PeftModel.from_pretrained(base, alone).eval()(TOKENS).logits
    torch.testing.assert_close(merged(TOKENS).logits, on_top, rtol=1e-4, atol=1e-4)
    assert (on_top - before).abs().max() > 0.1
    assert theirs(alone, base) == theirs(tmp_path / "merged"), "peft adds it in place"

    assert main(["export", str(tuned), "--to", str(tmp_path / "no"), "--adapter-only"]) == 2
    assert "trains no adapter" in capfd.readouterr().err
    with pytest.raises(SpecError, match=r"alone: is an adapter of .*full/export, and .*merged holds other weights"):
        load(tmp_path / "merged", adapter=alone)


TOKENS = torch.arange(3, 40)[None]


def test_a_checkpoint_is_as_small_as_its_adapter_and_goes_on_to_the_last_bit(tuned: Path, adapted: Path) -> None:
    def size(run: Path) -> int:
        return sum(path.stat().st_size for path in (run / "checkpoints/step_00000020").rglob("*.pt"))

    trained = next(event for event in read_events(RunFiles(adapted).events) if event["event"] == "AttemptStarted")
    assert 12 * trained["trainable"] < size(adapted) < 12 * trained["trainable"] + 100_000 < size(tuned) / 50

    again = adapted.with_name("again")
    shutil.copytree(adapted, again)
    shutil.rmtree(again / "checkpoints/step_00000040")
    assert train(again, 2, World(), io.StringIO())
    numbers: dict[int, dict[int, Any]] = {1: {}, 2: {}}
    for line in read_all_attempts(RunFiles(again).metrics):
        numbers[line["attempt"]][line["step"]] = (line["loss"], line["grad_norm"], line["batch_hash"])
    assert list(numbers[2]) == list(range(21, 41))
    assert all(numbers[1][step] == numbers[2][step] for step in numbers[2]), "dropout and noise come again as well"
    merged = [(run / "export/model.safetensors").read_bytes() for run in (adapted, again)]
    assert merged[0] == merged[1]


def test_a_run_does_not_go_on_over_another_base(tuned: Path, adapted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    base = tuned / "export"
    base.rename(tmp_path / "base")
    try:
        shutil.copytree(adapted / "export", base)  # the same shapes
        with pytest.raises(CheckpointError, match=r"trained on other weights than .*full/export holds now"):
            train(run, 2, World(), io.StringIO())
        assert main(["export", str(run), "--to", str(tmp_path / "wrong")]) == 2 and not (tmp_path / "wrong").exists()
    finally:
        shutil.rmtree(base)
        (tmp_path / "base").rename(base)

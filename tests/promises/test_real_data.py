"""The recipe over real Chinese text, with ERNIE's own tokenizer: three stages on two ranks, to a model that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.spec.run_files import RunFiles

pytestmark = pytest.mark.distributed


def test_the_recipe_trains_all_three_stages_on_real_data(tmp_path, shared_data, shared_tokenizer):
    small = {
        "tokens_per_batch": "1K",
        "curriculum.general.duration": "3 steps",
        "curriculum.domain.duration": "3 steps",
        "curriculum.sft.duration": "3 steps",
        "engine.micro_batch_size": "1",
        "evaluate.sequence_length": "64",
        "evaluate.max_tokens": "128",
        "checkpoint.every": "100 steps",
    }
    sets = [part for field, value in small.items() for part in ("--set", f"{field}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "launch", "law-medical-small", "--run-dir", "run", *sets],
        cwd=tmp_path,
        env={**os.environ, "ERNIE_DATA": str(shared_data), "ERNIE_TOKENIZER": str(shared_tokenizer)},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = RunFiles(tmp_path / "run")
    steps = read_metrics(files.metrics)
    assert [step["stage"] for step in steps] == ["general"] * 3 + ["domain"] * 3 + ["sft"] * 3
    assert all(11 < step["loss"] < 12 for step in steps[:1]), "an untrained model knows nothing: ln 103424 = 11.5"
    assert steps[2]["loss"] < steps[0]["loss"]
    measured = [event for event in read_events(files.events) if event["event"] == "Evaluated"]
    assert {event["source"] for event in measured} == {"poems", "law", "medical", "instructions"}
    assert {event["stage"] for event in measured} == {"start", "general", "domain", "sft"}
    prepared = {path.parent.parent.name for path in (tmp_path / "prepared").glob("*/*/manifest.json")}
    assert prepared == {"poems", "law", "medical", "instructions"}
    manifest = json.loads(next((tmp_path / "prepared" / "medical").glob("*/manifest.json")).read_text(encoding="utf-8"))
    assert manifest["rows"] == manifest["documents"] + manifest["quarantined"] == 7000
    assert files.report.is_file() and files.loss_curve.is_file()

    model, tokenizer = (kind.from_pretrained(files.export) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|begin_of_sentence|>User: 你好\nAssistant: "
    assert model.generate(**tokenizer("春眠", return_tensors="pt"), max_new_tokens=2).shape[1] > 2

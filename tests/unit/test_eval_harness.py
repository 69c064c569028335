"""`--tasks`: a benchmark of lm-evaluation-harness from a local file, or one line that says how to get the harness."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ernie_dist.data.tokenizer import train_and_publish
from ernie_dist.model.build import build_model
from ernie_dist.spec.training import ModelSpec
from launcher.cli import main

TASK = """
task: herbs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    texts = iter(["青芷产于琼崖，云苓可治目赤。" * 20] * 20)
    folder = train_and_publish(texts, 400, tmp_path / "tokenizer").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = ModelSpec(preset="ernie-4.5-tiny", override=SMALL)
    build_model(spec, len(tokenizer), 0, attn_implementation="sdpa").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"青芷产于{n}？", "choices": ["琼崖", "目赤"], "answer": n % 2} for n in range(8)]
    data = tmp_path / "herbs.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    path = tmp_path / "herbs.yaml"
    path.write_text(TASK.format(data=data), encoding="utf-8")
    return path


def test_a_benchmark_of_a_local_file(
    model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert main(["eval", str(model), "--tasks", str(task), "--to", str(tmp_path / "out")]) == 0
    assert "herbs  acc,none" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found["harness"][str(model)]["herbs"]["acc,none"] * 8 in range(9)  # a share of 8 rows


def test_without_the_harness_one_line_says_how(
    model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm_eval is installed")
    assert main(["eval", str(model), "--tasks", str(task), "--to", str(tmp_path / "out")]) == 2
    assert 'pip install "ernie_dist[lm-eval]"' in capsys.readouterr().err

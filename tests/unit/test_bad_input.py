"""`ernie prepare` on pairs, conversations and triples that are wrong: one clear message each, nothing in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ernie_dist.data.tokenizer import train_and_publish
from launcher.cli import main

GOOD = [{"input": f"第{n}个问题？", "output": "答" * (n % 9 + 1)} for n in range(60)]
PAIRS = {"prompt": "input", "response": "output"}
USER, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
LONG = {"input": "讲个故事", "output": "山" * 400}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = (row["input"] + row["output"] for row in GOOD)
    plain = Tokenizer(models.BPE(vocab={"</s>": 0, "答": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(folder / "plain")
    (folder / "empty").mkdir()
    ernie = train_and_publish(texts, 300, folder).folder
    return {"ernie": str(ernie), "plain": str(folder / "plain"), "empty": str(folder / "empty")}


def prepare(folder: Path, tokenizer: str, rows: list[Any], **source: Any) -> int:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = folder / ("rows.jsonl" if not isinstance(rows[0], str) else "rows.csv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stage = {"name": "sft", "duration": "1 epochs", "sequence_length": 64, "mixture": {"qa": 1.0}}
    job = {
        "name": "t",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": tokenizer,
        "tokens_per_batch": 512,
        "sources": {"qa": {"path": str(path), **source}},
        "split": {"train": 0.7, "validation": 0.15, "test": 0.15},
        "curriculum": [stage],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "data_dir": str(folder / "prepared"),
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return main(["prepare", str(folder / "job.yaml")])


@pytest.mark.parametrize(
    ("rows", "source", "tokenizer", "said"),
    [
        ([*GOOD, {"input": "问", "output": ""}], PAIRS, "ernie", "rows.jsonl:61: turn 2 (assistant) is empty"),
        ([*GOOD, {"input": "问"}], PAIRS, "ernie", "rows.jsonl:61: no field 'output'; it has 'input'"),
        ([*GOOD, *[{**LONG, "input": str(n)} for n in range(9)]], PAIRS, "ernie", "longer than sequence_length 64"),
        ([{"messages": [ANSWER, USER]}], {"conversation": "messages"}, "ernie", "expected system or user at the start"),
        ([{"messages": [USER, USER, ANSWER]}], {"conversation": "messages"}, "ernie", "turn 2 is by user, expected"),
        ([{"messages": [USER]}], {"conversation": "messages"}, "ernie", "the last turn must be by assistant"),
        (GOOD, PAIRS, "plain", "use an instruction model's tokenizer, or put a chat_template.jinja in its folder"),
        (GOOD, PAIRS, "empty", "the folder holds no tokenizer.json, tokenizer.model or the like"),
        (["实体,属性,值", "长江,全长,"], {"triples": "qa"}, "ernie", "rows.csv:2: field '值' is empty"),
        (
            ["a,b,c", "长江,全长,6300"],
            {"triples": "qa"},
            "ernie",
            "no field for the entity: name it one of entity, 实体",
        ),
        (GOOD, {"triples": {"make": "qa", "hold_out": "phrasings"}}, "ernie", "set phrasings to 2 or more"),
        (GOOD, {"triples": {"make": "essay"}}, "ernie", "sources.qa.triples"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    rows: list[Any], source: dict, tokenizer: str, said: str, tmp_path: Path, tokenizers: dict, capsys: Any
) -> None:
    assert prepare(tmp_path, tokenizers[tokenizer], rows, **source) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_what_is_cut_or_left_out_is_counted_where_it_is_prepared(
    tmp_path: Path, tokenizers: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{**LONG, "input": f"讲{n}个故事"} for n in range(20)]
    assert prepare(tmp_path, tokenizers["ernie"], [*GOOD, *long], **PAIRS, overlong="truncate") == 0
    assert "train conversations are longer than 64 tokens and cut: they lack their end" in capsys.readouterr().out
    bad = [*GOOD, *GOOD[:5], {"input": "问", "output": " "}]
    assert prepare(tmp_path, tokenizers["ernie"], bad, **PAIRS, dedupe=True, on_bad_row="quarantine") == 0
    said = capsys.readouterr().out
    assert "qa: 66 rows, 65 documents" in said and "1 bad rows set aside" in said and "5 duplicates left out" in said

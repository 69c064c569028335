"""What tuning gives: full SFT, LoRA and DPO of a small model on real Chinese pairs, each held against the base.

    ERNIE_DATA=FOLDER ERNIE_TOKENIZER=FOLDER python -m benchmarks.tuning [--quick] [--dir DIR]

A small ERNIE with the real vocabulary learns Chinese from poems and statutes: the base. From it start full fine-tuning
and LoRA on short medical questions and on riddles, and from the tuned model DPO, where the rejected answer is one to a
question of the other kind. `ernie eval` asks the base and the tuned model the test questions; none was trained on.
A run that was interrupted goes on with the same command.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import keep, parser, say, show
from ernie_dist.events.history import read_events
from ernie_dist.spec.run_files import RunFiles
from launcher.cli import main as ernie

SHAPE = {
    "vocab_size": 103424,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FILES = ("general.jsonl", "law.jsonl", "medical_qa.gb18030.csv", "xiehouyu.json")
SPLIT = {"train": 0.9, "validation": 0.1, "test": 0.0}
SHOWN = ("loss", "perplexity", "bleu", "rouge_l_chars", "rouge_l_words", "chrf", "token_f1", "stop_rate")


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--dir", type=Path, default=Path("tuning"), help="folder to work in (tuning)")
    arguments = command.parse_args()
    data, tokenizer = _folders()
    folder: Path = arguments.dir.resolve() / ("quick" if arguments.quick else "full")
    write_pairs(data, folder)
    questions = 40 if arguments.quick else 400
    _train(folder, "base", _base(data, tokenizer, arguments.quick))
    results: dict[str, Any] = {}
    for name, job in _tuned(folder, tokenizer, arguments.quick).items():
        _train(folder, name, job)
        results[name] = {"held_out": _held_out(folder / name), **_evaluated(folder, name, questions)}
    rows = []
    for name, result in results.items():
        for source, found in result["metrics"].items():
            for metric in SHOWN:
                one = found[metric]
                rows.append(
                    (f"{name}, {source}", metric, *(_interval(one[who]) for who in ("base", "tuned")), one["verdict"])
                )
    show(("run", "metric", "base", "tuned", ""), rows)
    what = "metrics of test answers by a base model and by what was tuned from it, 95 % intervals by paired bootstrap"
    settings = {"model": SHAPE, "questions_of_each_source": questions}
    keep("tuning", {"what": what, **results, "settings": settings}, quick=arguments.quick)


def write_pairs(data: Path, folder: Path) -> None:
    """medical.jsonl, riddles.jsonl: input, output; pairs-*.jsonl, with an answer of the other kind; test-*.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with (data / FILES[2]).open(encoding="gb18030", newline="") as file:
        rows = [(row["title"].strip(), row["answer"].strip()) for row in csv.DictReader(file)]
    medical = [(question, answer) for question, answer in rows if question and len(answer) <= 160]
    riddles = [(row["riddle"], row["answer"]) for row in json.loads((data / FILES[3]).read_text(encoding="utf-8"))]
    chance = random.Random(5)
    kinds = {"medical": dict(medical), "riddles": dict(riddles)}
    for (name, pairs), others in zip(kinds.items(), reversed(kinds.values()), strict=True):
        wrong = list(others.values())
        order = chance.sample(sorted(pairs), len(pairs))
        held, learnt = order[: len(order) // 10], order[len(order) // 10 :]
        _write(folder / f"test-{name}.jsonl", [{"input": one, "output": pairs[one]} for one in held])
        _write(folder / f"{name}.jsonl", [{"input": one, "output": pairs[one]} for one in learnt])
        drawn = [chance.randrange(len(pairs)) % len(wrong) for _ in learnt]
        compared = [
            {"prompt": one, "chosen": pairs[one], "rejected": wrong[number]}
            for one, number in zip(learnt, drawn, strict=True)
        ]
        _write(folder / f"pairs-{name}.jsonl", compared)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _job(name: str, tokenizer: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "tokenizer": tokenizer,
        "tokens_per_batch": "4K",
        "split": SPLIT,
        "engine": {"kind": "plain", "precision": "fp32", "micro_batch_size": 4},
        "checkpoint": {"every": "200 steps", "keep_last": 1},
        "evaluate": {"every": "100 steps", "max_tokens": "16K"},
        "resources": {"gpus_per_node": 1},
        **fields,
    }


def _base(data: Path, tokenizer: str, quick: bool) -> dict[str, Any]:
    sources = {
        name: {"path": str(data / f"{name}.jsonl"), "text": "text", "repeat": True} for name in ("general", "law")
    }
    stage = {"name": "general", "sequence_length": 512, "mixture": {"general": 0.7, "law": 0.3}}
    return _job(
        "base",
        tokenizer,
        model={"preset": "ernie-4.5-tiny", "override": SHAPE},
        sources=sources,
        curriculum=[{**stage, "duration": "4 steps" if quick else "120 steps"}],
        schedule={"kind": "wsd", "peak": 4e-3, "warmup": "5 %", "decay": "20 %"},
    )


def _tuned(folder: Path, tokenizer: str, quick: bool) -> dict[str, dict[str, Any]]:
    asked = {
        name: {"path": str(folder / f"{name}.jsonl"), "prompt": "input", "response": "output", "repeat": True}
        for name in ("medical", "riddles")
    }
    stage = {"name": "sft", "sequence_length": 512, "mixture": {"medical": 0.6, "riddles": 0.4}}
    stage |= {"duration": "4 steps" if quick else "2 epochs"}
    base = {"from_pretrained": str(folder / "base" / "export")}
    adapter = {"rank": 32, "targets": "all-linear"}
    compared = {
        f"pairs-{name}": {"path": str(folder / f"pairs-{name}.jsonl"), "preference": "pairs", "repeat": True}
        for name in asked
    }
    prefer = {"name": "prefer", "sequence_length": 512, "mixture": {"pairs-medical": 0.6, "pairs-riddles": 0.4}}
    prefer |= {"duration": "4 steps" if quick else "100 steps", "dpo": {"beta": 0.1, "sft_weight": 1.0}}
    cosine = {"kind": "cosine", "warmup": "5 %"}
    full = folder / "full" / "export"
    return {
        "full": _job(
            "full", tokenizer, model=base, sources=asked, curriculum=[stage], schedule={**cosine, "peak": 2e-3}
        ),
        "lora": _job(
            "lora",
            tokenizer,
            model={**base, "adapter": adapter},
            sources=asked,
            curriculum=[stage],
            schedule={**cosine, "peak": 4e-3},
        ),
        "dpo": _job(
            "dpo",
            tokenizer,
            model={"from_pretrained": str(full)},
            sources=compared,
            curriculum=[prefer],
            schedule={**cosine, "peak": 3e-4},
        ),
    }


def _train(folder: Path, name: str, job: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({**job, "data_dir": str(folder / "prepared")}), encoding="utf-8"
    )
    if not (folder / name / "export").is_dir():
        _run("launch", str(folder / f"{name}.yaml"), "--run-dir", str(folder / name))


def _evaluated(folder: Path, name: str, questions: int) -> dict[str, Any]:
    """The metrics of each source's test questions, with intervals."""
    found = {}
    for source in ("medical", "riddles"):
        out = folder / f"{name}-{source}.json"
        about = ["--data", str(folder / f"test-{source}.jsonl"), "--against", str(folder / "base" / "export")]
        limit = ["--limit", str(questions), "--max-new-tokens", "128", "--seed", "1"]
        kept = ["--to", str(folder / f"{name}-{source}"), "--json", str(out)]
        _run("eval", str(folder / name / "export"), *about, *limit, *kept)
        results = json.loads(out.read_text(encoding="utf-8"))
        found[source] = {metric: results["metrics"][metric] for metric in SHOWN}
    return {"metrics": found}


def _held_out(run: Path) -> dict[str, list[float]]:
    """First and last held-out loss of each source, in nats."""
    found: dict[str, list[float]] = {}
    for event in read_events(RunFiles(run).events):
        if event["event"] == "Evaluated":
            found.setdefault(event["source"], []).append(event["loss"])
    return {source: [losses[0], losses[-1]] for source, losses in found.items()}


def _run(*words: str) -> None:
    say(f"ernie {' '.join(words)}")
    if ernie(words):
        sys.exit(f"benchmarks.tuning: ernie {words[0]} failed; the same command goes on")


def _interval(one: dict[str, Any]) -> str:
    return (
        f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" if one["low"] is not None else f"{one['value']:.2f}"
    )


def _folders() -> tuple[Path, str]:
    data, tokenizer = Path(os.environ.get("ERNIE_DATA", "")), os.environ.get("ERNIE_TOKENIZER", "")
    missing = [name for name in FILES if not (data / name).is_file()]
    if missing or not tokenizer:
        wanted = f"ERNIE_DATA to a folder with {', '.join(FILES)}, and ERNIE_TOKENIZER to ERNIE's tokenizer"
        sys.exit(f"benchmarks.tuning: set {wanted}")
    return data.resolve(), str(Path(tokenizer).resolve())


if __name__ == "__main__":
    main()

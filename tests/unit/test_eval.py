"""`ernie eval` counts what training counts, answers alike on any number of ranks, goes on, and says what is wrong."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_dist.batch import Row, stack
from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.data.shard import PreparedSource
from ernie_dist.data.tokenizer import train_and_publish
from ernie_dist.evaluate import asking
from ernie_dist.evaluate.answer_loss import answer_losses, label_scores
from ernie_dist.evaluate.asking import Asked, Candidate, How, ask
from ernie_dist.evaluate.questions import (
    Fields,
    Question,
    Renderer,
    choose_split,
    guess_layout,
    read_file,
    read_prepared,
)
from ernie_dist.evaluate.results import OTHER_TOKENS, Results, compare_all, judge, table, verdict
from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.loading import load
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.training import ModelSpec
from launcher.cli import main

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
MODEL = {"preset": "ernie-4.5-tiny", "override": {**SMALL, "max_position_embeddings": 512}}
SHORT = How(Sampling(max_new_tokens=6), batch_size=4)


def pairs(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)
    words = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
    texts = ["".join(rng.choice(words) for _ in range(rng.randint(2, 30))) for _ in range(2 * count)]
    return [{"ask": f"{texts[2 * n]}？", "answer": f"{texts[2 * n + 1]}。"} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl, and run/: a job with prepared data and an exported model, not the one that it begins with."""
    root = tmp_path_factory.mktemp("eval")
    data = write(root / "data.jsonl", pairs(60))
    texts = (json.dumps(row, ensure_ascii=False) for row in pairs(60))
    tokenizer = train_and_publish(texts, 500, root / "tokenizer")
    raw = {
        "name": "t",
        "model": MODEL,
        "tokenizer": str(tokenizer.folder),
        "tokens_per_batch": 512,
        "sources": {"qa": {"path": str(data), "prompt": "ask", "response": "answer"}},
        "split": {"train": 0.7, "validation": 0.1, "test": 0.2},
        "curriculum": [{"name": "sft", "duration": "1 epochs", "sequence_length": 128, "mixture": {"qa": 1.0}}],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "data_dir": str(root / "prepared"),
    }
    job = parse_job(raw, "test")
    (root / "run").mkdir()
    resolve_prepared(job, prepare(job, workers=1)).write(root / "run" / "job.json")
    export(root / "run" / "export", tokenizer.folder, seed=5)
    return root


def export(folder: Path, tokenizer: Path, seed: int) -> None:
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer)
    build_model(ModelSpec(**MODEL), len(opened), seed, attn_implementation="sdpa").save_pretrained(folder)
    opened.save_pretrained(folder)


@pytest.fixture(scope="module")
def chat(place: Path) -> ChatModel:
    return load(place / "run", device="cpu")


@pytest.fixture(scope="module")
def questions(place: Path) -> list[Question]:
    return read_file(SourceSpec(path=str(place / "data.jsonl"), prompt="ask", response="answer"))


def test_a_file_is_read_split_and_rendered_as_it_was_prepared(
    place: Path, chat: ChatModel, questions: list[Question]
) -> None:
    """Same rows in the split, same tokens, same labels: what is measured is what was held out."""
    job = ResolvedJob.read(place / "run" / "job.json")
    render = Renderer(chat.tokenizer, chat.name)
    for split in ("train", "validation", "test"):
        prepared = read_prepared(job, ["qa"], split)
        chosen = choose_split(questions, split, job.spec.split)
        assert [(one.text, one.reference) for one in prepared] == [(one.text, one.reference) for one in chosen]
        for one, other in zip(map(render, prepared), map(render, chosen), strict=True):
            for field in ("prompt", "ids", "labels"):
                assert np.array_equal(getattr(one, field), getattr(other, field))
    prompt = chat.prompt([{"role": "user", "content": questions[0].text}])
    assert render(questions[0]).prompt.tolist() == prompt


def test_answers_cost_what_training_counts(
    chat: ChatModel, questions: list[Question], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a padded batch, row by row, is training's loss of each row alone."""
    rows = [Renderer(chat.tokenizer, chat.name)(question) for question in questions[:5]]
    trained = build_model(ModelSpec(**MODEL), 500, 0)
    trained.load_state_dict(chat.model.state_dict())
    sums, counts = answer_losses(chat, rows)
    for row, total, count in zip(rows, sums, counts, strict=True):
        micro = stack([Row(row.ids, row.labels, np.arange(len(row.ids)), np.array([len(row.ids)]))])
        with torch.no_grad():
            assert total == pytest.approx(summed_loss(trained.eval(), micro).item(), rel=1e-5)
        assert count == (row.labels != -100).sum()
    monkeypatch.setattr("ernie_dist.evaluate.answer_loss._OURS", ())
    assert answer_losses(chat, rows)[0] == pytest.approx(sums, rel=1e-5), "by another model's own logits"


def test_a_label_scores_the_probability_of_that_answer(chat: ChatModel, questions: list[Question]) -> None:
    """With the question read once for all labels; the labels are of different lengths, one begins another."""
    render = Renderer(chat.tokenizer, chat.name)
    rows = [render.said(questions[0], label) for label in ("天地", "天地玄黄", "日月盈昃辰宿列张")]
    whole = [-answer_losses(chat, [row])[0][0] for row in rows]
    assert label_scores(chat, rows) == pytest.approx(whole, rel=1e-5)


def test_an_interrupted_evaluation_goes_on(place: Path, questions: list[Question], tmp_path: Path) -> None:
    who, some = Candidate(str(place / "run")), questions[:10]
    whole = ask(who, some, SHORT, tmp_path, device="cpu")
    (path,) = tmp_path.iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_bytes("\n".join([*lines[:5], lines[5]]).encode()[:-40])  # in the middle of a line
    assert ask(who, some, SHORT, tmp_path, device="cpu") == whole
    assert path.read_text(encoding="utf-8").splitlines()[:5] == lines[:5]  # kept, not asked again
    before = path.read_bytes()
    ask(who, some, SHORT, tmp_path, device="cpu")
    assert path.read_bytes() == before
    ask(who, some, replace(SHORT, sampling=Sampling(max_new_tokens=5)), tmp_path, device="cpu")
    assert len(list(tmp_path.iterdir())) == 2  # asked in another way, kept apart
    ask(who, some, SHORT, tmp_path, device="cpu", dtype="bf16")
    assert len(list(tmp_path.iterdir())) == 3


def test_kept_answers_are_those_of_the_weights(place: Path, tmp_path: Path) -> None:
    """The base under an adapter, and the weights that a run began with, may be replaced in their folder."""
    base, adapter, run = (tmp_path / name for name in ("base", "adapter", "run"))
    for folder in (base, adapter, run):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}), encoding="utf-8")
    raw = json.loads((place / "run" / "job.json").read_text(encoding="utf-8"))
    raw["spec"]["model"] = {"from_pretrained": str(base)}
    (run / "job.json").write_text(json.dumps(raw), encoding="utf-8")
    candidates = [Candidate(str(adapter)), Candidate(str(run), before_training=True)]
    known = []
    for weights in (b"one", b"another"):
        (base / "model.safetensors").write_bytes(weights)
        known.append([who.fingerprint() for who in candidates])
    assert all(one != other for one, other in zip(*known, strict=True))


def test_triples_and_pairs_are_read_and_held_out_as_the_run_does(place: Path, tmp_path: Path) -> None:
    """Wordings of an entity that was trained on are no test of it, though their own hash would make them one."""
    job = json.loads((place / "run" / "job.json").read_text(encoding="utf-8"))["spec"]
    texts = pairs(60)
    facts = [{"entity": one["ask"][:6], "attribute": "别名", "value": one["answer"]} for one in texts]
    better = [{"prompt": one["ask"], "chosen": one["answer"], "rejected": "不知道。"} for one in texts]
    sources = {
        "facts": {
            "path": str(write(tmp_path / "facts.jsonl", facts)),
            "triples": {"make": "qa", "phrasings": 3, "hold_out": "entities"},
        },
        "better": {"path": str(write(tmp_path / "better.jsonl", better)), "preference": "pairs"},
    }
    stages = [
        {**job["curriculum"][0], "sequence_length": 256, "mixture": {"facts": 1.0}},
        {**job["curriculum"][0], "sequence_length": 256, "name": "dpo", "mixture": {"better": 1.0}, "dpo": {}},
    ]
    raw = {**job, "sources": sources, "curriculum": stages, "data_dir": str(tmp_path / "prepared")}
    made = parse_job(raw, "test")
    resolved = resolve_prepared(made, prepare(made, workers=1))
    for name, count in (("facts", 180), ("better", 60)):
        asked = read_file(made.sources[name])
        assert len(asked) == count
        for split in ("train", "test"):
            prepared = {(one.text, one.reference) for one in read_prepared(resolved, [name], split)}
            assert prepared == {(one.text, one.reference) for one in choose_split(asked, split, made.split)} != set()


def test_of_a_large_split_only_what_is_asked_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ResolvedJob.read(place / "run" / "job.json")
    whole = read_prepared(job, ["qa"], "train")
    read: list[int] = []
    one = PreparedSource.read
    monkeypatch.setattr(
        PreparedSource, "read", lambda self, start, length: read.append(start) or one(self, start, length)
    )
    some = read_prepared(job, ["qa"], "train", limit=3, seed=1)
    assert len(read) == len(some) == 3 and [question for question in whole if question in some] == some


def test_both_models_compute_in_the_same_numbers(place: Path, tmp_path: Path) -> None:
    """In bf16 a model before training is what its weights in a folder would be: a router stays in fp32."""
    for before in (True, False):
        assert Candidate(str(place / "run"), before_training=before).open("cpu", "bf16").model.dtype == torch.bfloat16
    experts = {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2, "moe_layer_end_index": 1}
    spec = ModelSpec(preset="ernie-4.5-21b-a3b", override={**SMALL, "num_key_value_heads": 2, **experts})
    drawn = build_model(spec, 64, 0, attn_implementation="sdpa", dtype=torch.bfloat16)
    build_model(spec, 64, 0, attn_implementation="sdpa").save_pretrained(tmp_path)
    opened = type(drawn).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {value.dtype for value in opened.values()} == {torch.bfloat16, torch.float32}
    for name, value in drawn.state_dict().items():
        assert value.dtype == opened[name].dtype and torch.equal(value, opened[name]), name


@pytest.mark.distributed
def test_two_ranks_answer_as_one_does(place: Path, questions: list[Question], tmp_path: Path) -> None:
    who = Candidate(str(place / "run"))
    for sampling in (Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, temperature=1.0, seed=3)):
        how = replace(SHORT, sampling=sampling)
        one = ask(who, questions[:14], how, tmp_path / "one", device="cpu")
        two = ask(who, questions[:14], how, tmp_path / "two", ranks=2, device="cpu")
        assert [row.answers for row in one] == [row.answers for row in two]
        assert [row.loss for row in one] == pytest.approx([row.loss for row in two], rel=1e-5)
    assert len(list((tmp_path / "two").iterdir())) == 4


def test_the_verb_asks_both_models_and_writes_what_it_found(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-new-tokens", "6", "--to", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert main(["eval", str(place / "run"), *arguments]) == 0
    table = capsys.readouterr().out
    assert "rouge_l_words" in table and "not distinguishable from 0" in table
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["models"]["base"].endswith("before training") and found["rows"] == len(found["answers"]) > 5
    base, tuned = (found["metrics"]["loss"][role]["value"] for role in ("base", "tuned"))
    assert base != tuned  # two models
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert found["answers"][0]["question"] in page and "http" not in page


def test_no_result_takes_the_place_of_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of one name, files of one name, a file after the test split. For loss alone nothing is generated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ChatModel, "answers", None)
    models = [tmp_path / name / "export" for name in "ab"]
    files = []
    for model in models:
        model.parent.mkdir()
        shutil.copytree(place / "run" / "export", model)
        files.append(write(model.parent / "exam.jsonl", [{"input": "天", "output": "地"}]))
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.json").symlink_to(place / "run" / "job.json")
    (run / "export").symlink_to(place / "run" / "export")
    asked = [["--data", str(file)] for file in files]
    commands = [[str(model), *data] for model in models for data in asked] + [[str(run)], [str(run), *asked[0]]]
    for command in [*commands, commands[0]]:
        assert main(["eval", *command, "--metrics", "loss,perplexity"]) == 0
    found = [*(tmp_path / "evaluation").glob("*/results.json"), *(run / "evaluation").glob("**/results.json")]
    assert len(found) == len(commands)
    assert "exam-" in capsys.readouterr().out
    row = json.loads(found[0].read_text(encoding="utf-8"))["answers"][0]["tuned"]
    assert row["answer"] is None and row["metrics"]["loss"] > 0


def test_losses_per_token_are_compared_where_tokens_are_the_same() -> None:
    questions = [Question("天", "地")] * 3
    fine, coarse = (
        judge("t", questions, [Asked(n, ("地",), (1,), (True,), 2.0 * n, count) for n in range(3)], None)
        for count in (4, 2)
    )
    verdicts = {one.name: verdict(one) for one in compare_all(fine, coarse, seed=0)}
    assert {name for name, said in verdicts.items() if said == OTHER_TOKENS} == {"loss", "perplexity", "length"}
    assert "cut text into different ones" in "\n".join(
        table(Results(fine, coarse, questions, compare_all(fine, coarse, 0)))
    )
    assert OTHER_TOKENS not in map(verdict, compare_all(fine, fine, seed=0))


def test_a_gpu_without_memory_left_is_no_bug(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(asking, "answer_losses", full)
    assert main(["eval", str(place / "run"), "--device", "cpu", "--to", str(tmp_path)]) == 2
    assert "16 rows were asked at once: lower --batch-size" in capsys.readouterr().err


def test_classification_stays_within_the_labels(place: Path, tmp_path: Path) -> None:
    labels = ["天", "地玄", "日月盈"]
    rows = [{"text": f"{pair['ask']}", "label": labels[n % 3]} for n, pair in enumerate(pairs(9))]
    data = write(tmp_path / "intents.jsonl", rows)
    command = ["eval", str(place / "run"), "--against", "none", "--data", str(data), "--to", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {row["tuned"]["answer"] for row in found["answers"]} <= set(labels)
    matrix = found["confusion"]["tuned"]
    assert [sum(row) for row in matrix["counts"]] == [3, 3, 3]
    right = sum(matrix["counts"][n][n] for n in range(3))
    assert found["metrics"]["accuracy"]["tuned"]["value"] == pytest.approx(100 * right / 9)


WRONG = {
    "unknown fields": ([{"甲": "1", "乙": "2"}], [], "'甲', '乙', which does not tell question from answer"),
    "empty answer": ([{"input": "一", "output": ""}], [], "data.jsonl:1: turn 2 (assistant) is empty"),
    "empty file": ([], [], "holds no rows"),
    "references": ([{"input": "一"}] * 3, ["--references", "REFS"], "3 answers and 2 references"),
    "too long": (
        [{"input": "天" * 600, "output": "地"}],
        [],
        "more than the 512 positions",
    ),
    "metric": ([{"input": "一", "output": "二"}], ["--metrics", "bleurt"], "unknown: bleurt"),
    "samples": ([{"input": "一", "output": "二"}], ["--samples", "3"], "give --temperature"),
    "nothing to compare with": ([{"input": "一", "tests": "二"}], ["--metrics", "bleu"], "the rows hold no reference"),
    "not classified": ([{"input": "一", "output": "二"}], ["--metrics", "accuracy"], "the rows have no label"),
    "classified": (
        [{"input": "一", "label": "二"}],
        ["--metrics", "loss,bleu"],
        "--metrics bleu: the rows are classified",
    ),
    "encoding": ([{"input": "一", "output": "二"}], ["--encoding", "gb-18030-x"], "unknown encoding"),
    "seed": ([{"input": "一", "output": "二"}], ["--seed", "-1", "--limit", "1"], "--seed -1: expected"),
    "no time": ([{"input": "一", "tests": "二"}], ["--exec-timeout", "0s"], "--exec-timeout: expected more than 0"),
    "device": ([{"input": "一", "output": "二"}], ["--device", "cudnn"], "device cudnn: cannot be used here"),
    "roles": ([{"messages": [{"role": "assistant", "content": "一"}]}], [], "turn 1 is by assistant"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_in_one_message(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, options, message = WRONG[kind]
    data = write(tmp_path / "data.jsonl", rows)
    (tmp_path / "refs.txt").write_text("一\n二\n", encoding="utf-8")
    options = [str(tmp_path / "refs.txt") if option == "REFS" else option for option in options]
    command = ["eval", str(place / "run"), "--data", str(data), "--to", str(tmp_path / "out"), *options]
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in "\n".join(line for line in said if "asking" not in line)


def test_an_empty_split_says_so(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that set nothing aside: exit code 2 and what to do; with validation rows, those are taken and named."""
    raw = json.loads((place / "run" / "job.json").read_text(encoding="utf-8"))
    for name, share, code in (
        ("both", {"train": 1.0, "validation": 0.0}, 2),
        ("test", {"train": 0.8, "validation": 0.2}, 0),
    ):
        run = tmp_path / name
        run.mkdir()
        raw["spec"]["split"] = {**share, "test": 0.0}
        job = parse_job({**raw["spec"], "data_dir": str(tmp_path / "prepared")}, "test")
        resolve_prepared(job, prepare(job, workers=1)).write(run / "job.json")
        (run / "export").symlink_to(place / "run" / "export")
        assert main(["eval", str(run), "--max-new-tokens", "2", "--against", "none"]) == code
        out = capsys.readouterr()
        if code:
            assert "test split is empty" in out.err and "split: {train: 0.8" in out.err
        else:
            assert "asking the validation split" in out.out


def test_references_may_stand_beside_the_prompts(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"q": "一"}, {"q": "二"}])
    source = SourceSpec(path=str(data), prompt="q", response="q")
    for text, encoding in (
        ("甲\u2028丙\n乙\n", "utf-8"),
        ("\ufeff甲\u2028丙\r\n乙", "utf-8"),
        ("甲\u2028丙\n乙\n", "gb18030"),
    ):
        (tmp_path / "refs.txt").write_bytes(text.encode(encoding))
        read = source if encoding == "utf-8" else source.model_copy(update={"encoding": encoding})
        if read is not source:
            data.write_bytes(data.read_text(encoding="utf-8").encode(encoding))
        found = read_file(read, Fields(references=tmp_path / "refs.txt"))
        assert [(one.text, one.reference) for one in found] == [("一", "甲\u2028丙"), ("二", "乙")]
    data = write(tmp_path / "data.jsonl", [{"q": "一"}, {"q": "二"}])
    with pytest.raises(DataError, match=r"refs.txt:1: undecodable bytes.* see --encoding"):
        read_file(source, Fields(references=tmp_path / "refs.txt"))


def test_a_label_of_another_name_tells_the_question(tmp_path: Path) -> None:
    data = str(write(tmp_path / "data.jsonl", [{"text": "一", "intent": "查"}]))
    assert guess_layout(data, "utf-8", label="intent") == {"prompt": "text", "label": "intent"}
    with pytest.raises(DataError, match="--prompt FIELD --label FIELD"):
        guess_layout(data, "utf-8")


def test_splits_are_those_of_the_content(questions: list[Question]) -> None:
    shares = SplitSpec(train=0.5, validation=0.25, test=0.25)
    parts = [choose_split(questions, split, shares) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(questions) and all(parts)

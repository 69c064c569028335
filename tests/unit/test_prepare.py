"""Prepare: the same bytes however it was run, nothing done twice, nothing lost, and a reason for every refusal."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_dist.data import prepare as prepare_module
from ernie_dist.data import readers, tokenise
from ernie_dist.data.index import find_duplicates
from ernie_dist.data.prepare import PreparedJob, differences, prepare, survey
from ernie_dist.data.shard import PreparedSource
from ernie_dist.data.split import digest, split_of
from ernie_dist.data.tokenizer import train_and_publish
from ernie_dist.spec.curriculum import SplitSpec
from ernie_dist.spec.errors import DataError, EnvironmentProblem
from ernie_dist.spec.job import JobSpec, parse_job


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = (json.dumps(row, ensure_ascii=False) for row in rows(400))
    return train_and_publish(texts, 600, tmp_path_factory.mktemp("tokenizer")).folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    words = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏"
    texts = ["".join(rng.choice(words) for _ in range(rng.randint(5, 120))) for _ in range(2 * count)]
    return [{"ask": texts[2 * n] + "？", "answer": texts[2 * n + 1] + "。"} for n in range(count)]


def write(path: Path, content: list[dict[str, str]] | list[str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def job(folder: Path, tokenizer: Path | dict[str, Any], lengths: tuple[int, ...] = (256,), **sources: Any) -> JobSpec:
    stage = {"duration": "1 epochs", "mixture": {name: 1 / len(sources) for name in sources}}
    raw = {
        "name": "t",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": tokenizer if isinstance(tokenizer, dict) else str(tokenizer),
        "tokens_per_batch": 4096,
        "sources": sources,
        "split": {"train": 0.8, "validation": 0.1, "test": 0.1},
        "curriculum": [{"name": f"s{length}", "sequence_length": length, **stage} for length in lengths],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "data_dir": str(folder / "prepared"),
    }
    return parse_job(raw, "test")


def text_and_chat(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "web": {"path": str(path), "text": "{ask}\n{answer}", **more},
        "qa": {"path": str(path), "prompt": "ask", "response": "answer", **more},
    }


def contents(prepared: PreparedJob, name: str, split: str = "train") -> list[list[int]]:
    source = PreparedSource.open(prepared.sources[name])
    starts, lengths = source.documents(split)
    return [source.read(start, size)[0].tolist() for start, size in zip(starts.tolist(), lengths.tolist(), strict=True)]


def digests(folder: Path) -> dict[str, str]:
    """Path and hash of everything prepared."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "inputs.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(tokenise, "SHARD_BYTES", 30_000)


def test_text_and_conversations_end_up_as_documents_splits_and_packs(tmp_path: Path, tokenizer: Path) -> None:
    given = rows(500)
    prepared = prepare(job(tmp_path, tokenizer, (256, 512), **text_and_chat(write(tmp_path / "a.jsonl", given))))
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    assert prepared.vocab_size == len(reader)
    for name, kind in (("web", "text"), ("qa", "chat")):
        source = PreparedSource.open(prepared.sources[name])
        assert source.kind == kind and source.manifest.rows == source.manifest.documents == 500
        documents = [contents(prepared, name, split) for split in ("train", "validation", "test")]
        assert [len(part) for part in documents] == [count.documents for count in source.manifest.splits.values()]
        assert 360 < len(documents[0]) < 440 and sum(map(len, documents)) == 500
        assert sum(source.manifest.length_histogram.values()) == 500
        if kind == "text":
            assert {reader.decode(ids[:-1]) for part in documents for ids in part} == {
                f"{row['ask']}\n{row['answer']}" for row in given
            }
            assert all(ids[-1] == 2 and 2 not in ids[:-1] for part in documents for ids in part)
        for length in (256, 512):
            packs = source.packs("train", length)
            assert packs.tokens == source.manifest.splits["train"].tokens
        assert len(source.packs("validation", 512)) > 0
        with pytest.raises(DataError, match="not packed to 64"):
            source.packs("train", 64)
    start, length = (int(part[0]) for part in PreparedSource.open(prepared.sources["qa"]).documents("train"))
    tokens, mask = PreparedSource.open(prepared.sources["qa"]).read(start, length)
    assert mask is not None and reader.decode(tokens[mask == 2]).endswith("。<|end_of_sentence|>")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, tokenizer: Path, small_shards: None) -> None:
    sources = text_and_chat(write(tmp_path / "a.jsonl", [*rows(600), *rows(100)]), dedupe=True)
    for workers in (1, 2):
        prepare(job(tmp_path / str(workers), tokenizer, **sources), workers=workers)
    one, two = (digests(tmp_path / str(workers) / "prepared") for workers in (1, 2))
    assert one == two and sum("shard.json" in path for path in one) > 10


KILLED = """
import json, signal, sys, time
from pathlib import Path
from ernie_dist.data import readers, tokenise
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
from ernie_dist.data.prepare import prepare
from ernie_dist.spec.job import JobSpec
readers.BLOCK_BYTES, tokenise.SHARD_BYTES = 5_000, 30_000
publish = tokenise._ShardWriter.publish
def slowly(*args, **kwargs):
    time.sleep(0.1)
    return publish(*args, **kwargs)
tokenise._ShardWriter.publish = slowly
prepare(JobSpec.model_validate_json(sys.stdin.read()), workers=2)
"""


def processes_with(mark: str) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_anywhere_it_goes_on_from_finished_shards(
    number: signal.Signals, tmp_path: Path, tokenizer: Path, small_shards: None
) -> None:
    sources = {"web": text_and_chat(write(tmp_path / "a.jsonl", rows(1500)))["web"]}
    prepare(job(tmp_path / "whole", tokenizer, **sources), workers=1)
    folder = tmp_path / "cut" / "prepared"
    shutil.copytree(tmp_path / "whole" / "prepared" / "tokenizer", folder / "tokenizer")  # saves an import
    spec, mark = job(tmp_path / "cut", tokenizer, **sources), f"ernie-test-{os.getpid()}-{number}"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "ERNIE_TEST_MARK": mark},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(spec.model_dump_json().encode())
    process.stdin.close()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("web/tokens-*/0000?/shard.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.01)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal: workers get it too
    process.wait(30)
    errors = process.stderr.read().decode()
    assert errors.count("Traceback") == (number == signal.SIGINT), errors
    while processes_with(mark):  # no worker outlives its parent
        assert time.monotonic() < deadline
        time.sleep(0.05)

    finished = {str(path): path.stat().st_mtime_ns for path in folder.glob("web/tokens-*/?????/*")}
    assert finished and not list(folder.glob("web/*/manifest.json"))
    prepare(spec, workers=1)
    assert {path: time for path, time in times(folder).items() if path in finished} == finished
    assert digests(folder) == digests(tmp_path / "whole" / "prepared")


def test_a_second_run_does_nothing_and_a_new_stage_or_policy_tokenises_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = text_and_chat(write(tmp_path / "a.jsonl", rows(300)))
    first = prepare(job(tmp_path, tokenizer, **sources))
    before = times(tmp_path)
    monkeypatch.setattr(prepare_module, "Workers", None)  # anything to do would fail
    assert prepare(job(tmp_path, tokenizer, **sources)) == first
    assert times(tmp_path) == before
    assert differences(first, survey(job(tmp_path, tokenizer, **sources))) == []

    longer = prepare(job(tmp_path, tokenizer, (256, 512), **sources))
    assert longer.sources == first.sources
    assert len(PreparedSource.open(longer.sources["qa"]).packs("train", 512)) > 0
    monkeypatch.undo()
    monkeypatch.setattr(tokenise, "encode_block", None)
    sources["qa"] |= {"overlong": "truncate", "split": {"train": 0.5, "validation": 0.5}}
    other = prepare(job(tmp_path, tokenizer, (64,), **sources))
    assert other.sources["qa"] != first.sources["qa"] and other.sources["web"] == first.sources["web"]
    assert PreparedSource.open(other.sources["qa"]).packs("train", 64).truncated > 0


def test_a_changed_input_or_tokenizer_is_found_out_before_any_work(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(100))
    spec = job(tmp_path, tokenizer, **text_and_chat(path))
    recorded = prepare(spec)
    recorded = PreparedJob(  # as a run directory keeps it
        recorded.tokenizer_folder, recorded.tokenizer_fingerprint, recorded.vocab_size, recorded.sources
    )
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, rows(100, seed=1))
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    assert old != new
    assert differences(recorded, survey(spec)) == [
        f"sources.{name}: {path}: sha256 was {old}, is {new}" for name in ("qa", "web")
    ]
    write(path, rows(100))
    assert differences(recorded, survey(spec)) == []
    shutil.copytree(tokenizer, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][-1], "id": prepare(spec).vocab_size, "content": "<new>"})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(config))
    changed = differences(recorded, prepare(job(tmp_path, tmp_path / "other", **text_and_chat(path))))
    assert recorded.tokenizer_fingerprint in changed[0] and "tokenizer" in changed[0] and len(changed) == 3


def test_bad_rows_stop_it_or_are_set_aside_and_never_pass_in_silence(tmp_path: Path, tokenizer: Path) -> None:
    good = [json.dumps(row, ensure_ascii=False) for row in rows(50)]
    bad = ['{"ask": "cut', '{"ask": "q"}', '{"ask": "q", "answer": 1}', '{"ask": "", "answer": "a"}']
    bad.append('{"ask": "q", "answer": "a</s>"}')
    path = write(tmp_path / "a.jsonl", [*good[:10], *bad, *good[10:]])
    spec = job(tmp_path, tokenizer, qa=text_and_chat(path)["qa"])
    for _ in range(2):
        with pytest.raises(DataError) as error:
            prepare(spec)
        found = [line.split(": ")[0].strip() for line in str(error.value).splitlines() if str(path) in line]
        assert found == [f"{path}:{line}" for line in range(11, 16)]
        assert "control token </s>" in str(error.value) and "on_bad_row: quarantine" in str(error.value)

    aside = job(tmp_path, tokenizer, qa={**text_and_chat(path)["qa"], "on_bad_row": "quarantine"})
    folder = prepare(aside).sources["qa"]
    manifest = PreparedSource.open(folder).manifest
    assert (manifest.rows, manifest.documents, manifest.quarantined) == (55, 50, 5)
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in kept] == [(str(path), line) for line in range(11, 16)]
    assert [row["row"] for row in kept] == bad and all(row["reason"] for row in kept)
    with pytest.raises(DataError, match="5 bad rows"):  # what was set aside for one job is not hidden from another
        prepare(spec)

    many = write(tmp_path / "many.jsonl", [*good, *["{}"] * 100])
    with pytest.raises(DataError, match="first 20 bad rows") as error:
        prepare(job(tmp_path, tokenizer, qa=text_and_chat(many)["qa"]))
    assert str(error.value).count(f"{many}:") == 20 and f"{many}:51:" in str(error.value)


def test_a_split_is_stable_and_duplicates_stay_together(tmp_path: Path, tokenizer: Path) -> None:
    given = rows(400)
    first = prepare(job(tmp_path, tokenizer, **text_and_chat(write(tmp_path / "a.jsonl", given))))
    shuffled = random.Random(1).sample([*given, *rows(50, seed=2), *given[:100]], 550)
    sources = text_and_chat(write(tmp_path / "b.jsonl", shuffled), dedupe=True)
    second = prepare(job(tmp_path, tokenizer, **sources))
    for name in ("web", "qa"):
        for split in ("train", "validation", "test"):
            before = {tuple(ids) for ids in contents(first, name, split)}
            after = [tuple(ids) for ids in contents(second, name, split)]
            assert before <= set(after) and len(after) == len(set(after))
        assert PreparedSource.open(second.sources[name]).manifest.duplicates == 100

    values = np.array([digest(str(n).encode()) for n in range(20_000)], np.uint64)
    small = split_of(values, SplitSpec(train=0.8, validation=0.1, test=0.1))
    assert [np.mean(small == part) for part in range(3)] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert np.all(split_of(values, SplitSpec(train=0.9, validation=0.05, test=0.05))[small == 0] == 0)
    assert digest("天地".encode()) == 0x5BAF8FC658BFB767  # must never change


def test_duplicates_are_found_over_shards_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 500, np.uint64)
    shards = [values, values[::-1].copy(), np.empty(0, np.uint64), values[:10]]
    whole = find_duplicates(shards)
    assert not whole[:500].any() and whole[500:].all()
    monkeypatch.setattr("ernie_dist.data.index._BUCKET", 16)
    assert np.array_equal(find_duplicates(shards), whole)


def test_what_cannot_be_trained_on_is_refused_with_a_remedy(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows(50))
    sources = text_and_chat(path)
    with pytest.raises(DataError, match=r"sources\.qa: \d+ of \d+ documents are longer .*overlong: truncate"):
        prepare(job(tmp_path, tokenizer, (64,), **sources))
    dropped = {**sources["qa"], "overlong": "drop"}
    with pytest.raises(DataError, match=r"sources\.qa: each of its \d+ .* longer than 8 tokens"):
        prepare(job(tmp_path, tokenizer, (8,), qa=dropped))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"sources\.web: no documents to train on \(0 rows"):
        prepare(job(tmp_path, tokenizer, web={"path": str(tmp_path / "empty.jsonl"), "text": "text"}))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError, match=r"needs about [\d,]+ bytes, and 1,000 are available"):
        prepare(job(tmp_path / "new", tokenizer, **sources))
    facts = write(
        tmp_path / "facts.jsonl", [{"entity": f"河{n}", "attribute": "长", "value": str(n)} for n in range(99)]
    )
    needed = []
    for phrasings in (1, 6):
        own = {"path": str(facts), "triples": {"make": "qa", "phrasings": phrasings}}
        with pytest.raises(DataError) as caught:
            prepare(job(tmp_path / "new", tokenizer, own=own))
        needed.append(int(str(caught.value).split("about ")[1].split(" ")[0].replace(",", "")))
    assert needed[1] == pytest.approx(6 * needed[0], abs=6)


def test_a_full_disk_loses_nothing_and_two_at_once_do_the_work_once(
    tmp_path: Path, tokenizer: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(tmp_path, tokenizer, **text_and_chat(write(tmp_path / "a.jsonl", rows(300))))
    written = []

    def fill(file: Any, values: np.ndarray) -> None:
        written.append(file.write(values.tobytes()))
        if sum(written) > 60_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(tokenise, "_write", fill)
        with pytest.raises(EnvironmentProblem, match=r"No space left .* bytes free"):
            prepare(spec)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prepared/*/tokens-*/?????/*")}
    assert finished
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [spec, spec])
    assert first == second and len(contents(first, "qa")) > 200
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_a_tokenizer_is_trained_once_and_again_only_for_other_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(200))
    spec = job(tmp_path, {"train": {"vocab_size": 400}}, **text_and_chat(path))
    assert survey(spec).tokenizer_fingerprint == ""
    first = prepare(spec)
    assert first.vocab_size == 400 and differences(first, survey(spec)) == []
    assert PreparedSource.open(first.sources["web"]).manifest.token_type == "uint16"
    write(path, rows(200, seed=1))
    assert differences(first, survey(spec))[0].startswith("tokenizer: ")
    assert prepare(spec).tokenizer_fingerprint != first.tokenizer_fingerprint


def test_the_real_files_with_the_real_tokenizer(tmp_path: Path, shared_data: Path, shared_tokenizer: Path) -> None:
    instructions, medical = shared_data / "instructions.erniekit.jsonl", shared_data / "medical_qa.gb18030.csv"
    prepared = prepare(
        job(
            tmp_path,
            shared_tokenizer,
            (512,),
            instructions={"path": str(instructions), "conversation": "erniekit", "overlong": "drop"},
            medical={"path": str(medical), "encoding": "gb18030", "text": "{ask}\n{answer}"},
        )
    )
    assert prepared.vocab_size == 101_304
    for name, count in (("instructions", 200), ("medical", 7000)):
        manifest = PreparedSource.open(prepared.sources[name]).manifest
        assert (manifest.rows, manifest.documents, manifest.token_type) == (count, count, "uint32")
    assert PreparedSource.open(prepared.sources["instructions"]).manifest.label_replacements == {100_272: 2}
    assert PreparedSource.open(prepared.sources["medical"]).packs("train", 512).padding_fraction < 0.05

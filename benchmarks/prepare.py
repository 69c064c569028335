"""Preparing a source against a bare batch encode of the same texts on the same cores; and peak memory over its size.

    python -m benchmarks.prepare [--sizes 64 256] [--rounds 3] [--data FOLDER --tokenizer FOLDER]

Every measurement runs in a fresh process, in turns, so that a busy machine disturbs both sides alike. What is timed:
prepare as a user waits for it (hashing, starting processes, tokenising, splitting, packing) from a published tokenizer;
of the bare encode only the encoding itself, of texts already in memory by a tokenizer already loaded. The ratio by CPU
time compares what both sides burn per token: it holds on a machine that has other work to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import keep
from ernie_dist.spec.job import JobSpec, parse_job

GOAL = 0.90
"""of the bare encode's throughput"""
BATCH = 1000
"""documents per call of the bare encode"""


def main() -> None:
    arguments = _arguments()
    if arguments.phase:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        print(json.dumps(_PHASES[arguments.phase](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = _measure(arguments, Path(scratch))
    print(json.dumps(result, indent=1, ensure_ascii=False))
    keep("prepare", result, quick=False)


def _arguments() -> argparse.Namespace:
    beside = Path(os.environ.get("ERNIE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs=2, default=(64, 256), help="MB of the generated files")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--data", type=Path, default=beside / "data", help="folder with general.jsonl and law.jsonl")
    parser.add_argument("--tokenizer", default=str(beside / "tokenizer"), help="folder or hub id")
    parser.add_argument("--scratch", help="where the generated files go")
    parser.add_argument("--cores", type=int, help="internal: that a phase may use")
    for name in ("phase", "file", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    files = {size: _generate(arguments.data, scratch / f"{size}.jsonl", size << 20) for size in arguments.sizes}
    published = scratch / "published"
    arguments.tokenizer = _run(arguments, "publish", files[min(files)], published, 1)["folder"]
    runs: dict[str, list[dict[str, float]]] = {}
    cores = len(os.sched_getaffinity(0))
    small, large = sorted(files)
    plan = [("prepare", small, cores), ("prepare", large, cores), ("prepare", small, 1)]
    plan += [("encode_batch", large, cores), ("encode_batch_fast", large, cores), ("encode_batch_fast", small, 1)]
    for _ in range(arguments.rounds):
        for phase, size, used in plan:
            folder = scratch / "prepared"
            if phase == "prepare":
                shutil.copytree(published / "tokenizer", folder / "tokenizer")
            name = f"prepare {size} MB" if phase == "prepare" else phase
            name += "" if used == cores else ", one core"
            runs.setdefault(name, []).append(_run(arguments, phase, files[size], folder, used))
            shutil.rmtree(folder, ignore_errors=True)
    speed, thrift = (
        {name: statistics.median(run["tokens"] / run[what] for run in several) for name, several in runs.items()}
        for what in ("seconds", "cpu_seconds")
    )
    alone = f"prepare {small} MB, one core"
    small, large = (f"prepare {size} MB" for size in (small, large))
    return {
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
        "ratio": {name: round(speed[large] / speed[name], 3) for name in ("encode_batch", "encode_batch_fast")},
        "ratio_by_cpu_time": {
            name: round(thrift[large] / thrift[name], 3) for name in ("encode_batch", "encode_batch_fast")
        },
        "ratio_on_one_core": round(speed[alone] / speed["encode_batch_fast, one core"], 3),
        "all_cores_over_one": {"prepare": round(speed[small] / speed[alone], 2), "cores": cores},
        "goal": GOAL,
        "peak_memory_mb": {
            f"{name} ({what})": round(max(run[what] for run in runs[name]) / 1e6)
            for name in (small, large)
            for what in ("parent_bytes", "all_processes_bytes")
        },
        "seconds": {name: [round(run["seconds"], 2) for run in several] for name, several in runs.items()},
        "data": "sentences of poems and statutes" if (arguments.data / "law.jsonl").exists() else "generated words",
    }


def _generate(data: Path, path: Path, size: int) -> Path:
    """Documents of random sentences, the same in every run."""
    rng = random.Random(17)
    sentences = [f"第{n}条　" + "".join(rng.choices("天地玄黃宇宙洪荒日月", k=20)) for n in range(10_000)]
    if (data / "law.jsonl").exists():
        texts = [text for name in ("general", "law") for text in _texts(data / f"{name}.jsonl")]
        sentences = [sentence for text in texts for sentence in text.split("\n") if sentence.strip()]
    written = 0
    with path.open("wb") as file:
        while written < size:
            text = "\n".join(rng.choices(sentences, k=rng.randint(2, 40)))
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return path


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _run(arguments: argparse.Namespace, phase: str, file: Path, folder: Path, cores: int) -> dict[str, Any]:
    """One measurement in its own process, with the peak memory of it and of all its children together."""
    own = ["--phase", phase, "--file", str(file), "--folder", str(folder), "--tokenizer", arguments.tokenizer]
    own += ["--cores", str(cores)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.prepare", *own], stdout=subprocess.PIPE, text=True)
    peak = {"parent_bytes": 0, "all_processes_bytes": 0}

    def watch() -> None:
        while process.poll() is None:
            sizes = [_resident(number) for number in _family(process.pid)]  # pages they share count for each
            peak["parent_bytes"] = max(peak["parent_bytes"], sizes[0])
            peak["all_processes_bytes"] = max(peak["all_processes_bytes"], sum(sizes))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{phase} failed")
    result = {**json.loads(output.splitlines()[-1]), **peak}
    print(phase, file.name, {key: round(value, 2) for key, value in result.items() if key != "folder"}, file=sys.stderr)
    return result


def _family(process: int) -> Iterator[int]:
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            numbers = children.read_text().split()
        except OSError:
            continue
        for number in numbers:
            yield from _family(int(number))


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _publish(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer, and the note by which a later prepare finds it."""
    from ernie_dist.data.survey import Survey
    from ernie_dist.data.tokenizer import publish_pretrained, train_and_publish

    root = Path(arguments.folder) / "tokenizer"
    root.mkdir(parents=True)
    if Path(arguments.tokenizer).is_dir():
        published = publish_pretrained(arguments.tokenizer, root)
    else:
        published = train_and_publish(itertools.islice(_texts(Path(arguments.file)), 20_000), 30_000, root)
    arguments.tokenizer = str(published.folder)
    Survey(_job(arguments)).note_tokenizer(published)
    return {"folder": arguments.tokenizer}


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    from ernie_dist.data.prepare import prepare
    from ernie_dist.data.shard import PreparedSource

    began = _clock()
    prepared = prepare(_job(arguments), workers=len(os.sched_getaffinity(0)), show_progress=False)
    spent = _since(began)
    return {**spent, "tokens": PreparedSource.open(prepared.sources["web"]).manifest.tokens}


def _job(arguments: argparse.Namespace) -> JobSpec:
    stage = {"name": "s", "duration": "1 epochs", "sequence_length": 4096, "mixture": {"web": 1}}
    raw = {
        "name": "benchmark",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": arguments.tokenizer,
        "tokens_per_batch": 4096,
        "sources": {"web": {"path": arguments.file, "text": "text"}},
        "curriculum": [stage],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "data_dir": arguments.folder,
    }
    return parse_job(raw, "benchmark")


def _encode_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bare `encode_batch`; nothing is done with what it returns but counting the tokens."""
    return _encode(arguments, fast=False)


def _encode_batch_fast(arguments: argparse.Namespace) -> dict[str, Any]:
    """`encode_batch_fast`, which leaves out offsets, and taking the ids out of what it returns."""
    return _encode(arguments, fast=True)


def _encode(arguments: argparse.Namespace, *, fast: bool) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(arguments.tokenizer) / "tokenizer.json"))
    texts = list(_texts(Path(arguments.file)))
    began, tokens = _clock(), 0
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        if fast:
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in encodings)
        else:
            tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))
    return {**_since(began), "tokens": tokens}


def _clock() -> tuple[float, float]:
    """Wall-clock time, and CPU time of this process and the children it has waited for, in seconds."""
    return time.perf_counter(), sum(os.times()[:4])


def _since(began: tuple[float, float]) -> dict[str, float]:
    return {name: now - then for name, now, then in zip(("seconds", "cpu_seconds"), _clock(), began, strict=True)}


_PHASES = {
    "publish": _publish,
    "prepare": _prepare,
    "encode_batch": _encode_batch,
    "encode_batch_fast": _encode_batch_fast,
}

if __name__ == "__main__":
    main()

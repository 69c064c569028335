"""Time to the first batch, 30 billion tokens into a job and at its start; and planning the packs of so many.

    python -m benchmarks.resume [--quick]

Each measurement is a fresh process: it imports, reads job.json, makes a BatchLoader and reads the whole batch of 1M
tokens, as the only rank. The plan of the packs is real, with an entry for every document, and is dropped from the page
cache before each process, so that it comes from the disk; where the name says so, it is left in memory. The token files
have their full size but are holes, read once before: what a disk takes for the tokens of one batch is not in it, and
neither is restoring a model's weights. Planning is what `ernie prepare` does once, after tokenising: documents of 1000
tokens on average, 30 billion in all, are packed to 4096 positions and the plan is written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import in_turns, keep, parser, peak_resident_bytes, say, show, spread

GOAL = 1.0
"""seconds to the first batch, imports not counted"""
PLAN_GOALS = {"seconds": 10.0, "peak_memory_mb": 2048.0}
MEAN_DOCUMENT = 1000
SEQUENCE_LENGTH = 4096
BATCH_TOKENS = 1 << 20
SHARDS = 64
PIECES = 4
"""documents in each sequence"""
POSITION = 30 * 10**9
DISK = 2 * 10**9
"""bytes free: twice what the plans of the packs and the lengths of the documents take"""
GAP = 7
"""tokens that each document falls short of its part of the sequence, so that there is padding to make"""


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--scratch", type=Path, help="where 0.5 GB are written and removed (a temporary folder)")
    command.add_argument("--rounds", type=int, default=7, help="of each measurement (7; planning twice)")
    command.add_argument("--measure", nargs=2, metavar=("JOB", "BATCH"), help="internal: one measurement")
    command.add_argument("--plan", type=Path, metavar="FOLDER", help="internal: another")
    arguments = command.parse_args()
    if arguments.measure:
        _measure(Path(arguments.measure[0]), int(arguments.measure[1]))
        return
    if arguments.plan:
        _plan(arguments.plan)
        return
    rounds, position = (2, POSITION // 100) if arguments.quick else (arguments.rounds, POSITION)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < DISK:
            raise SystemExit(f"{folder}: less than {DISK:,} bytes free; give another folder with --scratch")
        say(f"writing the packs of {position / 1e9:g} billion tokens")
        job, batch = _job(folder, position)
        measured: dict[str, list[dict[str, float]]] = {"start": [], "resumed": [], "resumed, plan in memory": []}
        measures = {
            name: _fresh_process(folder, job, 0 if name == "start" else batch, several, drop="memory" not in name)
            for name, several in measured.items()
        }
        for name, measure in measures.items():
            measure()
            measured[name].clear()
        in_turns(measures, rounds)
        size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
        say(f"planning the packs of {position / 1e9:g} billion tokens")
        planning = [_planned(folder / "plan", position) for _ in range(2)]
    keys = tuple(measured["start"][0])
    results = {name: {key: spread([one[key] for one in several]) for key in keys} for name, several in measured.items()}
    seconds = results["resumed"]["first_batch_seconds"]
    rows = [(name, *(f"{of[key]['median']:.3f}" for key in keys)) for name, of in results.items()]
    show(("median", *keys), rows)
    say(f"first batch {position / 1e9:g} billion tokens in: {seconds['median']:.3f} s; goal: under {GOAL} s")
    plan = {name: spread([one[name] for one in planning]) for name in planning[0]}
    say(f"planning: {plan['seconds']['median']:.1f} s, {plan['peak_memory_mb']['median']:.0f} MB; goals: {PLAN_GOALS}")
    result = {
        "what": "fresh processes: seconds from after the imports to the first batch, the plan of the packs on disk",
        **results,
        "goal": GOAL,
        "met": seconds["median"] < GOAL,
        "planning": {
            **plan,
            "goals": PLAN_GOALS,
            "met": all(plan[name]["median"] <= goal for name, goal in PLAN_GOALS.items()),
        },
        "settings": {
            "position_tokens": batch * BATCH_TOKENS,
            "tokens_per_batch": BATCH_TOKENS,
            "sequence_length": SEQUENCE_LENGTH,
            "documents_per_sequence": PIECES,
            "shards": SHARDS,
            "packs_bytes_on_disk": size,
        },
    }
    keep("resume", result, quick=arguments.quick)


def _job(folder: Path, position: int) -> tuple[Path, int]:
    """A frozen job over packed data that reaches a little further than `position`; and the batch at that position."""
    import numpy as np

    from benchmarks.synthetic import one_stage_job, write_source
    from ernie_dist.data.packing import Packs

    batch = -(-position // BATCH_TOKENS)
    batches = batch + batch // 50 + 1
    sequences = batches * BATCH_TOKENS // SEQUENCE_LENGTH
    piece = SEQUENCE_LENGTH // PIECES
    packs = Packs(
        starts=np.arange(sequences * PIECES, dtype=np.uint64) * np.uint64(piece),
        lengths=np.full(sequences * PIECES, piece - GAP, np.uint32),
        offsets=np.arange(sequences + 1, dtype=np.int64) * PIECES,
        sequence_length=SEQUENCE_LENGTH,
        truncated=0,
        dropped=0,
    )
    tokens = sequences * SEQUENCE_LENGTH
    per_shard = -(-sequences // SHARDS) * SEQUENCE_LENGTH
    shards = tuple(min(per_shard, tokens - first) for first in range(0, tokens, per_shard))
    job = folder / "job.json"
    one_stage_job(write_source(folder / "source", packs, shards, seed=None), BATCH_TOKENS, batches).write(job)
    os.sync()  # only clean pages can be dropped
    return job, batch


def _fresh_process(
    folder: Path, job: Path, batch: int, into: list[dict[str, float]], *, drop: bool
) -> Callable[[], float]:
    def measure() -> float:
        if drop:
            _drop_from_page_cache(folder / "source" / "documents")
        command = [sys.executable, "-m", "benchmarks.resume", "--measure", str(job), str(batch)]
        began = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        whole = time.perf_counter() - began
        into.append({**json.loads(output.splitlines()[-1]), "process_seconds": whole})
        return into[-1]["first_batch_seconds"]

    return measure


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(job: Path, batch: int) -> None:
    """In the fresh process: prints one line of JSON."""
    began = time.perf_counter()
    from ernie_dist.data.loader import BatchLoader
    from ernie_dist.spec.resolve import ResolvedJob
    from ernie_dist.world import World

    imported, before = time.perf_counter(), _peak_mb()
    read = BatchLoader(ResolvedJob.read(job), World())[batch]
    done = time.perf_counter()
    assert sum(micro.tokens_BT.numel() for micro in read.micro_batches) == BATCH_TOKENS
    result: dict[str, Any] = {
        "first_batch_seconds": done - imported,
        "imports_seconds": imported - began,
        "peak_memory_mb": _peak_mb(),
        "peak_memory_after_imports_mb": before,
    }
    print(json.dumps(result))


def _planned(folder: Path, tokens: int) -> dict[str, float]:
    """In a fresh process, over documents whose starts and lengths are memory-mapped."""
    import numpy as np

    if not folder.exists():
        folder.mkdir()
        lengths = np.random.default_rng(17).geometric(1 / MEAN_DOCUMENT, tokens // MEAN_DOCUMENT).astype(np.uint32)
        np.save(folder / "lengths.npy", lengths)
        np.save(folder / "starts.npy", np.cumsum(lengths, dtype=np.uint64) - lengths)
    command = [sys.executable, "-m", "benchmarks.resume", "--plan", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    say(f"  {output.strip()}")
    return json.loads(output)


def _plan(folder: Path) -> None:
    """In the fresh process: prints one line of JSON."""
    import numpy as np

    from ernie_dist.data.packing import plan_packs

    starts, lengths = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "lengths"))
    began, cpu = time.perf_counter(), time.process_time()
    packs = plan_packs(starts, lengths, SEQUENCE_LENGTH, overlong="split")
    packs.save(folder / "packs")
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**spent, "peak_memory_mb": _peak_mb(), "documents": len(lengths), "sequences": len(packs)}))


def _peak_mb() -> float:
    return peak_resident_bytes() / 2**20


if __name__ == "__main__":
    main()

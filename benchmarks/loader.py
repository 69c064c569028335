"""Tokens per second of BatchLoader alone, against plain slices of a memory map of the same tokens.

    python -m benchmarks.loader [--quick]

Both sides read from the page cache and copy to int64, as the embedding wants it. The slices are whole sequences at
random places of one file; nothing is done with them. BatchLoader also finds the batch's sequences in the curriculum,
puts their documents together, and makes labels, positions and document ends. No model runs beside it. `share_of_a_step`
is what reading would take of a step on a fast GPU if a step waited for it; a thread reads ahead there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import in_turns, keep, parser, say, show, spread
from benchmarks.synthetic import one_stage_job, write_source
from ernie_dist.data.loader import BatchLoader
from ernie_dist.data.packing import plan_packs
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.world import World

BATCH_TOKENS = 1 << 20
GOAL = 0.01
"""of a step's time, at most"""
FAST_GPU = 137_000
"""tokens/s of one H200 on the 0.3B model at 55 % of its peak: what we aim at, and nobody has measured"""


@dataclass(frozen=True)
class Case:
    """Documents of a mean length, packed."""

    name: str
    mean_document: int
    sequence_length: int


CASES = (Case("long", mean_document=1000, sequence_length=4096), Case("short", mean_document=10, sequence_length=512))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rounds, tokens, positions = (2, 1 << 22, 1 << 20) if arguments.quick else (7, 1 << 26, 1 << 23)
    results, rows = {}, []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            say(f"{case.name}: documents of {case.mean_document} tokens on average, packed to {case.sequence_length}")
            job = _job(Path(scratch), case, tokens)
            measures = {
                "memory map": _slices(Path(scratch), job, positions),
                "rank 1 of 1": _loads(job, 1, positions),
                "rank 1 of 8": _loads(job, 8, positions),
            }
            speeds = {name: spread(values) for name, values in in_turns(measures, rounds).items()}
        share = FAST_GPU / speeds["rank 1 of 8"]["median"]
        results[case.name] = {
            **asdict(case),
            "tokens_per_second": speeds,
            "share_of_a_step": share,
            "met": share <= GOAL,
        }
        say(f"{case.name}: reading takes {share:.2%} of a step at {FAST_GPU:,} tokens/s; goal: at most {GOAL:.0%}")
        for name, of in speeds.items():
            figures = (f"{value / 1e6:.1f}" for value in (of["median"], *of["range"]))
            rows.append((f"{case.name}: {name}", *figures))
    show(("million tokens/s", "median", "least", "most"), rows)
    settings = {
        "goal": GOAL,
        "assumed_tokens_per_second_of_a_gpu": FAST_GPU,
        "tokens_per_batch": BATCH_TOKENS,
        "tokens_in_source": tokens,
        "positions_per_measurement": positions,
    }
    what = "token positions per second into one rank's memory; the memory map's are the ceiling"
    keep("loader", {"what": what, **results, "settings": settings}, quick=arguments.quick)


def _job(scratch: Path, case: Case, tokens: int) -> ResolvedJob:
    """A source of random tokens whose documents have geometrically distributed lengths."""
    lengths = np.random.default_rng(17).geometric(1 / case.mean_document, tokens // case.mean_document)
    starts = np.concatenate([[0], np.cumsum(lengths[:-1])])
    packs = plan_packs(starts, lengths, case.sequence_length, overlong="split")
    source = write_source(scratch, packs, (int(lengths.sum()),))
    return one_stage_job(source, BATCH_TOKENS, batches=1_000_000)


def _loads(job: ResolvedJob, ranks: int, positions: int) -> Callable[[], float]:
    """Reads the part of the first of `ranks` in as many batches as give `positions`."""
    loader, next_batch = BatchLoader(job, World(rank=0, size=ranks)), 0

    def measure() -> float:
        nonlocal next_batch
        batches = max(1, positions * ranks // BATCH_TOKENS)
        began = time.perf_counter()
        for index in range(next_batch, next_batch + batches):
            loader[index]
        seconds = time.perf_counter() - began
        next_batch += batches
        return batches * BATCH_TOKENS / ranks / seconds

    return measure


def _slices(scratch: Path, job: ResolvedJob, positions: int) -> Callable[[], float]:
    # As a plain array: slicing np.memmap itself is several times slower, and the ceiling should be one.
    tokens = np.asarray(np.memmap(scratch / "tokens/00000/tokens.bin", dtype=np.uint32, mode="r"))
    length = job.stages[0].sequence_length
    random = np.random.default_rng(17)

    def measure() -> float:
        starts = random.integers(0, len(tokens) - length, positions // length).tolist()
        began = time.perf_counter()
        for start in starts:
            tokens[start : start + length].astype(np.int64)
        return len(starts) * length / (time.perf_counter() - began)

    return measure


if __name__ == "__main__":
    main()

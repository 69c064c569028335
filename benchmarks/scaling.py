"""Weak and strong scaling of a step over CPU ranks under each ZeRO stage, beside torch's DDP and no exchange at all.

    python -m benchmarks scaling [--ranks 1 2 4] [--quick]

Every rank computes with one thread. Weak: as many rows on every rank, however many there are. Strong: the same rows,
dealt to more ranks. `alone` is our plain engine in every rank, all at once and without a word between them: what the
machine's cores and memory leave of the speed of one. A batch is ready in memory. More ranks than cores share them, and
there even `alone` takes longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.communication import SHAPE
from benchmarks.harness import RESULTS, keep, parser, say, show, spread

if TYPE_CHECKING:
    from ernie_dist.batch import Batch
    from ernie_dist.world import World

LENGTH = 64
WEAK_ROWS = 2
"""of every rank"""
STRONG_ROWS = 8
"""of all ranks together"""
KINDS = ("alone", "ddp", "zero0", "zero1", "zero2", "zero3")
RATE = 1e-3
Step = Callable[["Batch"], Any]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="(1 2 4)")
    command.add_argument("--rounds", type=int, default=2, help="starts of each number of ranks (2)")
    command.add_argument("--steps", type=int, default=4, help="of each case in a start, after one not timed (4)")
    command.add_argument("--worker", type=Path, help="internal: a rank, and the file of its result")
    arguments = command.parse_args()
    steps, rounds = (1, 1) if arguments.quick else (arguments.steps, arguments.rounds)
    if arguments.worker:
        _measure(arguments.worker, steps, KINDS[:3] if arguments.quick else KINDS)
        return
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for ranks in arguments.ranks if number % 2 == 0 else reversed(arguments.ranks):
            say(f"round {number + 1}/{rounds}: {ranks} ranks")
            for name, values in _launch(ranks, sys.argv[1:]).items():
                seconds.setdefault(name, []).extend(values)
    cases = _cases(seconds)
    show(
        ("ms/step", "kind", "ranks", "rows of a rank", "median", "efficiency", "of alone"),
        [
            (
                case["scaling"],
                case["kind"],
                case["ranks"],
                case["rows_per_rank"],
                f"{1000 * case['seconds_per_step']['median']:.0f}",
                f"{case['efficiency']:.0%}",
                f"{case['alone_over_it']:.0%}",
            )
            for case in cases
        ],
    )
    result = {
        "what": "seconds per step; efficiency: weak, 1 rank's time over it; strong, that over the number of ranks too",
        "cases": cases,
        "bytes_sent_per_rank_and_step_on_2_ranks": _bytes_sent(),
        "settings": {
            "sequence_length": LENGTH,
            "model": SHAPE,
            "precision": "fp32",
            "threads_per_rank": 1,
            "steps": steps,
            "rounds": rounds,
        },
    }
    keep("scaling", result, quick=arguments.quick)


def _launch(ranks: int, own_arguments: list[str]) -> dict[str, list[float]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "seconds.json"
        command = [*torchrun, "-m", "benchmarks.scaling", *own_arguments, "--worker", str(result)]
        if subprocess.run(command, env=environment).returncode:
            raise SystemExit("scaling: a rank failed; see above")
        return json.loads(result.read_text(encoding="utf-8"))


def _cases(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """`seconds`: "kind ranks rows_per_rank" -> of its steps."""
    found = {(kind, int(ranks), int(rows)): values for (kind, ranks, rows), values in _named(seconds)}
    least = min(ranks for _, ranks, _ in found)
    of = {key: spread(values) for key, values in found.items()}
    cases = []
    for scaling, rows_of in (("weak", lambda ranks: WEAK_ROWS), ("strong", lambda ranks: STRONG_ROWS // ranks)):
        for kind, ranks, rows in sorted(found, key=lambda key: (KINDS.index(key[0]), key[1])):
            if rows != rows_of(ranks):
                continue
            median = of[kind, ranks, rows]["median"]
            first = of[kind, least, rows_of(least)]["median"]
            cases.append(
                {
                    "scaling": scaling,
                    "kind": kind,
                    "ranks": ranks,
                    "rows_per_rank": rows,
                    "seconds_per_step": of[kind, ranks, rows],
                    "efficiency": first / median / (1 if scaling == "weak" else ranks / least),
                    "alone_over_it": of["alone", ranks, rows]["median"] / median,
                }
            )
    return cases


def _named(seconds: dict[str, list[float]]) -> list[tuple[list[str], list[float]]]:
    return [(name.split(), values) for name, values in seconds.items()]


def _bytes_sent() -> dict[str, float]:
    """Counted, not measured here: of the same model."""
    path = RESULTS / "communication.json"
    counted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "settings": {}}
    if counted["settings"].get("model") != SHAPE:
        return {}
    rows = [row for row in counted["rows"] if row["micro_batches"] == 1 and row["checkpointing"] == "none"]
    return {row["ds_config"]: row["counted"] for row in rows if row["ds_config"] in KINDS}


# --------------------------------------------------------------------------------------------------------------- a rank


def _measure(result: Path, steps: int, kinds: tuple[str, ...]) -> None:
    """Every case of this number of ranks, one after another."""
    import torch.distributed as dist

    from ernie_dist.world import World

    world = World.from_environment()
    dist.init_process_group("gloo")
    seconds: dict[str, list[float]] = {}
    for kind in kinds:
        step, close = _ddp(world) if kind == "ddp" else _engine(world, kind)
        for rows in sorted({WEAK_ROWS, STRONG_ROWS // world.size}):
            batches = [_batch(index, rows, world) for index in range(1 + steps)]
            step(batches[0])
            own = seconds[f"{kind} {world.size} {rows}"] = []
            for batch in batches[1:]:
                dist.barrier()
                began = time.perf_counter()
                step(batch)
                dist.barrier()  # the slowest rank's time
                own.append(time.perf_counter() - began)
        close()
    if world.is_main:
        result.write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


def _engine(world: World, kind: str) -> tuple[Step, Callable[[], None]]:
    from ernie_dist.engine.select import build_engine
    from ernie_dist.model.loss import summed_loss
    from ernie_dist.spec.training import EngineSpec, OptimizerSpec
    from ernie_dist.world import World

    alone = kind == "alone"
    named = {"kind": "plain"} if alone else {"ds_config": kind}
    spec = EngineSpec(**named, precision="fp32", micro_batch_size=STRONG_ROWS)
    within = World() if alone else world
    engine = build_engine(spec, OptimizerSpec(), [()], _build(), summed_loss, within)
    return partial(engine.step, learning_rate=RATE), engine.close


def _ddp(world: World) -> tuple[Step, Callable[[], None]]:
    """What one writes with torch alone."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from ernie_dist.model.loss import summed_loss

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _build()()

        def forward(self, micro: Any) -> torch.Tensor:
            return summed_loss(self.model, micro)

    model = DistributedDataParallel(WithLoss())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(batch: Batch) -> None:
        (micro,) = batch.micro_batches
        (model(micro) / micro.weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda: None


def _build() -> Callable[[], Any]:
    from ernie_dist.model.build import build_model
    from ernie_dist.spec.training import ModelSpec

    return partial(build_model, ModelSpec(preset="ernie-4.5-tiny", override=SHAPE), SHAPE["vocab_size"], 0)


def _batch(step: int, rows: int, world: World) -> Batch:
    import numpy as np

    from ernie_dist.batch import Batch, Row, stack

    chance = np.random.default_rng([step, world.rank])

    def row() -> Row:
        tokens = chance.integers(5, SHAPE["vocab_size"], LENGTH)
        return Row(tokens, np.roll(tokens, -1), np.arange(LENGTH), np.array([LENGTH]))

    everywhere = rows * world.size
    ids = np.zeros((everywhere, 2), np.int64)
    return Batch(step, "only", (stack([row() for _ in range(rows)]),), ids, everywhere * LENGTH)


if __name__ == "__main__":
    main()

"""Bytes that ranks send in an optimizer step under each ZeRO stage, counted, beside what `ernie plan` says.

    python -m benchmarks.communication [--quick]

Two CPU ranks train a small model as a job would. Every collective operation is seen as torch hands it to the backend,
and its size taken as the bytes that each rank sends around a ring. No time is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import keep, parser, say, show

if TYPE_CHECKING:
    from ernie_dist.batch import Batch
    from ernie_dist.spec.job import JobSpec
    from ernie_dist.world import World

GOAL = 0.02
RANKS = 2
LENGTH = 64
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LEAN = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""every weight is given back after its use, as in a model too large for DeepSpeed's default of 1e9 live weights"""
CASES = [
    (zero, accumulation, checkpointing)
    for zero in ("zero0", "zero1", "zero2", "zero3", "lean")
    for accumulation in (1, 3)
    for checkpointing in ("none", "full")
]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--worker", type=Path, help="internal: a rank, and the file of its result")
    arguments = command.parse_args()
    if arguments.worker:
        count(arguments.worker, CASES[:2] if arguments.quick else CASES)
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "lean.json").write_text(json.dumps({"zero_optimization": LEAN}), encoding="utf-8")
        rows = _launch(Path(scratch) / "rows.json", sys.argv[1:])
    largest = max(abs(row["counted"] / row["planned"] - 1) for row in rows)
    show(
        ("ds_config", "micro-batches", "recompute", "counted", "planned", "ratio"),
        [
            (
                row["ds_config"],
                row["micro_batches"],
                row["checkpointing"],
                *(f"{row[name] / 1e6:.1f} MB" for name in ("counted", "planned")),
                f"{row['counted'] / row['planned']:.4f}",
            )
            for row in rows
        ],
    )
    say(f"largest deviation {largest:.2%}; goal: at most {GOAL:.0%}")
    what = "bytes that each rank sends in one optimizer step, counted, and by the formula of ernie plan"
    settings = {"ranks": RANKS, "precision": "fp32", "model": SHAPE}
    keep(
        "communication",
        {"what": what, "goal": GOAL, "met": largest <= GOAL, "largest_deviation": largest, "rows": rows,
         "settings": settings},
        quick=arguments.quick,
    )  # fmt: skip


def _launch(result: Path, own_arguments: list[str]) -> list[dict[str, Any]]:
    from launcher.node import rank_environment

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, **rank_environment(RANKS), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*torchrun, "-m", "benchmarks.communication", *own_arguments, "--worker", str(result)]
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit("communication: a rank failed; see above")
    return json.loads(result.read_text(encoding="utf-8"))


def count(result: Path, cases: list[tuple[str, int, str]]) -> None:
    """One rank: a step of each case, after two that are not counted."""
    from ernie_dist.engine.select import build_engine
    from ernie_dist.model.build import build_model
    from ernie_dist.model.loss import summed_loss
    from ernie_dist.spec.shape import ModelShape, config_values
    from ernie_dist.world import World
    from launcher.estimate import estimate_traffic

    world = World.from_environment()
    rows = []
    for zero, accumulation, checkpointing in cases:
        ds_config = str(result.with_name("lean.json")) if zero == "lean" else zero
        job = _job(ds_config, accumulation, checkpointing)
        build = partial(build_model, job.model, SHAPE["vocab_size"], job.seed, job.engine.gradient_checkpointing)
        engine = build_engine(
            job.engine, job.optimizer, [()], build, summed_loss, world, pretrained=False, adapter=False
        )
        for step in range(2):  # ZeRO 3 takes down the order of the modules in its first
            engine.step(_batch(step, accumulation, world), 1e-3)
        counter = _counter()
        with counter:
            engine.step(_batch(2, accumulation, world), 1e-3)
        engine.close()
        values = config_values(job.model)
        assert values is not None
        planned = estimate_traffic(job, job.curriculum[0], ModelShape.from_config(values), RANKS).total
        rows.append(
            {
                "ds_config": zero,
                "micro_batches": accumulation,
                "checkpointing": checkpointing,
                "counted": sum(counter.sent.values()),
                "planned": planned,
                "operations": dict(counter.sent),
            }
        )
    if world.is_main:
        result.write_text(json.dumps(rows), encoding="utf-8")
    world.close()


def _job(ds_config: str, accumulation: int, checkpointing: str) -> JobSpec:
    from ernie_dist.spec.job import parse_job

    stage = {"name": "only", "duration": "2 steps", "sequence_length": LENGTH, "mixture": {"numbers": 1.0}}
    return parse_job(
        {
            "name": "communication",
            "model": {"preset": "ernie-4.5-tiny", "override": SHAPE},
            "tokenizer": {"train": {"vocab_size": SHAPE["vocab_size"]}},
            "tokens_per_batch": LENGTH * RANKS * accumulation,
            "sources": {"numbers": {"path": "none.jsonl", "text": "text"}},
            "curriculum": [stage],
            "schedule": {"kind": "constant", "peak": 1e-3},
            "engine": {
                "ds_config": ds_config,
                "precision": "fp32",
                "gradient_checkpointing": checkpointing,
                "micro_batch_size": 1,
            },
            "resources": {"gpus_per_node": RANKS},
        },
        "communication",
    )


def _batch(step: int, micro_batches: int, world: World) -> Batch:
    import numpy as np

    from ernie_dist.batch import Batch, Row, stack

    chance = np.random.default_rng([step, world.rank])

    def micro() -> Any:
        tokens = chance.integers(5, SHAPE["vocab_size"], LENGTH)
        return stack([Row(tokens, np.roll(tokens, -1), np.arange(LENGTH), np.array([LENGTH]))])

    rows = world.size * micro_batches
    return Batch(
        step, "only", tuple(micro() for _ in range(micro_batches)), np.zeros((rows, 2), np.int64), LENGTH * rows
    )


def _counter() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sent(TorchDispatchMode):
        """Sees every collective operation. An unknown one is a KeyError: nothing goes uncounted."""

        def __init__(self) -> None:
            super().__init__()
            self.sent: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            if function.namespace == "c10d":
                name = function._overloadpacket.__name__
                tensors = [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]
                self.sent[name] += _AROUND * _SENT[name]([one.numel() * one.element_size() for one in tensors])
            return function(*given, **(named or {}))

    return Sent()


_AROUND = (RANKS - 1) / RANKS
_SENT: dict[str, Callable[[list[int]], int]] = {
    "allreduce_": lambda sizes: 2 * sum(sizes),
    "broadcast_": sum,
    "_allgather_base_": lambda sizes: sizes[0],  # output, input
    "_reduce_scatter_base_": lambda sizes: sizes[1],
}
"""operation -> bytes that go once around the ring"""


if __name__ == "__main__":
    main()

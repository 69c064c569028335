"""Our training loop over a bare DeepSpeed loop: same model, batches, optimizer and ZeRO settings, on 2 CPU ranks.

    python -m benchmarks.overhead [--quick]

`ernie_dist.train.train` runs as it is: batches prefetched by a thread, DeepSpeedEngine.step with its all-reduces,
Progress, events to metrics.jsonl and the console, the look at the stop file. Between blocks of its steps the same two
processes run blocks of the bare loop: batches ready in memory, the loss scale known beforehand; forward, backward and
step. Starting up, the first steps, the checkpoint at the end and the export are not in the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import keep, parser, say, show, spread

if TYPE_CHECKING:
    from ernie_dist.batch import Batch
    from ernie_dist.data.loader import BatchLoader
    from ernie_dist.spec.resolve import ResolvedJob
    from ernie_dist.spec.skips import Skips
    from ernie_dist.world import World

GOAL = 1.03
RANKS = 2
RATE = 1e-3
_RESULT = "overhead.json"


@dataclass(frozen=True)
class Plan:
    """Blocks of `steps` steps of each loop, in alternating order, after `warm_up` steps of each."""

    blocks: int
    steps: int
    warm_up: int

    @property
    def batches(self) -> int:
        """What each loop trains on. One more makes train() end after the last block: its checkpoint is not timed."""
        return self.warm_up + self.blocks * self.steps + 1


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--blocks", type=int, default=24, help="blocks of each loop (24)")
    command.add_argument("--steps", type=int, default=20, help="steps in a block (20)")
    command.add_argument("--zero", choices=("zero0", "zero1", "zero2", "zero3"), default="zero2", help="(zero2)")
    command.add_argument("--worker", type=Path, help="internal: a rank, with its run directory")
    arguments = command.parse_args()
    plan = Plan(blocks=2, steps=4, warm_up=2) if arguments.quick else Plan(arguments.blocks, arguments.steps, warm_up=5)
    if arguments.worker:
        _Worker(arguments.worker, plan).run()
        return
    with tempfile.TemporaryDirectory() as scratch:
        say(f"preparing data; then {RANKS} ranks, {plan.blocks} blocks of {plan.steps} steps of each loop")
        measured = _launch(_prepared_run(Path(scratch), plan, arguments.zero), plan, sys.argv[1:])
    ratios = [ours / bare for ours, bare in zip(measured["ours"], measured["bare"], strict=True)]
    again = [later / earlier for earlier, later in zip(measured["bare"], measured["bare"][1:], strict=False)]
    ratio = spread(ratios)
    seconds = {name: spread([value / plan.steps for value in measured[name]]) for name in ("ours", "bare")}
    cpu = [ours / bare for ours, bare in zip(measured["ours cpu"], measured["bare cpu"], strict=True)]
    result = {
        "what": "seconds of a block of steps of our loop over the same steps of a bare DeepSpeed loop, block by block",
        "ratio": ratio,
        "goal": GOAL,
        "met": ratio["median"] <= GOAL,
        "noise: a bare block over the bare block before it": spread(again),
        "cpu_ratio: the same of rank 0's processor time": spread(cpu),
        "seconds_per_step": seconds,
        "largest_loss_difference": measured["loss_difference"],
        "settings": {"ranks": RANKS, "ds_config": arguments.zero, "device": "cpu", **asdict(plan), **measured["sizes"]},
    }
    milliseconds = {name: (1000 * value for value in (of["median"], *of["range"])) for name, of in seconds.items()}
    show(
        ("ms/step", "median", "least", "most"), [(name, *map("{:.1f}".format, of)) for name, of in milliseconds.items()]
    )
    low, high = ratio["quartiles"]
    say(f"ours / bare: median {ratio['median']:.4f}, quartiles {low:.4f} to {high:.4f}; goal: at most {GOAL}")
    say(f"processor time, which other work on the machine disturbs less: {spread(cpu)['median']:.4f}")
    keep("overhead", result, quick=arguments.quick)


def _prepared_run(scratch: Path, plan: Plan, zero: str) -> Path:
    """A run directory with a frozen job over generated data."""
    from ernie_dist.data.prepare import prepare
    from ernie_dist.data.resolve import resolve_prepared
    from ernie_dist.spec.job import parse_job
    from ernie_dist.spec.run_files import RunFiles
    from launcher.quickstart_data import write_data

    write_data(scratch / "data")
    stage = {"name": "only", "duration": f"{plan.batches} steps", "sequence_length": 128, "mixture": {"stories": 1.0}}
    spec = parse_job(
        {
            "name": "overhead",
            "model": {"preset": "ernie-4.5-tiny"},
            "tokenizer": {"train": {"vocab_size": 1200}},
            "tokens_per_batch": "2K",
            "sources": {"stories": {"path": str(scratch / "data/stories.jsonl"), "text": "text", "repeat": True}},
            "split": {"train": 1.0, "validation": 0.0},
            "curriculum": [stage],
            "schedule": {"kind": "constant", "peak": RATE},
            "engine": {"ds_config": zero, "micro_batch_size": 16, "precision": "fp32"},
            "checkpoint": {"every": "1000000 steps", "keep_last": 1},
            "bad_numbers": {"sigma": 1e9},  # the bare loop refuses no update
            "resources": {"gpus_per_node": RANKS},
            "data_dir": str(scratch / "prepared"),
        },
        "overhead",
    )
    run_dir = scratch / "run"
    run_dir.mkdir()
    resolve_prepared(spec, prepare(spec, show_progress=False)).write(RunFiles(run_dir).job)
    return run_dir


def _launch(run_dir: Path, plan: Plan, own_arguments: list[str]) -> dict[str, Any]:
    from launcher.node import rank_environment

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, **rank_environment(RANKS), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*torchrun, "-m", "benchmarks.overhead", *own_arguments, "--worker", str(run_dir)]
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit("overhead: a rank failed; see above")
    return json.loads((run_dir / _RESULT).read_text(encoding="utf-8"))


class _Worker:
    """One rank: runs train(), and the bare loop in between."""

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self._run_dir, self._plan = run_dir, plan
        self._seconds: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "ours cpu", "bare cpu")}

    def run(self) -> None:
        from ernie_dist import train as training
        from ernie_dist.events.history import read_metrics
        from ernie_dist.spec.resolve import ResolvedJob
        from ernie_dist.spec.run_files import RunFiles
        from ernie_dist.world import World

        world, files = World.from_environment(), RunFiles(self._run_dir)
        self._job: ResolvedJob = ResolvedJob.read(files.job)
        self._world = world
        self._load_batches = training.load_batches
        # The one place where train() gives up control between two steps without noticing: as it asks for a batch.
        training.load_batches = self._batches
        # As in a launched rank, whose output goes to its log.
        with (
            (self._run_dir / f"rank_{world.rank}.log").open("w", encoding="utf-8") as console,
            redirect_stdout(console),
        ):
            training.train(self._run_dir, 1, world, console)
        bare = self._bare.losses(world)
        if world.is_main:
            ours = [step["loss"] for step in read_metrics(files.metrics)]
            difference = max(abs(a - b) for a, b in zip(ours, bare, strict=False))
            if difference > 1e-3:
                raise SystemExit(f"the two loops did not train the same: their losses differ by up to {difference:g}")
            measured = {**self._seconds, "loss_difference": difference, "sizes": self._sizes()}
            (self._run_dir / _RESULT).write_text(json.dumps(measured), encoding="utf-8")
        world.close()

    def _batches(self, loader: BatchLoader, first: int, end: int, *, ahead: int, without: Skips) -> Iterator[Batch]:
        """What load_batches yields; a block of the bare loop runs before or after each block of it."""
        plan, self._bare = self._plan, _BareLoop(self._job, self._world, [loader[index] for index in range(first, end)])
        batches = self._load_batches(loader, first, end, ahead=ahead, without=without)
        for _ in range(plan.warm_up):
            yield next(batches)
        self._bare.steps(plan.warm_up)
        for block in range(plan.blocks):
            if block % 2:
                self._time_bare()
            began = self._start()
            for _ in range(plan.steps):
                yield next(batches)
            self._note("ours", began)
            if block % 2 == 0:
                self._time_bare()
            if self._world.is_main:
                ours, bare = (self._seconds[name][-1] / plan.steps for name in ("ours", "bare"))
                times = f"{1000 * ours:.1f} ms/step, bare {1000 * bare:.1f}"
                say(f"  block {block + 1}/{plan.blocks}: {times}, ratio {ours / bare:.4f}")
        yield from batches

    def _time_bare(self) -> None:
        began = self._start()
        self._bare.steps(self._plan.steps)
        self._note("bare", began)

    def _start(self) -> tuple[float, float]:
        self._world.barrier()
        return time.perf_counter(), time.process_time()

    def _note(self, name: str, began: tuple[float, float]) -> None:
        self._seconds[name].append(time.perf_counter() - began[0])
        self._seconds[f"{name} cpu"].append(time.process_time() - began[1])

    def _sizes(self) -> dict[str, Any]:
        stage, micro = self._job.stages[0], self._bare.batches[0][0]
        return {
            "parameters": self._bare.parameters,
            "tokens_per_batch": stage.tokens_per_batch,
            "sequence_length": stage.sequence_length,
            "micro_batch_size": len(micro.tokens_BT),
            "threads_per_rank": int(os.environ["OMP_NUM_THREADS"]),
        }


class _BareLoop:
    """What one writes with DeepSpeed alone; nothing in it that training does not need."""

    def __init__(self, job: ResolvedJob, world: World, batches: list[Batch]) -> None:
        import deepspeed
        import torch

        from ernie_dist.batch import IGNORED
        from ernie_dist.model.build import build_model
        from ernie_dist.model.loss import summed_loss
        from ernie_dist.spec.ds_config import read_ds_config

        class WithLoss(torch.nn.Module):
            def __init__(self, model: torch.nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, micro: Any) -> torch.Tensor:
                return summed_loss(self.model, micro)

        spec = job.spec
        model = build_model(spec.model, job.tokenizer.vocab_size, spec.seed)
        self.parameters = model.num_parameters()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": spec.optimizer.weight_decay},
        ]
        settings = {"lr": RATE, "betas": spec.optimizer.betas, "eps": spec.optimizer.eps}
        config = {
            **read_ds_config(spec.engine.ds_config),
            "train_micro_batch_size_per_gpu": len(batches[0].micro_batches[0].tokens_BT),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": spec.engine.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self._engine, *_ = deepspeed.initialize(
            model=WithLoss(model), optimizer=torch.optim.AdamW(groups, fused=True, **settings), config=config
        )
        self.batches = []
        self._labelled = []
        for (micro,) in (batch.micro_batches for batch in batches):
            labelled = int(world.sum((micro.labels_BT != IGNORED).sum()))
            self.batches.append((micro, world.size / labelled))
            self._labelled.append(labelled)
        self._losses: list[torch.Tensor] = []

    def steps(self, count: int) -> None:
        engine, done = self._engine, len(self._losses)
        for micro, scale in self.batches[done : done + count]:
            summed = engine(micro)
            engine.backward(summed * scale)
            engine.step()
            self._losses.append(summed.detach())

    def losses(self, world: World) -> list[float]:
        """Of every step, per labelled position of the whole batch. Collective."""
        import torch

        sums = world.sum(torch.stack(self._losses)).tolist()
        return [total / labelled for total, labelled in zip(sums, self._labelled, strict=False)]


if __name__ == "__main__":
    main()

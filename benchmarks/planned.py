"""What `ernie plan` says of memory and time, beside what training took: small models on CPU ranks, in fp32.

    python -m benchmarks.planned [memory | time] [--quick]

Every case runs in processes of its own (ernie_dist.rehearse): after a first step that is not counted, steps of one and
of two micro-batches in turns. `memory` holds the plan's tensors against the most memory that a rank had resident in a
step, from before its model was built on. glibc is told there to hand back what was freed (MALLOC_MMAP_THRESHOLD_):
what it keeps otherwise is no tensor, and the plan has an allowance of its own for it. `time` runs under glibc's own
settings: it takes the speed from the first job of each kind, plans the others with it, and says what memory they took.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.harness import keep, parser, say, show

if TYPE_CHECKING:
    from ernie_dist.spec.job import JobSpec

GOALS = {"memory": 0.10, "time": 0.15}
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""from 64 KiB on every tensor is mapped for itself, and unmapped when it is freed"""
VOCABULARY = 8192


@dataclass(frozen=True)
class Case:
    """A job: its model, how it is cut, and what runs it."""

    layers: int = 6
    hidden: int = 512
    length: int = 256
    micro: int = 4
    accumulation: int = 1
    recompute: str = "none"
    engine: str = "plain"
    ranks: int = 1
    vocabulary: int = VOCABULARY

    @property
    def name(self) -> str:
        return (
            f"{self.engine} {self.ranks} rank{'s' * (self.ranks > 1)}, {self.layers} x {self.hidden}, "
            f"{self.micro} x {self.length} x {self.accumulation}, recompute {self.recompute}"
            + (f", vocabulary {self.vocabulary}" if self.vocabulary != VOCABULARY else "")
        )


MEMORY = [
    Case(),
    Case(length=1024, micro=1),
    Case(recompute="full"),
    Case(length=128, micro=2, accumulation=2),
    Case(layers=2, hidden=1024, micro=2),
    Case(layers=16, hidden=256),
    Case(vocabulary=65536, layers=4, micro=2),
    *(Case(engine=f"zero{stage}", ranks=ranks, micro=2) for ranks in (1, 2) for stage in range(4)),
    Case(engine="zero2", ranks=2, micro=2, accumulation=2, recompute="full"),
    Case(engine="zero3", ranks=2, micro=2, recompute="full"),
]
TIME = [
    Case(accumulation=2),
    Case(length=1024, micro=1, accumulation=2),
    Case(recompute="full"),
    Case(layers=2, hidden=1024, micro=2),
    Case(layers=12, hidden=384),
    Case(engine="zero2", ranks=2, micro=2, accumulation=2),
    Case(engine="zero2", ranks=2, micro=1, length=512, layers=4),
    Case(engine="zero2", ranks=2, micro=2, layers=2, hidden=1024),
]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("part", nargs="?", choices=("memory", "time"), help="default: both, one after the other")
    arguments = command.parse_args()
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    for part in [arguments.part] if arguments.part else ["memory", "time"]:
        {"memory": memory, "time": time_}[part](quick=arguments.quick)


def memory(*, quick: bool) -> None:
    """The plan's tensors, and what was resident."""
    from launcher import calibrate
    from launcher.memory import estimate_memory

    rows = []
    for case in MEMORY[:2] if quick else MEMORY:
        say(case.name)
        job, shape, device = _planned(case)
        planned = estimate_memory(job, job.curriculum[0], shape, case.ranks, device)
        found = calibrate.run(job, job.curriculum[0], case.vocabulary, 1, HANDED_BACK)
        parts = {name: size for name, size in planned.parts.items() if name not in ("fragmentation", "process")}
        rows.append(_row(case, planned.tensors, found["memory"], parts=parts, process=found["process"]))
        say(f"  {found['memory'] / 1e6:.0f} MB, planned {planned.tensors / 1e6:.0f} ({rows[-1]['off']:+.1%})")
    _tell("memory", rows, "MB", 1e6)
    what = "bytes that a CPU rank had resident at most in a step, and the tensors of ernie plan"
    _keep("memory", what, rows, quick=quick)


def time_(*, quick: bool) -> None:
    """Seconds of a step of one job by the speed of another, and what it took."""
    from launcher import calibrate
    from launcher.estimate import CPU, Cluster, estimate_pace
    from launcher.memory import estimate_memory

    rows, speeds = [], {}
    for case in TIME[:2] if quick else TIME:
        say(case.name)
        job, shape, device = _planned(case)
        found = calibrate.rehearse(job)
        measured = {"memory": found.measured, "seconds": found.seconds}
        if (case.engine, case.ranks) not in speeds:
            speeds[case.engine, case.ranks] = found.speed
            say(f"  its speed is what the next ones are planned with: {found.speed}")
        else:
            cluster = Cluster.of(case.ranks, CPU)
            pace = estimate_pace(job, job.curriculum[0], shape, cluster, speeds[case.engine, case.ranks])
            rows.append(_row(case, job.tokens_per_batch / pace.tokens_per_second, found.seconds))
        planned = estimate_memory(job, job.curriculum[0], shape, case.ranks, device)
        kept = (measured["memory"] - planned.tensors) / planned.tensors
        say(f"  {measured['memory'] / 1e6:.0f} MB under glibc's own settings, {kept:+.0%} over the plan's tensors")
    _tell("time", rows, "s", 1)
    what = "seconds of a step on CPU ranks, and by ernie plan with the speed measured on another job"
    _keep("time", what, rows, quick=quick)


def _row(case: Case, planned: float, measured: float, **more: Any) -> dict[str, Any]:
    return {"case": case.name, "planned": planned, "measured": measured, "off": planned / measured - 1, **more}


def _tell(part: str, rows: Sequence[dict[str, Any]], unit: str, scale: float) -> None:
    header = ("case", f"planned, {unit}", f"measured, {unit}", "off")
    digits = [[f"{row[name] / scale:.4g}" for name in ("planned", "measured")] for row in rows]
    show(header, [(row["case"], *figures, f"{row['off']:+.1%}") for row, figures in zip(rows, digits, strict=True)])
    worst, middle = (function([abs(row["off"]) for row in rows]) for function in (max, median))
    say(f"{part}: off by {worst:.1%} at most, {middle:.1%} in the median; goal: {GOALS[part]:.0%}")


def _keep(part: str, what: str, rows: Sequence[dict[str, Any]], *, quick: bool) -> None:
    worst = max(abs(row["off"]) for row in rows)
    summary = {"goal": GOALS[part], "met": worst <= GOALS[part], "largest_deviation": worst}
    keep(f"planned_{part}", {"what": what, **summary, "rows": list(rows)}, quick=quick)


def _planned(case: Case) -> Any:
    """The job, its model's shape, and a rank's part of this machine."""
    from ernie_dist.spec.hardware import cpu
    from launcher.estimate import shape_of

    job = _job(case)
    return job, shape_of(job), cpu(case.ranks)


def _job(case: Case) -> JobSpec:
    from ernie_dist.spec.job import parse_job

    shape = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": 3 * case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 64,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    stage = {"name": "only", "duration": "2 steps", "sequence_length": case.length, "mixture": {"numbers": 1.0}}
    engine = {"kind": "plain"} if case.engine == "plain" else {"ds_config": case.engine}
    return parse_job(
        {
            "name": "planned",
            "model": {"preset": "ernie-4.5-tiny", "override": shape},
            "tokenizer": {"train": {"vocab_size": case.vocabulary}},
            "tokens_per_batch": case.length * case.micro * case.accumulation * case.ranks,
            "sources": {"numbers": {"path": "none.jsonl", "text": "text"}},
            "curriculum": [stage],
            "schedule": {"kind": "constant", "peak": 1e-3},
            "engine": {
                **engine,
                "precision": "fp32",
                "gradient_checkpointing": case.recompute,
                "micro_batch_size": case.micro,
            },
            "resources": {"gpus_per_node": case.ranks},
        },
        "planned",
    )


if __name__ == "__main__":
    main()

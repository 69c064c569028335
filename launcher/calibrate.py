"""`ernie plan --calibrate`: a few real steps of a job's model on what is here, and the speed kept for later plans.

JobSpec --ranks of ernie_dist.rehearse--> Rehearsal --Speed--> speeds.json --> the next `ernie plan`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import CPU, device_name
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.orphan import die_with_parent
from launcher.estimate import Cluster, Speed, shape_of, work_per_token
from launcher.memory import Memory, Policy, estimate_memory, trained_parameters
from launcher.node import rank_environment

STEPS = 3
"""pairs of steps, at most"""


@dataclass(frozen=True)
class Rehearsal:
    """Steps that were made here, beside what the plan says of them."""

    stage: str
    cluster: Cluster
    speed: Speed
    seconds: float
    """of a step of that stage, its whole batch"""
    measured: float
    """bytes that a rank held at most, from before the model was built"""
    planned: Memory


def rehearse(job: JobSpec) -> Rehearsal:
    """Runs on all of the job's ranks, here. Says how it goes on, to stdout. Raises SpecError where it cannot."""
    ranks, stage, shape = job.resources.world_size, _stage(job), shape_of(job)
    if shape is None or not shape.vocab_size:
        raise SpecError("--calibrate: the model's size is not known; give model.config, or model.override.vocab_size")
    batch = job.batch_plan(stage, ranks)
    found = run(job, stage, shape.vocab_size)
    name = device_name(found["device"], found["device_memory"]) if found["device"] != CPU else CPU
    if name is None:
        raise SpecError(f"--calibrate: {found['device']} is not in the table of devices, so no plan can be made for it")
    cluster = Cluster.of(ranks, name)
    policy = Policy.of(job, cluster.device)
    flops = work_per_token(job, stage, shape)
    positions = batch.micro_batch_size * stage.sequence_length
    updated = trained_parameters(job, shape) / (ranks if policy.zero else 1)
    return Rehearsal(
        stage.name,
        cluster,
        Speed(positions * flops / found["micro_batch"], found["update"] / updated, ranks),
        found["micro_batch"] * batch.gradient_accumulation_steps + found["update"],
        found["memory"],
        estimate_memory(job, stage, shape, ranks, cluster.device),
    )


def run(
    job: JobSpec, stage: StageSpec, vocab_size: int, steps: int = STEPS, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ernie_dist.rehearse found. `environment`: variables for the ranks, besides what they need."""
    ranks = job.resources.world_size
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("job.json", "result.json", "stderr.log")]
        files[0].write_text(job.model_dump_json(), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "ernie_dist.rehearse", str(files[0]), str(files[1]), "--stage", stage.name),
            *("--vocabulary", str(vocab_size), "--steps", str(steps)),
        ]
        with files[2].open("w") as log:
            variables = {**os.environ, **rank_environment(ranks), **(environment or {})}
            done = subprocess.run(command, env=variables, stderr=log, preexec_fn=die_with_parent)
        if not files[1].is_file():
            lines = files[2].read_text(errors="replace").splitlines()
            said = [line for line in lines if "Error" in line or "ernie:" in line]
            why = said[0].strip() if said else f"exit code {done.returncode}"
            raise SpecError(f"--calibrate: the steps could not be made: {why}; does the model fit here? try --set")
        return json.loads(files[1].read_text(encoding="utf-8"))


def _stage(job: JobSpec) -> StageSpec:
    """The one whose sequences are the longest."""
    stages = [stage for stage in job.curriculum if stage.dpo is None]
    if not stages:
        raise SpecError("--calibrate: rehearses stages of plain training, and all of this job's have dpo")
    return max(stages, key=lambda stage: stage.sequence_length)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def speeds_file() -> Path:
    """$XDG_CACHE_HOME/ernie_dist/speeds.json, or the same under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie_dist" / "speeds.json"


def keep(job: JobSpec, found: Rehearsal) -> None:
    """For the next plan for such a device, with this torch and precision, and as many ranks or others."""
    path = speeds_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {**_read(path), _key(job, found.cluster, found.speed.ranks): {"job": job.name, **asdict(found.speed)}}
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def kept(job: JobSpec, cluster: Cluster) -> tuple[Speed, str] | None:
    """A speed measured with as many ranks, or else with one; and the job it was measured on."""
    known = _read(speeds_file())
    for ranks in (cluster.count, 1):
        if one := known.get(_key(job, cluster, ranks)):
            return Speed(one["flops"], one["update"], one["ranks"]), one["job"]
    return None


def _key(job: JobSpec, cluster: Cluster, ranks: int) -> str:
    policy = Policy.of(job, cluster.device)
    engine = f"zero{policy.zero}" if policy.deepspeed else "plain"
    compiled = " compiled" if job.engine.compile else ""
    return f"{cluster.name} torch-{version('torch')} {8 * policy.width}-bit {engine}{compiled} {ranks} rank(s)"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or not ours: what was measured can be measured again
        return {}
    return known if isinstance(known, dict) else {}

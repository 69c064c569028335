"""The script that Slurm runs: slurm/train.sbatch with a job's own options. Pure."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ernie_dist.spec.assets import asset_folder
from ernie_dist.spec.resources import ResourcesSpec

USUAL_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "CUDA_HOME"),
    *("HF_HOME", "ERNIE_DATA", "ERNIE_TOKENIZER"),
)
DEFAULT_NOTICE = 120
"""seconds before the end that Slurm warns, where nothing is known about the saves of the run"""


def render_sbatch(
    resources: ResourcesSpec,
    arguments: Sequence[str],
    *,
    job_name: str,
    folder: Path,
    log: Path,
    notice: int = DEFAULT_NOTICE,
    python: str = sys.executable,
) -> str:
    """A complete batch script.

    arguments: of `ernie launch`. folder: from which the job's paths start. notice: seconds before its end that the job
    is warned, unless resources.slurm.notice says it.
    """
    slurm = resources.slurm
    given = int(slurm.notice.total_seconds()) if slurm.notice else notice
    if resources.time_limit:  # Slurm warns up to a minute early: a job is not to be warned as it begins
        given = min(given, max(10, int(resources.time_limit.total_seconds() - 60) // 2))
    options = [*_options(resources), *_fixed(job_name, folder, log, given, resources), *slurm.options]
    head = "\n".join(f"#SBATCH {option}" for option in options)
    _, _, body = _template().partition("# end of the options\n")
    setup = [f"module load {shlex.join(slurm.modules)}"] if slurm.modules else []
    for before, after in (
        ("ernie=(ernie)", f"ernie=({shlex.join([python, '-m', 'launcher'])})"),
        ('arguments=("$@")', f"arguments=({shlex.join(arguments)})"),
        ("# setup: modules, conda, a virtual environment\n", "".join(f"{line}\n" for line in [*setup, *slurm.setup])),
    ):
        assert body.count(before) == 1, before
        body = body.replace(before, after)
    return f"#!/usr/bin/env bash\n# {job_name}: `sbatch` this file to go on with the run.\n\n{head}\n{body}"


def _options(resources: ResourcesSpec) -> Iterator[str]:
    """What is asked for."""
    slurm = resources.slurm
    yield f"--nodes={resources.nodes}"
    if slurm.gpus is not False:
        kind = "" if slurm.gpus is True else f"{slurm.gpus}:"
        yield f"--gpus-per-node={kind}{resources.gpus_per_node}"
    if slurm.cpus_per_node:
        yield f"--cpus-per-task={slurm.cpus_per_node}"
    if slurm.memory:
        yield f"--mem={slurm.memory}"
    if resources.time_limit:
        yield f"--time={_clock(int(resources.time_limit.total_seconds()))}"
    for name in ("partition", "account", "qos", "reservation", "constraint", "exclude"):
        value = getattr(slurm, name)
        if value:
            yield f"--{name}={shlex.quote(value)}"
    if slurm.exclusive:
        yield "--exclusive"


def _fixed(job_name: str, folder: Path, log: Path, notice: int, resources: ResourcesSpec) -> Iterator[str]:
    """How the job is run, the same for every cluster."""
    yield f"--job-name={job_name}"
    yield "--ntasks-per-node=1"
    yield "--requeue"
    yield f"--signal=B:USR1@{notice}"
    yield f"--chdir={shlex.quote(str(folder))}"
    yield f"--output={shlex.quote(str(log))}"
    yield "--open-mode=append"
    yield "--dependency=singleton"
    yield f"--export={','.join(dict.fromkeys([*USUAL_VARIABLES, *resources.environment]))}"


def _clock(seconds: int) -> str:
    """Days-hours:minutes:seconds, as --time takes it."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"


def _template() -> str:
    return (asset_folder("slurm") / "train.sbatch").read_text(encoding="utf-8")

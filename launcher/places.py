"""The places where a job can run: this machine, a Slurm cluster, a Ray cluster.

Inside a Slurm allocation or a Ray job a launch runs there; outside, it hands the job in and returns.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ernie_dist.spec.errors import ErnieError, SpecError
from ernie_dist.spec.job import JobSpec
from launcher import slurm
from launcher.base import CRASHED, FINISHED, STOPPED, Attempt
from launcher.launch import launch_job
from launcher.local import LocalLauncher
from launcher.logs import follow
from launcher.run_dir import RunDir
from launcher.submission import Submission, slurm_script, submit_to_ray, submit_to_slurm


@dataclass(frozen=True)
class How:
    """What a person may say about a launch, besides the job."""

    workers: int | None = None
    """processes that prepare data; None is one a core"""
    restart: bool = True
    """start crashed attempts again, as the job says"""
    wait: bool = False
    """for another launch of the run to end"""
    follow: bool = False
    """of what is handed in, print the log and wait for its end"""

    @property
    def options(self) -> list[str]:
        """What a job that is handed in has to be told."""
        workers = ["--workers", str(self.workers)] if self.workers else []
        return [*workers, *([] if self.restart else ["--no-restart"]), *(["--wait"] if self.wait else [])]


class Here:
    """This machine."""

    def dry_run(self, job: JobSpec, run_dir: RunDir) -> str:
        _refuse_several_nodes(job)
        return LocalLauncher().render(Attempt(run_dir.root, 1, job.resources))

    def launch(self, job: JobSpec, run_dir: RunDir, how: How) -> int:
        _refuse_several_nodes(job)
        return launch_job(job, run_dir, LocalLauncher(), workers=how.workers, restart=how.restart, wait=how.wait)


class OnSlurm:
    """A Slurm cluster, from where its commands are."""

    def dry_run(self, job: JobSpec, run_dir: RunDir) -> str:
        return slurm_script(job, run_dir)

    def launch(self, job: JobSpec, run_dir: RunDir, how: How) -> int:
        if slurm.inside():
            return self._launch_inside(job, run_dir, how)
        made = submit_to_slurm(job, run_dir, how.options)
        return _handed_in(made, run_dir, str(run_dir.files.submission / "launch.sbatch"), how)

    def _launch_inside(self, job: JobSpec, run_dir: RunDir, how: How) -> int:
        allocation = slurm.Allocation.ours()
        launcher = slurm.SlurmLauncher(allocation, partial(_record, run_dir, allocation.job))
        policy = job.restarts if how.restart else job.restarts.model_copy(update={"max": 0})
        signal.signal(signal.SIGUSR1, signal.default_int_handler)  # until now it is the script's
        try:
            _refuse_other_nodes(job, len(allocation.nodes))
            holder = run_dir.holder()
            ours = holder is not None and holder.job == f"slurm {allocation.job}"  # from before it was put back
            if allocation.restarts and (ours or not run_dir.is_running()) and launcher.given_up(run_dir, policy):
                return CRASHED
            code = launch_job(job, run_dir, launcher, workers=how.workers, restart=how.restart, wait=how.wait or ours)
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept", file=sys.stderr, flush=True)
            code = STOPPED
        try:
            return launcher.put_back(run_dir, code, policy)
        except ErnieError as error:
            print(f"not put back into the queue: {error}; submit it again", file=sys.stderr, flush=True)
            return code


class OnRay:
    """A Ray cluster: from elsewhere by the address of its dashboard, or from inside."""

    def dry_run(self, job: JobSpec, run_dir: RunDir) -> str:
        from launcher.ray.launcher import RayLauncher

        return RayLauncher(job).render(Attempt(run_dir.root, 1, job.resources))

    def launch(self, job: JobSpec, run_dir: RunDir, how: How) -> int:
        from launcher.ray.cluster import connect
        from launcher.ray.data import RayPool
        from launcher.ray.environment import inside, refuse_passing_folder
        from launcher.ray.launcher import RayLauncher

        if job.resources.ray.address and not inside():
            made = submit_to_ray(job, run_dir, how.options)
            return _handed_in(made, run_dir, job.resources.ray.address, how)
        refuse_passing_folder("the run directory", run_dir.root)
        launcher = RayLauncher(job)
        connect()
        return launch_job(job, run_dir, launcher, workers=how.workers, restart=how.restart, wait=how.wait, pool=RayPool)


PLACES: dict[str, Callable[[], Here | OnSlurm | OnRay]] = {"local": Here, "slurm": OnSlurm, "ray": OnRay}


def _handed_in(made: Submission, run_dir: RunDir, where: str, how: How) -> int:
    """Tells a person what to do next, or follows the job."""
    shown = shlex.quote(os.path.relpath(run_dir.root))
    print(
        f"{made.scheduler} job {made.job} submitted: {where}\n"
        f"  ernie status {shown} --watch    ernie logs {shown} -f    ernie stop {shown}\n"
        "Data that is not prepared yet is prepared there, while the nodes wait; `ernie prepare` does it beforehand.",
        flush=True,
    )
    if not how.follow:
        return FINISHED
    try:
        return follow(made, run_dir)
    except KeyboardInterrupt:
        print("\nno longer following; the job goes on", file=sys.stderr)
        return FINISHED


def _record(run_dir: RunDir, job: str) -> None:
    """Of a script that was handed in without us: for `ernie status`, which asks Slurm."""
    known = Submission.read(run_dir.files)
    if known is None or known.job != job:
        Submission("slurm", job, "", time.time()).write(run_dir.files)


def _refuse_several_nodes(job: JobSpec) -> None:
    if job.resources.nodes > 1:
        raise SpecError(
            f"resources.nodes = {job.resources.nodes}: this machine is one node; give --ranks N to run here, or --on "
            "slurm, --on ray"
        )


def _refuse_other_nodes(job: JobSpec, nodes: int) -> None:
    if job.resources.nodes != nodes:
        raise SpecError(
            f"resources.nodes = {job.resources.nodes}, and this allocation has {nodes}: ask for {job.resources.nodes} "
            f"(sbatch --nodes={job.resources.nodes}), or give --set resources.nodes={nodes}"
        )

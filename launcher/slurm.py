"""The launcher inside a Slurm allocation: one task a node, and a job that puts itself back into the queue."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from ernie_dist.spec.errors import ErnieError
from ernie_dist.spec.orphan import die_with_parent
from ernie_dist.spec.resilience import RestartSpec
from ernie_dist.spec.stop_file import read
from launcher import history, slurm_queue
from launcher.base import CRASHED, STOPPED, Attempt, Launcher
from launcher.node import Nodes, node_command
from launcher.restart import without_progress
from launcher.run_dir import RunDir

BATCH_JOB = "ERNIE_BATCH_JOB"
"""variable that train.sbatch sets to its job"""
_ENDING = 60.0
"""seconds for all nodes to end after a rank has failed; torchrun gives the ranks of a node 30"""
_TRIES, _PAUSE = 10, 3.0
"""of a question to Slurm at the end, and seconds between two"""
_KILLING = 30.0
"""seconds for Slurm to end a step"""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Allocation:
    """The nodes that Slurm gave to the job we are in."""

    job: str
    nodes: tuple[str, ...]
    address: str
    """of the first node"""
    cpus_per_task: str | None = None
    restarts: int = 0
    """how often the job was started before"""
    end: float | None = None
    """when it is over, in seconds since the epoch"""

    @classmethod
    def ours(cls, environment: Mapping[str, str] = os.environ) -> Allocation:
        """Raises EnvironmentProblem if Slurm does not answer."""
        job = environment["SLURM_JOB_ID"]
        nodes = slurm_queue.host_names(environment["SLURM_JOB_NODELIST"])
        known = None
        with suppress(ErnieError):  # it may be about to restart; the end is worth knowing, not worth failing for
            known = slurm_queue.find(job)
        return cls(
            job=job,
            nodes=nodes,
            address=slurm_queue.address(nodes[0]),
            cpus_per_task=environment.get("SLURM_CPUS_PER_TASK"),
            restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
            end=known.end if known else None,
        )

    def port(self, attempt: int) -> int:
        """For the first node to listen on: another one for each attempt, below those the kernel gives away."""
        return 10_000 + (int(self.job) * 37 + attempt) % 20_000


def inside() -> bool:
    """Whether this process runs in an allocation."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ


def in_batch_script() -> bool:
    """Whether our own script runs us: a notebook or a shell in an allocation is nobody's to put back."""
    return inside() and os.environ.get(BATCH_JOB) == os.environ["SLURM_JOB_ID"]


class SlurmLauncher(Launcher):
    """Each attempt is one job step."""

    name = "slurm"

    def __init__(self, allocation: Allocation, begun: Callable[[], None] = lambda: None) -> None:
        """begun: called with each attempt, once the run has a folder."""
        self._allocation, self._begun = allocation, begun
        self.deadline = allocation.end
        self._unfit: dict[str, str] = {}

    def render(self, attempt: Attempt) -> str:
        return f"#!/usr/bin/env bash\nexec {shlex.join(self._step(attempt))}\n"

    def run(self, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        run_dir = RunDir(attempt.run_dir)
        folder = run_dir.files.attempt(attempt.number)
        (folder / "launch.sh").write_text(self.render(attempt), encoding="utf-8")
        self._begun()
        step = subprocess.Popen(
            self._step(attempt), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
        )
        failed, until = run_dir.files.error(attempt.number), math.inf
        try:
            while not end_now() and time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    code = step.wait(timeout=0.3)
                    if code:
                        self._note_absent(run_dir, attempt)
                    return code
                if until == math.inf and failed.exists():  # srun waits for the tasks of a node that is gone
                    until = time.monotonic() + _ENDING
        finally:
            if step.poll() is None:
                self._kill(_step_name(attempt), step)
            unfit = history.unfit_nodes(run_dir, attempt.number)
            if len(self._allocation.nodes) == 1 or len(unfit) < len(self._allocation.nodes):
                self._unfit.update(unfit)  # what all nodes suffer from is no fault of a node
        return step.returncode

    def notice(self) -> float | None:
        """By what Slurm says now: preemption moves the job's end to the end of its grace time."""
        with suppress(ErnieError):
            known = slurm_queue.find(self._allocation.job)
            if known and known.end is not None:
                return max(0.0, known.end - time.time())
        return None

    def unfit(self) -> str:
        return "; ".join(f"{node}: {why}" for node, why in self._unfit.items())

    def put_back(self, run_dir: RunDir, code: int, policy: RestartSpec) -> int:
        """Puts the job back into the queue if it ended because its nodes are taken away. Returns the exit code.

        What a person stopped or cancelled stays stopped, and so does what gets nowhere.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm ends us with it, and there is something to do yet
            signal.signal(number, signal.SIG_IGN)
        note = read(run_dir.files.stop)
        if code != STOPPED or not in_batch_script() or (note is not None and not note.by_scheduler):
            return code
        job = self._allocation.job
        known = _patiently(lambda: slurm_queue.find(job))
        if known is not None and known.starts > self._allocation.restarts:
            _say(f"slurm job {job} goes back into the queue, as Slurm has decided")
            return code
        if known is None or not known.may_go_on:
            _say(f"not put back into the queue: slurm job {job} is {known.state if known else 'unknown'}")
            return code
        if self.given_up(run_dir, policy):
            return CRASHED
        without = f", without {', '.join(self._unfit)}" if self._unfit else ""
        _say(f"stopped before the end of its time: slurm job {job} goes back into the queue{without}")
        _patiently(lambda: slurm_queue.requeue(job))
        if self._unfit:
            _patiently(lambda: slurm_queue.exclude(job, tuple(self._unfit)))
        return code

    def given_up(self, run_dir: RunDir, policy: RestartSpec) -> bool:
        """Whether the job had its chances: says so, and begins a new count for whoever submits it again."""
        ends = history.ends(run_dir)
        fruitless = without_progress(ends)
        if fruitless <= policy.max:
            return False
        history.mark_given_up(run_dir, ends[-1])
        _say(
            f"ernie: the run is given up: {fruitless} starts in a row reached no new checkpoint (restarts.max "
            f"{policy.max}). Save more often, or ask for nodes that stay; the same submission goes on",
            error=True,
        )
        return True

    def _note_absent(self, run_dir: RunDir, attempt: Attempt) -> None:
        """A node that did not even leave its name, while others did, most likely does not see the run directory."""
        if read(run_dir.files.stop) is not None or history.unfit_nodes(run_dir, attempt.number):
            return  # it was ended before it could: by Slurm, or because another node is not fit
        files = [run_dir.files.node(attempt.number, rank) for rank in range(len(self._allocation.nodes))]
        if not any(file.exists() for file in files):
            return
        for rank, (node, file) in enumerate(zip(self._allocation.nodes, files, strict=True)):
            if not file.exists():
                why = "nothing was started on it that could write into the run directory; is that mounted there?"
                first = rank * attempt.resources.gpus_per_node
                ranks = [first, first + attempt.resources.gpus_per_node - 1]
                file.write_text(json.dumps({"host": node, "ranks": ranks, "unhealthy": why}), encoding="utf-8")

    def _step(self, attempt: Attempt) -> list[str]:
        here, resources = self._allocation, attempt.resources
        nodes = Nodes(len(here.nodes), resources.gpus_per_node, f"{here.address}:{here.port(attempt.number)}")
        box = resources.slurm.container
        inner = node_command(
            attempt.run_dir,
            attempt.number,
            nodes,
            deadline=attempt.deadline,
            health_check=resources.health_check,
            python=box.python if box else sys.executable,
        )
        logs = attempt.run_dir / "attempts" / f"{attempt.number:04d}" / "node_%4t.log"
        pyxis = box is not None and box.kind == "pyxis"
        mounts = ",".join(box.mounts) if box else ""
        return [
            *("srun", f"--job-name={_step_name(attempt)}", "--export=ALL", "--input=none", f"--error={logs}"),
            *(f"--nodes={len(here.nodes)}", f"--ntasks={len(here.nodes)}", "--ntasks-per-node=1"),
            *((f"--cpus-per-task={here.cpus_per_task}",) if here.cpus_per_task else ()),
            *("--cpu-bind=none", "--kill-on-bad-exit=1"),
            *((f"--container-image={box.image}",) if box and pyxis else ()),
            *((f"--container-mounts={mounts}",) if pyxis and mounts else ()),
            *(("apptainer", "exec", "--nv") if box and not pyxis else ()),
            *(("--bind", mounts) if box and not pyxis and mounts else ()),
            *((box.image,) if box and not pyxis else ()),
            *inner,
        ]

    def _kill(self, name: str, step: subprocess.Popen[bytes]) -> None:
        """The tasks by Slurm, since srun cannot pass on a SIGKILL; then srun itself."""
        with suppress(ErnieError):
            number = slurm_queue.steps(self._allocation.job).get(name)
            if number:
                slurm_queue.kill_step(number)
            with suppress(subprocess.TimeoutExpired):
                step.wait(timeout=_KILLING)
        if step.poll() is None:
            step.kill()
            step.wait()


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Again for a while: a controller that restarts, or puts back fifty jobs at once, answers late."""
    for _ in range(_TRIES - 1):
        with suppress(ErnieError):
            return ask()
        time.sleep(_PAUSE)
    return ask()


def _step_name(attempt: Attempt) -> str:
    return f"attempt-{attempt.number:04d}"


def _say(text: str, *, error: bool = False) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)

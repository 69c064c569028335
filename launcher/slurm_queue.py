"""Slurm's own commands: hand in a script, ask how a job is, cancel it, put it back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ernie_dist.spec.errors import EnvironmentProblem

_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
)
_PATIENCE = 60
"""seconds; a controller that is restarted answers late"""


@dataclass(frozen=True)
class QueuedJob:
    """What Slurm says of a job that it has not forgotten yet."""

    job: str
    fields: Mapping[str, str]
    """of `scontrol show job`: JobState, Reason, NodeList, EndTime ..."""

    @property
    def state(self) -> str:
        return self.fields.get("JobState", "")

    @property
    def in_queue(self) -> bool:
        """Whether it runs, or will, or is just ending."""
        return self.state not in _ENDED

    @property
    def exit_code(self) -> int:
        """Of its script."""
        return int(self.fields.get("ExitCode", "0:0").partition(":")[0])

    @property
    def may_go_on(self) -> bool:
        """Whether it runs, or is being ended by its time limit alone: to requeue a cancelled job would revive it."""
        return self.state == "RUNNING" or self.fields.get("Reason") == "TimeLimit"

    @property
    def starts(self) -> int:
        """How often Slurm has put it back so far; it counts as soon as that is decided."""
        return int(self.fields.get("Restarts", 0))

    @property
    def end(self) -> float | None:
        """When Slurm takes its nodes away, in seconds since the epoch; None if it has not said.

        Of a job without a time limit it names a day in a year, until it preempts it.
        """
        if self.fields.get("TimeLimit") == "UNLIMITED" and self._moment("PreemptTime") is None:
            return None
        return self._moment("EndTime")

    def _moment(self, field: str) -> float | None:
        try:
            return datetime.fromisoformat(self.fields.get(field, "")).replace(tzinfo=timezone.utc).timestamp()
        except ValueError:  # "Unknown", "NONE"
            return None

    def __str__(self) -> str:
        reason, nodes = self.fields.get("Reason", "None"), self.fields.get("NodeList", "(null)")
        said = self.state
        said += f" ({reason})" if reason not in ("None", "") else ""
        begins = self._moment("StartTime")
        if self.state == "PENDING" and begins is not None:
            said += f", expected to start {_shown_time(begins)}"
        if self.state == "RUNNING" and self.end is not None:
            said += f", until {_shown_time(self.end)}"
        return said if nodes in ("(null)", "") else f"{said}, on {nodes}"


def submit(script: Path, *options: str) -> str:
    """Returns the job's id. Raises EnvironmentProblem with Slurm's own words if it is refused."""
    return command("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def find(job: str) -> QueuedJob | None:
    """None once Slurm has forgotten it, some minutes after its end."""
    try:
        said = command("scontrol", "show", "job", "--oneliner", job)
    except EnvironmentProblem as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return QueuedJob(job, dict(re.findall(r"(\w+)=(\S*)", said)))


def cancel(job: str) -> None:
    command("scancel", job)


def requeue(job: str) -> None:
    """Slurm ends what is left of it, and starts it again from the top of its script."""
    command("scontrol", "requeue", job)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """On other nodes from now on. A job can be told so as soon as it does not run any more: right after `requeue`.

    Slurm ends every process of the job at once: the caller, and so this command, has to ignore SIGTERM.
    """
    known = find(job)
    before = known.fields.get("ExcNodeList", "(null)") if known else "(null)"
    excluded = ",".join([*([] if before == "(null)" else [before]), *nodes])
    command("scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}")


def host_names(node_list: str) -> tuple[str, ...]:
    """n[1-2] -> n1, n2"""
    return tuple(command("scontrol", "show", "hostnames", node_list).split())


def address(node: str) -> str:
    """Where other nodes reach it: as Slurm does, or by its name where a person may not ask."""
    with suppress(EnvironmentProblem):
        said = command("scontrol", "show", "node", "--oneliner", node)
        return dict(re.findall(r"(\w+)=(\S*)", said)).get("NodeAddr", node)
    return node


def steps(job: str) -> dict[str, str]:
    """name -> id of the job's steps that run."""
    said = command("squeue", "--steps", "--noheader", "--jobs", job, "--format", "%i %j")
    rows = (line.strip().partition(" ") for line in said.splitlines())
    return {name: number for number, _, name in rows}


def kill_step(step: str) -> None:
    command("scancel", "--signal=KILL", step)


def command(*words: str) -> str:
    """What a command of Slurm prints. Raises EnvironmentProblem with its own words if it fails."""
    if shutil.which(words[0]) is None:
        raise EnvironmentProblem(f"{words[0]}: not found; run this where Slurm's commands are, such as a login node")
    try:
        done = subprocess.run(
            words,
            env={**os.environ, "TZ": "UTC", "SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"{words[0]}: Slurm gave no answer within {_PATIENCE} s; try again later") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise EnvironmentProblem(f"{_shown(words)}: {said}")
    return done.stdout


def _shown_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")


def _shown(words: Sequence[str]) -> str:
    return " ".join(words[:4])

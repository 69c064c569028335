"""Jobs of a Ray cluster, over the HTTP of its dashboard: hand one in, ask about it, read its log, stop it."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ernie_dist.spec.errors import EnvironmentProblem
from launcher.ray.environment import STOP_WAIT


def submit(
    address: str, job: Path, run_dir: Path, *, name: str, stop_wait: timedelta, options: Sequence[str] = ()
) -> str:
    """Hands in `ernie launch JOB --run-dir RUN_DIR --on ray`, from this folder. Returns the id of the submission.

    address: of the dashboard, http://HEAD:8265. options: further ones of `ernie launch`. The paths have to be the same
    on the cluster. Raises EnvironmentProblem if the cluster does not answer or refuses.
    """
    words = ["ernie", "launch", str(job), "--run-dir", str(run_dir), "--on", "ray", *options]
    with _client(address) as client:
        return client.submit_job(
            entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}",
            submission_id=f"{name}-{uuid.uuid4().hex[:8]}",
            runtime_env={"env_vars": {STOP_WAIT: str(round(stop_wait.total_seconds()))}},
            metadata={"run_dir": str(run_dir)},
        )


def state(address: str, submission: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. Raises EnvironmentProblem, also if it is not known there."""
    with _client(address) as client:
        return client.get_job_status(submission).value


def is_over(state: str) -> bool:
    """Whether a job in that state will not change any more."""
    return JobStatus(state).is_terminal()


def cancel(address: str, submission: str) -> bool:
    """`ray job stop`: the run ends with a checkpoint. Returns whether it was running."""
    with _client(address) as client:
        return client.stop_job(submission)


def log(address: str, submission: str) -> str:
    """What the job has printed so far, as far as its head node still has it."""
    with _client(address) as client:
        return client.get_job_logs(submission)


@contextmanager
def _client(address: str) -> Iterator[JobSubmissionClient]:
    """Raises EnvironmentProblem for whatever the cluster has against us."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or a RAY_ADDRESS in the environment would win over the one given
    try:
        yield JobSubmissionClient(address)
    except ConnectionError:
        raise EnvironmentProblem(
            f"{address}: no Ray cluster answers; give the address of its dashboard, http://HEAD:8265, or make a tunnel "
            "to it: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from None
    except (RuntimeError, AuthenticationError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise EnvironmentProblem(
            f"{address}: {reason}; a cluster with RAY_AUTH_MODE=token wants the same variable here, and its token in "
            "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from None

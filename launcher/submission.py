"""What was handed to a scheduler, in RUN_DIR/submission: the job as it was then, the script, the handle, the log.

The scheduled job reads its own copy of the job, so that an edit of the YAML does not change what waits in a queue.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ernie_dist.events.history import read_events
from ernie_dist.spec.errors import ErnieError, RunDirError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.run_files import RunFiles
from launcher import slurm_queue
from launcher.base import FINISHED
from launcher.run_dir import RunDir
from launcher.sbatch import DEFAULT_NOTICE, render_sbatch


@dataclass(frozen=True)
class Submission:
    """The newest one of a run."""

    scheduler: str
    job: str
    """the scheduler's id"""
    log: str
    """what the job prints; a path, or "" where its Ray cluster has it"""
    time: float
    address: str = ""
    """of a Ray cluster's dashboard"""

    def write(self, files: RunFiles) -> None:
        _make_folder(files)
        path = files.submission / "handle.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        aside.replace(path)

    @classmethod
    def read(cls, files: RunFiles) -> Submission | None:
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((files.submission / "handle.json").read_text(encoding="utf-8")))
        return None

    def described(self) -> str:
        """What its scheduler says of it now; why not, if it does not answer."""
        try:
            said = self._queue.state(self).words
        except ErnieError as error:
            said = str(error)
        return f"{self.scheduler} job {self.job}: {said}"

    def in_queue(self) -> bool | None:
        """Whether it waits or runs; None if its scheduler does not answer."""
        try:
            return self._queue.state(self).in_queue
        except ErnieError:
            return None

    def waits(self) -> bool:
        """Whether none of it runs yet, or again, as far as its scheduler says."""
        with suppress(ErnieError):
            return self._queue.state(self).waits
        return False

    def exit_code(self) -> int | None:
        """What the job ended with; None if it has not, or that cannot be seen."""
        with suppress(ErnieError):
            return self._queue.state(self).exit_code
        return None

    def cancel(self) -> None:
        self._queue.cancel(self)

    def printed(self, after: int) -> bytes:
        """What the job has printed, without its first bytes; nothing while that cannot be seen."""
        with suppress(ErnieError, OSError):
            return self._queue.printed(self, after)
        return b""

    @property
    def _queue(self) -> _Queue:
        return _OnRay() if self.scheduler == "ray" else _OnSlurm()


@dataclass(frozen=True)
class _State:
    """How a submitted job is."""

    words: str
    in_queue: bool = False
    """whether it waits or runs"""
    waits: bool = False
    exit_code: int | None = None


class _Queue(Protocol):
    """What a scheduler can be asked. Raises ErnieError where it does not answer."""

    def state(self, given: Submission) -> _State: ...

    def cancel(self, given: Submission) -> None: ...

    def printed(self, given: Submission, after: int) -> bytes: ...


class _OnSlurm:
    def state(self, given: Submission) -> _State:
        known = slurm_queue.find(given.job)
        if known is None:
            return _State("no longer known")
        return _State(str(known), known.in_queue, known.state == "PENDING", None if known.in_queue else known.exit_code)

    def cancel(self, given: Submission) -> None:
        slurm_queue.cancel(given.job)

    def printed(self, given: Submission, after: int) -> bytes:
        with Path(given.log).open("rb") as file:
            file.seek(after)
            return file.read()


class _OnRay:
    def state(self, given: Submission) -> _State:
        state = _ray_jobs().state(given.address, given.job)
        return _State(
            state, not _ray_jobs().is_over(state), state == "PENDING", FINISHED if state == "SUCCEEDED" else None
        )

    def cancel(self, given: Submission) -> None:
        _ray_jobs().cancel(given.address, given.job)

    def printed(self, given: Submission, after: int) -> bytes:
        return _ray_jobs().log(given.address, given.job).encode()[after:]


def runs(run_dir: RunDir) -> bool:
    """Whether a launch is at work. A lease that nobody can look into counts, unless its scheduler says it is over."""
    if not (run_dir.exists() and run_dir.is_running()):
        return False
    holder, submission = run_dir.holder(), Submission.read(run_dir.files)
    if holder is None or submission is None or holder.alive() is not None:
        return True
    ours = holder.job == f"{submission.scheduler} {submission.job}"
    return not (ours and (submission.in_queue() is False or (submission.in_queue() and submission.waits())))


def slurm_script(job: JobSpec, run_dir: RunDir, options: Sequence[str] = ()) -> str:
    """The batch script of a run; `options` are further ones of `ernie launch`. The saves so far decide the notice."""
    files = run_dir.files
    return render_sbatch(
        job.resources,
        [str(files.submission / "job.json"), "--run-dir", str(run_dir.root), *options],
        job_name=_name(job, run_dir),
        folder=Path.cwd(),
        log=files.submission / "slurm-%j.log",
        notice=_notice(files),
    )


def submit_to_slurm(job: JobSpec, run_dir: RunDir, options: Sequence[str] = ()) -> Submission:
    """Hands the run to Slurm. Raises RunDirError if a job of it is there already."""
    files = run_dir.files
    _write_job(job, run_dir)
    script = files.submission / "launch.sbatch"
    script.write_text(slurm_script(job, run_dir, options), encoding="utf-8")
    number = slurm_queue.submit(script)
    made = Submission("slurm", number, str(files.submission / f"slurm-{number}.log"), time.time())
    made.write(files)
    return made


def submit_to_ray(job: JobSpec, run_dir: RunDir, options: Sequence[str] = ()) -> Submission:
    """Hands the run to the cluster at resources.ray.address. Raises RunDirError if a job of it is there already."""
    copy, cluster = _write_job(job, run_dir), job.resources.ray
    address = cluster.address or ""
    number = _ray_jobs().submit(
        address, copy, run_dir.root, name=job.name, stop_wait=cluster.stop_wait, options=options
    )
    made = Submission("ray", number, "", time.time(), address)
    made.write(run_dir.files)
    return made


def _write_job(job: JobSpec, run_dir: RunDir) -> Path:
    run_dir.refuse_foreign_files()
    files, before = run_dir.files, Submission.read(run_dir.files)
    if before is not None and before.in_queue() is not False:
        raise RunDirError(
            f"{run_dir.root}: {before.described()}; watch it with `ernie status {run_dir.root}`, end it with "
            f"`ernie stop {run_dir.root}`"
        )
    _make_folder(files)
    copy = files.submission / "job.json"
    copy.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    return copy


def _make_folder(files: RunFiles) -> None:
    """What a job prints may show more than others should read."""
    files.root.mkdir(parents=True, exist_ok=True)
    files.submission.mkdir(mode=0o700, exist_ok=True)


def _ray_jobs() -> ModuleType:
    """Ray takes a second to import, and need not be installed."""
    from launcher.ray import jobs

    return jobs


def _name(job: JobSpec, run_dir: RunDir) -> str:
    """One for each run directory: Slurm runs one job of a name at a time."""
    return f"{job.name}-{hashlib.sha256(str(run_dir.root).encode()).hexdigest()[:6]}"


def _notice(files: RunFiles) -> int:
    """Seconds: twice the longest save of the run so far, a step and the end of all processes besides."""
    saves = [event["seconds"] for event in read_events(files.events) if event["event"] == "CheckpointSaved"]
    return max(DEFAULT_NOTICE, round(2 * max(saves, default=0.0)) + DEFAULT_NOTICE // 2)

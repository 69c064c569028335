"""What was handed to a scheduler, in RUN_DIR/submission: the job as it was then, the script, the handle, the log.

The scheduled job reads its own copy of the job, so that an edit of the YAML does not change what waits in a queue.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from ernie_dist.events.history import read_events
from ernie_dist.spec.errors import ErnieError, RunDirError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.run_files import RunFiles
from launcher import slurm_queue
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
        files.submission.mkdir(parents=True, exist_ok=True)
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
        name = f"{self.scheduler} job {self.job}"
        try:
            if self.scheduler == "ray":
                return f"{name}: {_ray_jobs().state(self.address, self.job).lower()}"
            known = slurm_queue.find(self.job)
        except ErnieError as error:
            return f"{name}: {error}"
        return str(known) if known else f"{name}: no longer known"

    def in_queue(self) -> bool:
        """Whether it waits or runs, as far as can be seen from here."""
        try:
            if self.scheduler == "ray":
                return not _ray_jobs().is_over(_ray_jobs().state(self.address, self.job))
            known = slurm_queue.find(self.job)
        except ErnieError:
            return False
        return known is not None and known.in_queue

    def cancel(self) -> None:
        if self.scheduler == "ray":
            _ray_jobs().cancel(self.address, self.job)
        else:
            slurm_queue.cancel(self.job)

    def printed(self, after: int) -> bytes:
        """What the job has printed, without its first bytes."""
        if self.scheduler == "ray":
            with suppress(ErnieError):
                return _ray_jobs().log(self.address, self.job).encode()[after:]
        elif Path(self.log).is_file():
            with Path(self.log).open("rb") as file:
                file.seek(after)
                return file.read()
        return b""


def slurm_script(job: JobSpec, run_dir: RunDir) -> str:
    """The batch script of a run: pure but for the time its saves took."""
    files = run_dir.files
    return render_sbatch(
        job.resources,
        [str(files.submission / "job.json"), "--run-dir", str(run_dir.root)],
        job_name=_name(job, run_dir),
        folder=Path.cwd(),
        log=files.submission / "slurm-%j.log",
        notice=_notice(files),
    )


def submit_to_slurm(job: JobSpec, run_dir: RunDir, *options: str) -> Submission:
    """Hands the run to Slurm. Raises RunDirError if a job of it is there already."""
    files = run_dir.files
    _write_job(job, run_dir)
    script = files.submission / "launch.sbatch"
    script.write_text(slurm_script(job, run_dir), encoding="utf-8")
    number = slurm_queue.submit(script, *options)
    made = Submission("slurm", number, str(files.submission / f"slurm-{number}.log"), time.time())
    made.write(files)
    return made


def submit_to_ray(job: JobSpec, run_dir: RunDir) -> Submission:
    """Hands the run to the cluster at resources.ray.address. Raises RunDirError if a job of it is there already."""
    copy, cluster = _write_job(job, run_dir), job.resources.ray
    address = cluster.address or ""
    number = _ray_jobs().submit(address, copy, run_dir.root, name=job.name, stop_wait=cluster.stop_wait)
    made = Submission("ray", number, "", time.time(), address)
    made.write(run_dir.files)
    return made


def _write_job(job: JobSpec, run_dir: RunDir) -> Path:
    run_dir.refuse_foreign_files()
    files, before = run_dir.files, Submission.read(run_dir.files)
    if before is not None and before.in_queue():
        raise RunDirError(
            f"{run_dir.root}: {before.described()}; watch it with `ernie status {run_dir.root}`, end it with "
            f"`ernie stop {run_dir.root}`"
        )
    files.submission.mkdir(parents=True, exist_ok=True)
    copy = files.submission / "job.json"
    copy.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    return copy


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

"""The run directory: freeze the job, one folder per attempt, one owner at a time, and what state it is in."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.layout import EngineLayout
from ernie_dist.spec.lease import Holder, Lease, current
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles, checkpoint_step, complete_checkpoints, read_state

_OURS = (".lock", "lease", "submission")
"""what a launch leaves in a folder before the job is frozen there"""


class RunDir:
    """One run's directory, seen from outside the job."""

    def __init__(self, root: Path) -> None:
        self.files = RunFiles(root.resolve())

    @property
    def root(self) -> Path:
        return self.files.root

    def exists(self) -> bool:
        return self.files.job.is_file()

    def job(self) -> ResolvedJob:
        """Raises RunDirError if this is no run directory."""
        return ResolvedJob.read(self.files.job)

    def freeze(self, job: ResolvedJob) -> list[str]:
        """Writes job.json, or checks that the run may go on as `job` says. Returns what changed since, one line each.

        A run's past cannot be rewritten: raises RunDirError with the differences if a stage already begun differs.
        """
        if not self.exists():
            self.refuse_foreign_files()
            self.root.mkdir(parents=True, exist_ok=True)
            self._write_job(job)
            return []
        old = self.job()
        changes = differences(old, job)
        begun = self.stages_begun()
        same_past = all(
            number < len(job.stages) and job.stages[number].fingerprint == old.stages[number].fingerprint
            for number in range(begun)
        )
        if old.spec.name != job.spec.name or not same_past:
            stages = ", ".join(stage.name for stage in old.stages[:begun]) or "none yet"
            raise RunDirError(
                f"{self.root} belongs to another job (stages begun: {stages}). The differences:\n"
                + "\n".join(f"  {change}" for change in changes)
                + "\nUndo them to go on (to train longer, add a stage), or give another --run-dir to start a new run"
            )
        self._refuse_other_engine(job)
        if changes:
            self._write_job(job)
        return changes

    def new_attempt(self, **launch: Any) -> int:
        """Makes the next attempt's folder, with launch.json and a copy of job.json in it. Returns its number."""
        number = 1 + self.last_attempt()
        folder = self.files.attempt(number)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)  # logs may show more than others should read; fails if somebody has just made it
        (folder / "job.json").write_bytes(self.files.job.read_bytes())
        newest = complete_checkpoints(self.files.checkpoints)[:1]
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "checkpoint": checkpoint_step(newest[0]) if newest else 0,
            **launch,
        }
        (folder / "launch.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        return number

    def attempts(self) -> list[int]:
        """Numbers of the attempts, in order."""
        return sorted(int(path.name) for path in self.files.attempts.glob("[0-9]*"))

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 if there is none."""
        return max(self.attempts(), default=0)

    @contextmanager
    def owned(self, *, wait: bool = False) -> Iterator[Lease]:
        """Holds the run directory against launches on this host and on others; waits for their end with `wait`.

        Raises RunDirError if another launch holds it. An old request to stop is forgotten; one made from now on is not.
        """
        before = _stamp(self.files.stop)
        with self._lock(fcntl.LOCK_EX, tries=None if wait else 10) as got:
            if not got:
                raise RunDirError(
                    f"{self.root}: another launch is running in it; watch it with `ernie status {self.root}`, "
                    f"end it with `ernie stop {self.root}`, or wait for its end with `ernie launch --wait`"
                )
            lease = Lease.acquire(self.root, attempt=1 + self.last_attempt(), wait=wait, say=_say)
            try:
                if before is not None and before == _stamp(self.files.stop):
                    self.files.stop.unlink(missing_ok=True)
                if lease.taken_over:
                    self._fence()
                yield lease
            finally:
                lease.release()

    def _fence(self) -> None:
        """Takes unfinished checkpoints away from the holder before, which may wake up just as it renames one."""
        for folder in self.files.checkpoints.glob("step_*.tmp"):
            with suppress(OSError):
                shutil.rmtree(folder.rename(folder.with_suffix(".fenced")))

    def is_running(self) -> bool:
        """Whether a launch holds the directory. One on another host is taken to live until it lets go."""
        if not self.root.is_dir():
            return False
        with self._lock(fcntl.LOCK_SH, tries=1) as got:
            if not got:
                return True
        holder = self.holder()
        return holder is not None and holder.alive() is not False

    def holder(self) -> Holder | None:
        """Who holds the directory by its lease, dead or alive; None if it was let go."""
        holder = current(self.files.lease)
        return None if holder is None or holder.released else holder

    def ending(self, attempt: int) -> dict[str, Any] | None:
        """How an attempt ended, by the files its ranks left: {"exit_code", "message", ...}; None if they left none."""
        for path in (self.files.error(attempt), self.files.outcome(attempt)):
            with suppress(OSError, ValueError):  # a rank may have been killed while it wrote
                return json.loads(path.read_text(encoding="utf-8"))
        return None

    @contextmanager
    def _lock(self, kind: int, *, tries: int | None) -> Iterator[bool]:
        """Tries again for a moment: whoever only asks whether the run is going on holds the lock that long.

        tries: a tenth of a second each; None waits. A file system without locks leaves it to the lease.
        """
        if not self.root.is_dir():
            yield True
            return
        with (self.root / ".lock").open("a+") as file:  # NFS wants it readable for a shared lock
            for number in itertools.count(1):
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    if number != tries:
                        if number == 10:
                            _say(f"waiting for the end of another launch in {self.root}")
                        time.sleep(0.1)
                        continue
                    yield False
                    return
                except OSError as error:
                    if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                        raise
                break
            yield True

    def stages_begun(self) -> int:
        """Stages that trained weights or records depend on."""
        state = self._newest_state()
        if state:
            return len(state["stages"])
        has_steps = self.files.metrics.is_file() and self.files.metrics.stat().st_size > 0
        return 1 if has_steps else 0

    def skipped_batches(self) -> int:
        """How far the place in the data is ahead of the steps, by the newest checkpoint."""
        progress = self._newest_state().get("progress", {})
        return int(progress.get("batch_index", 0)) - int(progress.get("step", 0))

    def refuse_foreign_files(self) -> None:
        """Raises RunDirError if something else than a run is there."""
        if self.exists():
            return
        if self.root.exists() and not self.root.is_dir():
            raise RunDirError(f"{self.root}: is a file; give a folder with --run-dir")
        strangers = [path.name for path in self.root.iterdir() if path.name not in _OURS] if self.root.is_dir() else []
        if strangers:
            raise RunDirError(
                f"{self.root}: is not empty and no run directory (it holds {', '.join(sorted(strangers)[:3])}); "
                "give a new or empty folder with --run-dir"
            )

    def _refuse_other_engine(self, job: ResolvedJob) -> None:
        """Refused here rather than in the ranks, so that job.json keeps describing what can go on."""
        saved = self._newest_state().get("layout")
        obstacle = saved and EngineLayout.from_json(saved).obstacle(job.layout(job.spec.resources.world_size))
        if obstacle:
            raise RunDirError(f"{self.root}: {obstacle}")

    def _newest_state(self) -> dict[str, Any]:
        """progress.json of the newest checkpoint that has a readable one; a damaged one is for the job to judge."""
        for checkpoint in complete_checkpoints(self.files.checkpoints):
            with suppress(OSError, ValueError):
                state = read_state(checkpoint)
                if isinstance(state, dict) and "stages" in state:
                    return state
        return {}

    def _write_job(self, job: ResolvedJob) -> None:
        aside = self.files.job.with_suffix(".tmp")
        job.write(aside)
        aside.replace(self.files.job)


def differences(old: ResolvedJob, new: ResolvedJob) -> list[str]:
    """Fields of two jobs that differ, as `field: before -> now`."""
    before, now = (_flat(job.model_dump(mode="json", include={"spec", "tokenizer", "sources"})) for job in (old, new))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key.removeprefix('spec.')}: {_said(before, key)} -> {_said(now, key)}" for key in changed]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flat(item, f"{prefix}{key}."))
    return flat


def _said(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "(absent)"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a file from one that takes its place."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _say(text: str) -> None:
    print(text, flush=True)

"""Save, verify, find, restore, prune: the one place that knows when a checkpoint is complete.

step_00000120.tmp/  engine/...         all ranks write
                    progress.json      where the run is, and which stages it has begun
                    manifest.json      size and hash of every file
                    COMPLETE           last
step_00000120/                         the same folder, renamed
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.engine.base import Engine
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import COMPLETE, PROGRESS, complete_checkpoints, read_state
from ernie_dist.world import World

log = logging.getLogger(__name__)
_MANIFEST, _ENGINE = "manifest.json", "engine"


@dataclass(frozen=True)
class Saved:
    """What a save wrote."""

    folder: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Restored:
    """Where a run goes on, and the checkpoints that were passed over on the way: (folder, reason)."""

    progress: Progress
    folder: Path
    seconds: float
    refused: tuple[tuple[Path, str], ...]
    extra: dict[str, Any]
    """what `save` was given, floats to the last bit; {} if that was nothing"""


class CheckpointStore:
    """The checkpoints of one run. Every method but `due` is collective."""

    def __init__(self, folder: Path, job: ResolvedJob, world: World) -> None:
        self._folder, self._job, self._world = folder, job, world
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        world.barrier()

    def due(self, progress: Progress, since: int | None = None) -> bool:
        """Whether a save is due after the batches that led to `progress`, from batch `since` (else the last one)."""
        return self._job.crosses(self._job.spec.checkpoint.every, progress.batch_index, since)

    def save(self, engine: Engine, progress: Progress, extra: dict[str, Any] | None = None) -> Saved:
        """Writes aside, hashes, commits by rename, and prunes. Raises CheckpointError on every rank if any fails."""
        begun = time.monotonic()
        final = self._folder / f"step_{progress.step:08d}"
        aside = final.with_suffix(".tmp")
        self._together(lambda: _empty(aside / _ENGINE), on_main=True, what=f"{aside} cannot be created")
        try:
            engine.save(aside / _ENGINE)
        except (OSError, RuntimeError) as error:
            # A collective: the others wait inside it, not where we could tell them. This rank ends, and ends them.
            raise CheckpointError(
                f"{aside} cannot be written: {error}; the checkpoint before it is untouched. "
                "Free space or mend the disk"
            ) from error
        mine = self._together(lambda: self._hash_share(aside), what=f"{aside} cannot be read back")
        files = {name: entry for part in self._world.gather(mine) for name, entry in part.items()}
        state = self._state(progress, extra or {})
        self._together(lambda: self._commit(aside, final, state, files), on_main=True, what=f"{final}: no commit")
        return Saved(final, sum(entry["bytes"] for entry in files.values()), time.monotonic() - begun)

    def restore(self, engine: Engine) -> Restored | None:
        """Loads the newest checkpoint that verifies; None if there is none at all.

        Raises CheckpointError if there are checkpoints but none can be used: a run never starts over in silence.
        """
        begun = time.monotonic()
        refused: list[tuple[Path, str]] = []
        candidates = self._world.from_main(complete_checkpoints(self._folder) if self._world.is_main else None)
        for folder in candidates:
            reason = self._world.from_main(verify(folder) if self._world.is_main else None)
            if reason is None:
                progress = self._accept(folder)
                engine.load(folder / _ENGINE)
                self._set_aside([bad for bad, _ in refused])
                extra = read_state(folder).get("extra", {})
                return Restored(progress, folder, time.monotonic() - begun, tuple(refused), extra)
            log.warning("checkpoint %s is not used: %s", folder.name, reason)
            refused.append((folder, reason))
        if refused:
            rows = "\n".join(f"  {folder}: {reason}" for folder, reason in refused)
            raise CheckpointError(
                f"no checkpoint of this run can be used:\n{rows}\n"
                "Bring one of them back from a copy, or move them away to start from the first step"
            )
        return None

    def _accept(self, folder: Path) -> Progress:
        """The progress of a verified checkpoint, if it is one of this job and this number of ranks."""
        state = read_state(folder)
        progress = Progress.from_json(state["progress"])
        ours = [stage.fingerprint for stage in self._job.stages]
        for number, (name, theirs) in enumerate(state["stages"]):
            if number >= len(ours) or ours[number] != theirs:
                raise CheckpointError(
                    f"{folder}: stage {number} ({name}) was begun under another description (fingerprint {theirs}, now "
                    f"{ours[number] if number < len(ours) else 'absent'}); a run's past cannot be rewritten: "
                    "restore the job's earlier text, or start a new run directory"
                )
        engine = self._job.engine_identity(self._world.size)
        if state["engine"] != engine:
            raise CheckpointError(
                f"{folder}: was saved with {state['engine']}, this attempt has {engine}; go on with the same "
                "engine and number of ranks (--ranks)"
            )
        device = self._world.device.type
        if state["device"] != device:
            raise CheckpointError(
                f"{folder}: was saved on {state['device']} ranks, this attempt runs on {device}: its numbers "
                "would change; go on where it began"
            )
        return progress

    def _set_aside(self, folders: list[Path]) -> None:
        """Renames checkpoints that were passed over, once a good one is found: they must not push it out later."""
        for folder in folders if self._world.is_main else []:
            aside = folder.with_suffix(".bad")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    def _hash_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Sizes and hashes of this rank's share of the files, on disk for good once this returns."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        share = files[self._world.rank :: self._world.size]
        return {path.relative_to(folder).as_posix(): _entry(path) for path in share}

    def _state(self, progress: Progress, extra: dict[str, Any]) -> dict[str, Any]:
        begun = self._job.stages[: self._job.stage_index(max(0, progress.batch_index - 1)) + 1]
        return {
            "progress": progress.to_json(),
            "stages": [[stage.name, stage.fingerprint] for stage in begun],
            "engine": self._job.engine_identity(self._world.size),
            "device": self._world.device.type,
            "consumed_tokens": self._job.consumed_tokens(progress.batch_index),
            "extra": extra,
        }

    def _commit(self, aside: Path, final: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        _write(aside / PROGRESS, json.dumps(state, indent=1))
        _write(aside / _MANIFEST, json.dumps({"files": {**files, PROGRESS: _entry(aside / PROGRESS)}}, indent=1))
        _write(aside / COMPLETE, "")
        for folder in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
            _sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_folder(self._folder)
        for old in complete_checkpoints(self._folder)[self._job.spec.checkpoint.keep_last :]:
            shutil.rmtree(old)
        for leftover in self._folder.glob("step_*.tmp"):
            shutil.rmtree(leftover)

    def _together(self, action: Callable[[], Any], *, what: str, on_main: bool = False) -> Any:
        """Runs `action` on all ranks (or on rank 0), and fails on all ranks if it fails on one."""
        result, problem = None, None
        try:
            if self._world.is_main or not on_main:
                result = action()
        except (OSError, RuntimeError) as error:
            problem = f"{what}: {error}"
        problems = [text for text in self._world.gather(problem) if text]
        if problems:
            raise CheckpointError(f"{problems[0]}; the checkpoint before it is untouched. Free space or mend the disk")
        return result


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None. Reads every byte of it."""
    try:
        listed = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} is not readable ({type(error).__name__}: {error})"
    if PROGRESS not in files:
        return f"{_MANIFEST} does not list {PROGRESS}"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _digest(path) != digest:
                return f"{name} differs from what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def engine_folder(folder: Path) -> Path:
    return folder / _ENGINE


def _empty(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "blake2b": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

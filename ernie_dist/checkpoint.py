"""Save, verify, find, restore, prune: the one place that knows when a checkpoint is complete.

engine --snapshot, steps wait--> host memory --a thread, behind the steps--> files

step_00000120.tmp/        engine/...         all ranks write
                          progress.json      where the run is, and which stages it has begun
                          manifest.json      size and hash of every file
                          COMPLETE           last
step_00000120/            the same folder, renamed
step_00000120.universal/  the same state for other ranks or another ZeRO stage, once somebody has asked for it
step_00000120.old/        the one that had the name, until the new one has it
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_dist.engine.base import Engine
from ernie_dist.engine.select import convert, refuse_code
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import (
    CheckpointError,
    CheckpointReadError,
    CheckpointWriteError,
    EnvironmentProblem,
    ErnieError,
)
from ernie_dist.spec.layout import EngineLayout
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import PROGRESS, best_checkpoint, checkpoint_folder, complete_checkpoints, read_state
from ernie_dist.trusted_files import (
    UNREAD,
    complete,
    difference,
    entry,
    publish,
    read_manifest,
    write_state,
    write_text,
)
from ernie_dist.world import World

log = logging.getLogger(__name__)
_ENGINE = "engine"
_ASIDE, _CONVERTED, _BAD, _OLD = ".tmp", ".universal", ".bad", ".old"
_NICENESS = 19
"""of the thread that writes: where ranks compute on the CPU, theirs is the right of way"""


@dataclass(frozen=True)
class Saved:
    """What a save wrote."""

    folder: Path
    step: int
    bytes: int
    seconds: float
    """from the snapshot to the last file on disk"""
    blocked: float
    """seconds of it that training stood still"""


@dataclass(frozen=True)
class Restored:
    """Where a run goes on, and the checkpoints that were passed over on the way: (folder, reason)."""

    progress: Progress
    folder: Path
    seconds: float
    refused: tuple[tuple[Path, str], ...]
    converted_from: EngineLayout | None
    """how it was saved, where this attempt's ranks or engine differ"""
    extra: dict[str, Any]
    """what `save` was given, floats to the last bit; {} if that was nothing"""


class CheckpointStore:
    """The checkpoints of one run. Every method but `due` and `saved` is collective."""

    def __init__(
        self,
        folder: Path,
        job: ResolvedJob,
        world: World,
        *,
        base: str | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """`base`: fingerprint of the weights that are in no checkpoint, under an adapter. `before_publishing` raises
        on rank 0 if this attempt has lost the right to add a checkpoint to the run."""
        self._before_publishing, self._base = before_publishing, base
        self._folder, self.job, self._world = folder, job, world
        self._behind = world.apart()  # the thread's own, so that its messages do not mix with those of the steps
        self._under_way: Future[Saved] | None = None
        self._saved: list[Saved] = []
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            before_publishing()
            for old in folder.glob(f"step_*{_OLD}"):  # of a save that was killed between two names
                if not old.with_suffix("").exists():
                    publish(old, old.with_suffix(""))
            for leftover in [*folder.glob(f"step_*{_ASIDE}"), *folder.glob(f"step_*{_OLD}")]:  # it takes up room
                shutil.rmtree(leftover)
        world.barrier()

    def due(self, progress: Progress, since: int | None = None) -> bool:
        """Whether a save is due after the batches that led to `progress`, from batch `since` (else the last one)."""
        return self.job.crosses(self.job.spec.checkpoint.every, progress.batch_index, since)

    def save(self, engine: Engine, progress: Progress, extra: Mapping[str, Any] | None = None) -> None:
        """Takes a snapshot, and has a thread write, hash and commit it. One at a time: waits for the one before.

        `extra` is small, JSON, and given back by `restore`. Raises CheckpointWriteError on every rank if the save
        before it failed on any.
        """
        called = time.monotonic()
        self._wait()
        begun = time.monotonic()
        files = engine.snapshot()
        blocked = time.monotonic() - called
        layout = replace(self.job.layout(self._world.size), precision=engine.precision)
        future: Future[Saved] = Future()

        def write() -> None:
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
                folder, size = self._commit(files, layout, progress, dict(extra or {}))
                future.set_result(Saved(folder, progress.step, size, time.monotonic() - begun, blocked))
            except BaseException as error:  # raised by the next call of the thread that trains
                future.set_exception(error)

        self._under_way = future
        threading.Thread(target=write, name="checkpoint", daemon=True).start()

    def saved(self) -> list[Saved]:
        """What was committed since the last call. Raises CheckpointWriteError if a save failed. Waits for nothing."""
        if self._under_way and self._under_way.done():
            self._wait()
        done, self._saved = self._saved, []
        return done

    def finish(self) -> list[Saved]:
        """`saved`, once the save under way has ended."""
        self._wait()
        return self.saved()

    def restore(self, engine: Engine) -> Restored | None:
        """Loads the newest checkpoint that verifies; None if there is none at all.

        Raises CheckpointError if there are checkpoints but none can be used: a run never starts over in silence.
        """
        begun = time.monotonic()
        refused: list[tuple[Path, str]] = []
        candidates = self._world.from_main(complete_checkpoints(self._folder) if self._world.is_main else None)
        for folder in candidates:
            reason = self._difference(folder)
            if reason is None:
                state = read_state(folder)
                progress, saved = self._accept(folder, state, engine.precision)
                ours = replace(self.job.layout(self._world.size), precision=engine.precision)
                if saved.fits(ours):
                    engine.load(folder / _ENGINE)
                else:
                    engine.load_converted(self._converted(folder) / _ENGINE)
                self._set_aside([bad for bad, reason in refused if UNREAD not in reason])
                seconds, other = time.monotonic() - begun, saved if saved != ours else None
                return Restored(progress, folder, seconds, tuple(refused), other, state["extra"])
            log.warning("checkpoint %s is not used: %s", folder.name, reason)
            refused.append((folder, reason))
        if refused:
            unread = [folder for folder, reason in refused if UNREAD in reason]
            rows = "\n".join(f"  {folder}: {reason}" for folder, reason in refused)
            raise (CheckpointReadError if unread else CheckpointError)(
                f"no checkpoint of this run can be used:\n{rows}\n"
                "Bring one of them back from a copy, or move them away to start from the first step"
            )
        return None

    def _difference(self, folder: Path) -> str | None:
        """Why a checkpoint cannot be trusted, or None. Each rank reads its share of the bytes."""
        try:
            files = sorted(_listed(folder).items())
        except ValueError as error:
            mine = str(error)
        else:
            mine = difference(folder, files[self._world.rank :: self._world.size])
        return next((reason for reason in self._behind.gather(mine) if reason), None)

    def _accept(self, folder: Path, state: dict[str, Any], precision: str) -> tuple[Progress, EngineLayout]:
        """The progress of a verified checkpoint and how it was saved, if it is one of this job."""
        progress = Progress.from_json(state["progress"])
        ours = [stage.fingerprint for stage in self.job.stages]
        for number, (name, theirs) in enumerate(state["stages"]):
            if number >= len(ours) or ours[number] != theirs:
                raise CheckpointError(
                    f"{folder}: stage {number} ({name}) was begun under another description (fingerprint {theirs}, now "
                    f"{ours[number] if number < len(ours) else 'absent'}); a run's past cannot be rewritten: "
                    "restore the job's earlier text, or start a new run directory"
                )
        if state.get("base") != self._base:
            raise CheckpointError(
                f"{folder}: its adapter was trained on other weights than {self.job.spec.model.from_pretrained} holds "
                "now; bring the earlier ones back, or start a new run directory"
            )
        saved = EngineLayout.from_json(state["layout"])
        obstacle = saved.obstacle(replace(self.job.layout(self._world.size), precision=precision))
        if obstacle:
            raise CheckpointError(f"{folder}: {obstacle}")
        device = self._world.device.type
        if state["device"] != device:
            raise CheckpointError(
                f"{folder}: was saved on {state['device']} ranks, this attempt runs on {device}: its numbers "
                "would change; go on where it began"
            )
        return progress, saved

    def _converted(self, folder: Path) -> Path:
        """The checkpoint for any ranks and ZeRO stage: made once, by one process, and kept as long as the other."""
        final = folder.with_suffix(_CONVERTED)

        def make() -> None:
            self._before_publishing()
            if final.is_dir() and verify(final) is None:
                refuse_code(final)
                return
            aside = final.with_name(final.name + _ASIDE)
            for old in (final, aside):
                shutil.rmtree(old, ignore_errors=True)
            _refuse_no_room(folder)
            log.info("converting %s for other ranks or another ZeRO stage", folder.name)
            convert(self.job.spec.engine.kind, folder / _ENGINE, aside / _ENGINE)
            made = [path for path in aside.rglob("*") if path.is_file()]
            complete(aside, {path.relative_to(aside).as_posix(): entry(path, settle=True) for path in made})
            publish(aside, final)

        self._together(self._behind, make, on_main=True, what=f"{final} cannot be made")
        return final

    def _set_aside(self, folders: list[Path]) -> None:
        """Renames checkpoints that were passed over, once a good one is found: they must not push it out later."""
        for folder in folders if self._world.is_main else []:
            self._before_publishing()
            aside = folder.with_suffix(_BAD)
            for old in (aside, folder.with_suffix(_CONVERTED)):
                shutil.rmtree(old, ignore_errors=True)
            folder.rename(aside)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._saved.append(under_way.result())

    def _commit(
        self, files: dict[str, Any], layout: EngineLayout, progress: Progress, extra: dict[str, Any]
    ) -> tuple[Path, int]:
        """In the thread: writes this rank's files aside, and gives the folder its name once all ranks have."""
        final = checkpoint_folder(self._folder, progress.step)
        aside, world = final.with_suffix(_ASIDE), self._behind
        try:
            self._together(world, lambda: _empty(aside), on_main=True, what=f"{aside} cannot be created")
            mine = self._together(world, lambda: _write_files(aside, files), what=f"{aside} cannot be written")
            written = {name: one for part in world.gather(mine) for name, one in part.items()}
            state = self._state(layout, progress, extra)
            self._together(world, lambda: self._publish(aside, final, state, written), on_main=True, what=str(final))
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return final, sum(one["bytes"] for one in written.values())

    def _state(self, layout: EngineLayout, progress: Progress, extra: dict[str, Any]) -> dict[str, Any]:
        begun = self.job.stages[: self.job.stage_index(max(0, progress.batch_index - 1)) + 1]
        return {
            "progress": progress.to_json(),
            "stages": [[stage.name, stage.fingerprint] for stage in begun],
            "layout": layout.to_json(),
            "device": self._world.device.type,
            "base": self._base,
            "consumed_tokens": self.job.consumed_tokens(progress.batch_index),
            "extra": extra,
        }

    def _publish(self, aside: Path, final: Path, state: dict[str, Any], written: dict[str, Any]) -> None:
        complete(aside, {**written, PROGRESS: write_text(aside / PROGRESS, json.dumps(state, indent=1))})
        self._before_publishing()
        old = final.with_suffix(_OLD)
        for derived in (old, final.with_suffix(_CONVERTED)):
            shutil.rmtree(derived, ignore_errors=True)
        if final.exists():  # it may be all there is: it goes once the new one has the name
            final.rename(old)
        publish(aside, final)
        self._prune()

    def _prune(self) -> None:
        """The newest are kept, and the best; a converted one as long as its origin. What resists is tried next time."""
        best = best_checkpoint(self._folder)
        old = [one for one in complete_checkpoints(self._folder)[self.job.spec.checkpoint.keep_last :] if one != best]
        left = [path for kind in (_ASIDE, _OLD) for path in self._folder.glob(f"step_*{kind}")]
        converted = [one for one in self._folder.glob(f"step_*{_CONVERTED}") if not one.with_suffix("").is_dir()]
        for folder in [*old, *left, *converted]:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s is left for now: %s", folder, error)

    def _together(self, world: World, action: Callable[[], Any], *, what: str, on_main: bool = False) -> Any:
        """Runs `action` on all ranks (or on rank 0), and fails on all ranks if it fails on one."""
        result, problem = None, None
        try:
            if world.is_main or not on_main:
                result = action()
        except ErnieError as error:
            problem = str(error)
        except (OSError, RuntimeError) as error:
            problem = f"{what}: {error}; free space or mend the disk, and launch again"
        problems = [text for text in world.gather(problem) if text]
        if problems:
            raise CheckpointWriteError(f"{problems[0]} (the checkpoints before it are untouched)")
        return result


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None. Reads every byte of it."""
    try:
        return difference(folder, _listed(folder).items())
    except ValueError as error:
        return str(error)


def engine_folder(folder: Path) -> Path:
    return folder / _ENGINE


def _listed(folder: Path) -> dict[str, Any]:
    files = read_manifest(folder)
    if folder.suffix != _CONVERTED and PROGRESS not in files:
        raise ValueError(f"its manifest does not list {PROGRESS}")
    return files


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_files(aside: Path, files: dict[str, Any]) -> dict[str, Any]:
    return {f"{_ENGINE}/{name}": write_state(aside / _ENGINE / name, state) for name, state in files.items()}


def refuse_full_disk(folder: Path, job: ResolvedJob, parameters: int) -> None:
    """A run that cannot write its checkpoints had better not begin. One that has begun goes on until it cannot."""
    if complete_checkpoints(folder):
        return
    keep_last, best = job.spec.checkpoint.keep_last, job.spec.evaluate.best is not None
    size = 16 * parameters  # fp32 weights and masters, two moments
    needed = size * (keep_last + best + 1)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder.parent}: {free:,} bytes are free, checkpoints of {size:,} bytes need {needed:,} "
            f"(keep_last {keep_last}{', the best' * best}, and one being written); free space or lower "
            "checkpoint.keep_last"
        )


def _refuse_no_room(folder: Path) -> None:
    """Converting takes the space of the checkpoint once more, and of its parts while it goes on."""
    needed = 2 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"needs {needed:,} bytes, {free:,} are free")

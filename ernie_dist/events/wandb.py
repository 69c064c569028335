"""The only importer of wandb. Weights & Biases sees a copy of the run, and can neither stop it nor slow it down.

handle(event) -> bounded queue -> one daemon thread -> wandb -> RUN_DIR/wandb, and its server if online
metrics.jsonl, events.jsonl of earlier attempts -> what W&B does not hold of them
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import shutil
import struct
import threading
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ernie_dist.events.event import (
    AttemptStarted,
    CheckpointSaved,
    Evaluated,
    Event,
    Failed,
    Finished,
    StepFinished,
    Stopped,
)
from ernie_dist.events.history import read_all_attempts, read_events, read_metrics
from ernie_dist.events.scalars import scalars
from ernie_dist.events.wording import perplexity
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.training import WandbSpec

log = logging.getLogger(__name__)

QUEUE_EVENTS = 10_000
INIT_SECONDS = 20.0
CLOSE_SECONDS = 30.0
STOPPED_CLOSE_SECONDS = 5.0
"""a preempted job has little time before it is killed"""
EXIT_STOPPED = 75
_BLOCK = 1 << 15


class WandbSink:
    """Hands events to the thread that talks to wandb.

    All attempts of a run directory are one W&B run, its id kept in `folder`/run_id, with one history: a step that it
    holds is not logged again when it is executed again, and what it lacks of earlier attempts comes from the run's own
    record. Where the server cannot be reached the attempt is kept offline in `folder`, for `wandb sync`. Where wandb is
    missing, fails or falls behind, events are dropped and counted, and one warning says so.
    """

    def __init__(
        self,
        spec: WandbSpec,
        folder: Path,
        job_config: dict[str, Any],
        run_name: str,
        *,
        queue_events: int = QUEUE_EVENTS,
        init_seconds: float = INIT_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        assert folder.name == "wandb", "wandb itself chooses the last part of the path"
        self._spec = spec
        self._folder = folder
        self._config = job_config
        self._name = run_name
        self._files = RunFiles(folder.parent)
        self._init_seconds = init_seconds
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Event | None] = queue.Queue(maxsize=queue_events)
        self._dropped = 0
        self._broken = False
        self._exit_code = 0
        self._online = False
        self._own_folder = folder
        self._next_step = 0
        """the first one W&B does not hold"""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        if isinstance(event, Stopped):
            self._exit_code = EXIT_STOPPED
            self._close_seconds = min(self._close_seconds, STOPPED_CLOSE_SECONDS)
        elif isinstance(event, Failed):
            self._exit_code = 1
        if self._broken:
            self._dropped += 1
            return
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("W&B does not keep up; what it misses is in metrics.jsonl")

    def close(self) -> None:
        """Waits a bounded time for what is queued to be written or uploaded."""
        if not self._broken:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=self._close_seconds / 2)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._broken = True
            _leave_service()
            log.warning("W&B did not finish in %.0f s and is left behind", self._close_seconds)
        if self._dropped:
            log.warning("W&B missed %d events; metrics.jsonl and events.jsonl hold them all", self._dropped)

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        # Whatever wandb throws, training goes on: this is the one place that knows it.
        try:
            run = self._start()
            while (event := self._queue.get()) is not None:
                self._write(run, event)
            self._finish(run)
        except ImportError:
            self._give_up("wandb is not installed (pip install 'ernie_dist[wandb]')")
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            log.debug("W&B", exc_info=True)

    def _give_up(self, reason: str) -> None:
        if self._broken:  # left behind by close(), which said so
            return
        self._broken = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._dropped += self._queue.get_nowait() is not None
        log.warning("the run goes on without W&B; metrics.jsonl holds everything (%s)", reason)

    def _start(self) -> Any:
        # Before the import, which reads them. Silent also means that it never asks for a key on the terminal.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = set(self._online_files())
        try:
            return self._init(wandb, self._spec.mode)
        except Exception as error:
            if self._spec.mode == "offline" or self._broken:
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("W&B cannot be reached, this attempt is kept offline for `wandb sync` (%s)", first)
            wandb.teardown()  # without it a second init finds the run id in use
            for path in set(self._online_files()) - known:
                shutil.rmtree(path.parent)  # empty
            return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            console="off",  # the console belongs to ConsoleSink
            silent=True,
            init_timeout=self._init_seconds,
            finish_timeout=0.5 * self._close_seconds,  # before close() gives up, so that it can be said what is left
            finish_timeout_raises=True,
            disable_git=True,
            save_code=False,
            stop_fn=_ignore_stop,
        )
        run = wandb.init(
            project=self._spec.project,
            entity=self._spec.entity,
            name=self._name,
            tags=list(self._spec.tags),
            id=self._run_id(),
            resume="allow" if mode == "online" else None,  # offline ignores it with a warning; `wandb sync` joins by id
            mode=mode,
            dir=str(self._folder.parent),
            config=self._config,
            allow_val_change=True,
            settings=settings,
        )
        self._online = mode == "online"
        self._own_folder = Path(run.dir).parent
        self._next_step = run.starting_step
        return run

    def _run_id(self) -> str:
        """The id of this run directory's W&B run, chosen by the first attempt."""
        file = self._folder / "run_id"
        with contextlib.suppress(FileNotFoundError):
            if known := file.read_text(encoding="utf-8").strip():
                return known
        chosen = uuid.uuid4().hex[:8]
        aside = file.with_suffix(".new")
        aside.write_text(chosen + "\n", encoding="utf-8")
        aside.replace(file)
        return chosen

    def _write(self, run: Any, event: Event) -> None:
        if points := scalars(event):
            step = event.step  # type: ignore[attr-defined]  # whatever has points has a step
            if step >= self._next_step:  # never twice: the curve would have two points there
                run.log(points, step=step)
        elif isinstance(event, AttemptStarted):
            if not self._online:  # a server says it itself
                self._next_step = max(run.starting_step, self._first_not_kept(event.attempt))
            for earlier in _of_earlier_attempts(self._files, event):
                self._write(run, earlier)
            facts = event.to_json()
            run.config.update({"attempts": {str(facts.pop("attempt")): facts}}, allow_val_change=True)
        elif isinstance(event, CheckpointSaved):
            path = self._files.checkpoints / Path(event.checkpoint).name
            run.summary.update({"checkpoint/last": str(path), "checkpoint/step": event.step})
        elif isinstance(event, Finished):
            run.summary.update({"export": event.export, "finished_step": event.step})
        elif isinstance(event, Stopped):
            run.mark_preempting()

    def _first_not_kept(self, attempt: int) -> int:
        """By the files in `folder`, for an attempt that is kept offline there."""
        steps = [line["step"] for line in read_all_attempts(self._files.metrics) if line["attempt"] < attempt]
        if not steps:
            return 0
        if any(self._online_files()):
            return 1 + max(steps)  # an attempt was online, and who knows what the server got: rather a gap than doubles
        kept = -1
        for path in self._offline_files():
            try:
                last = _last_step(path)
            except Exception as error:  # the format is wandb's own
                log.warning("%s cannot be read: W&B may lack steps of earlier attempts (%s)", path, error)
                return 1 + max(steps)
            if last is None:
                _hide_from_sync(path)
            else:
                kept = max(kept, last)
        return kept + 1

    def _online_files(self) -> Iterator[Path]:
        return self._folder.glob(f"run-*/run-{self._run_id()}.wandb")

    def _offline_files(self) -> Iterator[Path]:
        """Of earlier attempts."""
        found = self._folder.glob(f"offline-run-*/run-{self._run_id()}.wandb")
        return (path for path in found if path.parent != self._own_folder)

    def _finish(self, run: Any) -> None:
        import wandb

        table = threading.Thread(target=self._add_table, args=(run,), name="wandb-table", daemon=True)
        table.start()
        table.join(0.3 * self._close_seconds)  # wandb asks the service about it, and would wait for it for ever
        try:
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            log.warning("W&B has not got everything; later: wandb sync --include-online %s", self._own_folder)
            wandb.teardown()  # which writes the end of the file; killed now, the service would lose all of it
            return
        if self._online:  # it holds what they do, and `wandb sync` would send their steps a second time
            for path in self._offline_files():
                _hide_from_sync(path)

    def _add_table(self, run: Any) -> None:
        """It covers all attempts, so it comes from the run's own record."""
        import wandb

        try:
            rows = []
            for cell in read_events(self._files.events):
                if cell["event"] == "Evaluated" and cell["loss"] is not None:
                    shown = None if cell.get("pairs") else perplexity(cell["loss"])
                    rows.append([cell["step"], cell["stage"], cell["source"], cell["loss"], shown])
            if rows:
                table = wandb.Table(columns=["step", "stage", "source", "loss", "perplexity"], data=rows)
                run.summary.update({"eval/table": table})
        except Exception as error:  # the service may refuse it and still take the points
            log.warning("W&B does not take the table of evaluations (%s)", (str(error).splitlines() or [""])[0])


def _of_earlier_attempts(files: RunFiles, now: AttemptStarted) -> list[Event]:
    """Steps and evaluations up to where an attempt goes on, in the order of the steps."""
    steps = [line for line in read_metrics(files.metrics) if line["attempt"] < now.attempt and line["step"] <= now.step]
    cells = [
        {**cell, "loss": math.nan if cell["loss"] is None else cell["loss"]}
        for cell in read_events(files.events)
        if cell["event"] == "Evaluated" and cell["step"] <= now.step and cell["time"] < now.time
    ]
    found = [*(_rebuilt(StepFinished, line) for line in steps), *(_rebuilt(Evaluated, cell) for cell in cells)]
    return sorted(found, key=lambda event: event.step)


def _rebuilt(kind: Any, line: dict[str, Any]) -> Any:
    return kind(**{field.name: line[field.name] for field in fields(kind) if field.name in line})


def _last_step(path: Path) -> int | None:
    """The last step in wandb's transaction log, -1 if there is none; None if the attempt did not live to finish it.

    wandb writes it in blocks of 32 KiB: of a killed attempt the end is missing, often all, and `wandb sync` gives up
    there. 7 bytes of header, then protobuf records in LevelDB's log format.
    """
    from wandb.proto import wandb_internal_pb2

    raw, position, body = path.read_bytes(), 7, b""
    last, finished = -1, False
    while position + 7 <= len(raw):
        if (left := _BLOCK - position % _BLOCK) < 7:  # a block's end too short for a header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[position : position + 7])
        position += 7 + length
        body += raw[position - length : position]
        if position <= len(raw) and kind in (1, 4):  # a whole record, or its last part; 2 is the first, 3 the middle
            record = wandb_internal_pb2.Record.FromString(body)
            last = record.history.step.num if record.HasField("history") else last
            finished = finished or record.HasField("exit")
            body = b""
    return last if finished else None


def _hide_from_sync(path: Path) -> None:
    """Marks a file as wandb marks those it has sent."""
    path.with_suffix(".wandb.synced").touch()


def _ignore_stop() -> None:
    """The web page's stop button would interrupt the main thread between two ranks' collectives."""
    log.warning("W&B asks to stop the run; observers do not steer: use `ernie stop`")


def _leave_service() -> None:
    """Ends wandb's own process if it hangs: its exit hook would wait for it for ever and keep this process alive."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        # Not through its functions: they wait for a lock that a hanging start holds.
        connection = wandb_setup._singleton._connection
        connection._cleanup()
        connection._proc._process.kill()

"""A run's output, as it is written: of one rank, from attempt to attempt; before that, of its submission."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ernie_dist.spec.errors import RunDirError
from launcher.base import CRASHED
from launcher.run_dir import RunDir
from launcher.submission import Submission, runs

_PAUSE, _PAUSE_IN_QUEUE = 0.5, 5.0
"""seconds between two looks; a scheduler is asked less often"""


def print_logs(run_dir: RunDir, rank: int, *, follow: bool) -> None:
    """follow: until nothing runs or waits any more. Raises RunDirError if there is no such log."""
    shown: _Tail | None = None
    while True:
        at_work = follow and runs(run_dir)
        over = not at_work and not (follow and _waits(run_dir))
        attempt = run_dir.last_attempt()
        path = _log(run_dir, attempt, rank)
        if shown is not None:
            shown.print()
        if path is not None and path.is_file() and (shown is None or shown.path != path):
            shown = _Tail(path)
            shown.print()
        if over and shown is None:
            ranks = run_dir.job().spec.resources.world_size if run_dir.exists() else 0
            raise RunDirError(f"{path or run_dir.root}: no such log; attempt {attempt} has {ranks} rank(s)")
        if over:
            return
        time.sleep(_PAUSE if at_work else _PAUSE_IN_QUEUE)


def follow(submission: Submission, run_dir: RunDir) -> int:
    """Prints what a submitted job prints until it has left the queue. Returns its exit code."""
    read, before = 0, run_dir.last_attempt()
    while True:
        over = submission.in_queue() is False
        text = submission.printed(read)
        read += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        if over:
            code, attempt = submission.exit_code(), run_dir.last_attempt()
            ending = run_dir.ending(attempt) if attempt > before else None
            return code if code is not None else int(ending["exit_code"]) if ending else CRASHED
        time.sleep(_PAUSE_IN_QUEUE)


def _log(run_dir: RunDir, attempt: int, rank: int) -> Path | None:
    if attempt:
        return run_dir.files.rank_log(attempt, rank)
    submission = Submission.read(run_dir.files)
    return Path(submission.log) if submission and submission.log else None


def _waits(run_dir: RunDir) -> bool:
    submission = Submission.read(run_dir.files)
    return submission is not None and submission.in_queue() is not False


class _Tail:
    """What a growing file has that was not printed yet."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def print(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

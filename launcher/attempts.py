"""Attempt after attempt, until the run is finished, stopped or given up: the same for every launcher."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from ernie_dist.spec.errors import RecordNotKept
from ernie_dist.spec.lease import Lease
from ernie_dist.spec.resilience import RestartSpec
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.stop_file import read
from launcher import history
from launcher.base import CRASHED, FINISHED, STOPPED, WRONG, Attempt, Launcher
from launcher.history import Cause
from launcher.restart import AttemptEnd, GiveUp, Over, decide
from launcher.run_dir import RunDir


@contextmanager
def _record_kept() -> Iterator[None]:
    """What the disk of the run refuses says nothing against its job: exit code 1, not 2."""
    try:
        yield
    except OSError as error:
        where = error.filename or "the run directory"
        raise RecordNotKept(f"{where}: {error.strerror or error}; launch again") from None


@_record_kept()
def run_attempts(
    launcher: Launcher,
    run_dir: RunDir,
    job: ResolvedJob,
    lease: Lease,
    *,
    policy: RestartSpec,
    deadline: float | None,
    describe_batch: Callable[[int], str],
) -> int:
    """Returns the exit code of the contract. Raises LeaseLost, with the ranks ended, once another launch took over.

    deadline: when the launch has to be over, in seconds since the epoch; restarts do not move it.
    describe_batch: batch index -> what is in it, for a person who looks for the row that breaks a run.
    """
    history.ends(run_dir)  # what a launcher that was killed could not record
    while True:
        if read(run_dir.files.stop) is not None:
            return STOPPED
        number = run_dir.new_attempt(launcher=launcher.name, ranks=job.spec.resources.world_size)
        lease.begin(number)
        guard = _Guard(run_dir, lease, number)
        returncode = launcher.run(Attempt(run_dir.root, number, job.spec.resources, deadline), guard.end_now)
        lease.confirm()  # its ranks may have found out first
        found = Cause(STOPPED, guard.reason) if guard.reason else history.cause(run_dir, number, returncode)
        end = history.record_end(run_dir, number, found)
        _explain(found)
        if read(run_dir.files.stop) is not None and end.exit_code not in (FINISHED, WRONG):
            if end.exit_code != STOPPED or guard.reason:
                _say(f"attempt {number} {_where(end)}; {_repeated(run_dir, job, end)}", flush=True)
            return STOPPED
        unfit = launcher.unfit()
        if unfit:
            _say(f"attempt {number} {_where(end)}; {_repeated(run_dir, job, end)}", flush=True)
            _say(f"no further attempt on these nodes: {unfit}", file=sys.stderr)
            return STOPPED
        decision = decide(policy, history.ends(run_dir))
        if isinstance(decision, Over):
            return decision.exit_code
        if isinstance(decision, GiveUp):
            history.mark_given_up(run_dir, end)
            _say(f"attempt {number} {_where(end)}; {_repeated(run_dir, job, end)}", flush=True)
            _say_given_up(run_dir, job, decision, describe_batch)
            return CRASHED
        again = f"starts again in {decision.wait:.0f} s" if decision.wait else "starts again"
        count = f" (restart {decision.number} of at most {policy.max} without a new checkpoint)"
        _say(
            f"attempt {number} {_where(end)}; {_repeated(run_dir, job, end)}; {again}{count if decision.number else ''}"
        )
        if deadline is not None and time.time() + decision.wait >= deadline:
            _say("the time limit comes before that")
            return STOPPED
        if not _waited(run_dir, lease, decision.wait):
            return STOPPED


class _Guard:
    """What ends an attempt at once."""

    def __init__(self, run_dir: RunDir, lease: Lease, attempt: int) -> None:
        self._run_dir, self._lease, self._attempt = run_dir, lease, attempt
        self.reason = ""

    def end_now(self) -> bool:
        """Raises LeaseLost."""
        self._lease.refuse_if_lost()
        note = read(self._run_dir.files.stop)
        if note is not None and note.now:
            self.reason = f"ended at once ({note.reason})"
        elif note is not None and not history.has_begun(self._run_dir, self._attempt):
            self.reason = f"ended while it was starting up ({note.reason})"  # a large model takes minutes to load
        return bool(self.reason)


def _say(text: str, *, file: TextIO | None = None, flush: bool = True) -> None:
    """Whoever reads along may leave, as `| tee` does when its disk is full: the run goes on."""
    with suppress(OSError):
        print(text, file=file or sys.stdout, flush=flush)


def _waited(run_dir: RunDir, lease: Lease, seconds: float) -> bool:
    """False if a stop was asked for meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lease.refuse_if_lost()
        if read(run_dir.files.stop) is not None:
            return False
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
    return True


def _explain(found: Cause) -> None:
    if found.exit_code == FINISHED:
        return
    if found.exit_code == STOPPED:
        if found.message:
            _say(f"\n{found.message}", flush=True)
        return
    _say(f"\nernie: {found.message}", file=sys.stderr, flush=True)
    if found.exit_code == CRASHED and found.log is not None:
        _say(f"(log: {found.log})", file=sys.stderr, flush=True)


def _say_given_up(run_dir: RunDir, job: ResolvedJob, decision: GiveUp, describe_batch: Callable[[int], str]) -> None:
    _say(f"ernie: the run is given up: {decision.reason}", file=sys.stderr)
    if decision.suspect is not None:
        batch = decision.suspect - 1 + run_dir.skipped_batches()
        if batch < job.total_batches:
            _say(f"Perhaps it is the data of step {decision.suspect}: {describe_batch(batch)}", file=sys.stderr)
    _say("Once the cause is removed, the same command goes on from the last checkpoint", file=sys.stderr, flush=True)


def _where(end: AttemptEnd) -> str:
    return "ended before its first step" if end.after_step is None else f"ended after step {end.after_step}"


def _repeated(run_dir: RunDir, job: ResolvedJob, end: AttemptEnd) -> str:
    """What of its work the next attempt does again."""
    kept = f"step_{end.checkpoint:08d} stays" if end.checkpoint else "there is no checkpoint yet"
    reached = max(end.after_step or 0, end.checkpoint)
    skipped = run_dir.skipped_batches()
    first, last = (min(step + skipped, job.total_batches) for step in (end.checkpoint, reached))
    tokens = job.consumed_tokens(last) - job.consumed_tokens(first)
    return f"{kept}, {reached - end.checkpoint} steps ({tokens:,} tokens) are done again"

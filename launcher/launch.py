"""From a job to a finished run: prepare the data, freeze the job, start attempts until it is over, report on it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ernie_dist.spec.errors import ErnieError, RunDirError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.lease import Lease
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.stop_file import SIGNALS, StopNote, ask, read
from launcher.attempts import run_attempts
from launcher.base import FINISHED, STOPPED, Launcher
from launcher.run_dir import RunDir

if TYPE_CHECKING:
    from ernie_dist.data.prepare import MakePool


def launch_job(
    job: JobSpec,
    run_dir: RunDir,
    launcher: Launcher,
    *,
    workers: int | None,
    restart: bool = True,
    wait: bool = False,
    pool: MakePool | None = None,
) -> int:
    """Runs the job to its end, or until it is stopped or given up. Returns the exit code of the contract.

    restart: start crashed attempts again, as the job says. wait: for another launch in the same directory to end.
    pool: what tokenises data that is not prepared yet; by default `workers` processes of this machine.
    """
    begun = time.time()
    run_dir.refuse_foreign_files()
    with ExitStack() as held:
        lease: Lease | None = None
        if run_dir.exists():  # a run that is new leaves no folder until its data is known to be good
            lease = held.enter_context(run_dir.owned(wait=wait))
        with _interrupted_by(run_dir.files.stop):
            resolved = _prepared(job, run_dir, workers, pool)
        if lease is None:
            run_dir.root.mkdir(parents=True, exist_ok=True)
            lease = held.enter_context(run_dir.owned(wait=wait))
        for change in run_dir.freeze(resolved):
            print(f"changed since the last attempt: {change}")
        with _signals_become(run_dir.files.stop, launcher.notice):
            code = run_attempts(
                launcher,
                run_dir,
                resolved,
                lease,
                policy=job.restarts if restart else job.restarts.model_copy(update={"max": 0}),
                deadline=_deadline(job, launcher, begun),
                describe_batch=partial(_describe_batch, resolved),
            )
        if code == FINISHED:
            _report(run_dir.root)
    if code == STOPPED:
        print(f"stopped; the same command goes on ({run_dir.root})")
    return code


def _deadline(job: JobSpec, launcher: Launcher, begun: float) -> float | None:
    """In seconds since the epoch: of the nodes, or of the launch that a time limit was set for."""
    limit = job.resources.time_limit
    ends = [launcher.deadline, begun + limit.total_seconds() if limit else None]
    return min((end for end in ends if end is not None), default=None)


def _prepared(job: JobSpec, run_dir: RunDir, workers: int | None, pool: MakePool | None) -> ResolvedJob:
    if run_dir.exists() and run_dir.stages_begun() and Path(run_dir.job().tokenizer.folder).is_dir():
        _refuse_changed_data(job, run_dir)
    from ernie_dist.data.prepare import prepare
    from ernie_dist.data.resolve import resolve_prepared
    from ernie_dist.data.summary import describe_data

    print(f"preparing data in {job.data_dir}, or finding it prepared", flush=True)
    prepared = prepare(job, workers=workers, pool=pool)
    print("\n".join(describe_data(job, prepared)), flush=True)
    return resolve_prepared(job, prepared)


def _describe_batch(job: ResolvedJob, index: int, most: int = 8) -> str:
    """The stage of a batch and the packed sequences in it, source by source."""
    from ernie_dist.data.curriculum import Curriculum

    stage, order, ids = Curriculum(job).locate(index)
    parts = []
    for number, name in enumerate(order.sources):
        packed = order.packed(number, ids[ids[:, 0] == number, 1]).tolist()
        if packed:
            more = f" and {len(packed) - most} more" if len(packed) > most else ""
            parts.append(f"{name} {', '.join(map(str, packed[:most]))}{more}")
    return f"batch {index}, stage {stage.name}, packed sequences of {'; of '.join(parts)}"


@contextmanager
def _interrupted_by(stop: Path) -> Iterator[None]:
    """Where nothing looks at the stop file, it becomes a SIGTERM to ourselves: KeyboardInterrupt, as cli.py has it."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if read(stop) is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _signals_become(stop: Path, notice: Callable[[], float | None]) -> Iterator[None]:
    """The first signal asks for a stop with a checkpoint; a second Ctrl-C for one at once."""
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = asked and number == signal.SIGINT
        first, asked = not asked, True
        if first or now:
            before, name = read(stop), signal.Signals(number).name
            reason = name if before is None or before.by_scheduler else before.reason  # a person's wish stays one
            ask(stop, StopNote(reason, now=now))
            left = notice()
            if left is not None:
                ask(stop, StopNote(reason, left, now=now))
            again = "; press Ctrl-C again to end without one" if number == signal.SIGINT else ""
            said = "ending at once; the last checkpoint stays" if now else f"stopping, with a checkpoint{again}"
            os.write(2, f"\n{said}\n".encode())  # print() may be what was interrupted

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _refuse_changed_data(job: JobSpec, run_dir: RunDir) -> None:
    """A run goes on with the data it began with, or not at all."""
    from ernie_dist.data.prepare import PreparedJob, differences, survey

    old = run_dir.job()
    recorded = PreparedJob(
        tokenizer_folder=Path(old.tokenizer.folder),
        tokenizer_fingerprint=old.tokenizer.fingerprint,
        vocab_size=old.tokenizer.vocab_size,
        sources={name: Path(source.folder) for name, source in old.sources.items()},
    )
    current = survey(job)
    both = recorded.sources.keys() & current.sources.keys()  # a stage to come may bring sources, or leave some out
    for one in (recorded, current):
        for name in one.sources.keys() - both:
            del one.sources[name]
    changed = differences(recorded, current)
    if changed:
        raise RunDirError(
            f"{run_dir.root}: the data is not what the run began with:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nBring the old files back to go on, or give another --run-dir to start a new run"
        )


def _report(root: Path) -> None:
    """The report is for reading: whatever is wrong with it, the attempt's own result stands."""
    from ernie_dist.report import build_report

    try:
        print(f"report: {build_report(root)}")
    except (ErnieError, OSError, ValueError) as error:
        print(f"no report: {error}", file=sys.stderr)

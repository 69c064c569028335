"""From a job to a running attempt: prepare the data, freeze the job, start it, report on it."""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_dist.spec.errors import ErnieError, RunDirError, SpecError
from ernie_dist.spec.job import JobSpec
from launcher.base import FINISHED, STOPPED, Attempt
from launcher.local import LocalLauncher
from launcher.plan import describe
from launcher.run_dir import RunDir


def launch_job(job: JobSpec, run_dir: RunDir, *, workers: int | None, dry_run: bool) -> int:
    """Runs the job to its end, a stop or a crash. Returns the exit code of the contract."""
    if job.resources.nodes > 1:
        raise SpecError(
            f"resources.nodes = {job.resources.nodes}: this launcher has one node; give --ranks N to run here"
        )
    launcher = LocalLauncher()
    if dry_run:
        print("\n".join(describe(job)))
        print(f"\n{launcher.render(Attempt(run_dir.root, 1, job.resources))}")
        return FINISHED
    run_dir.refuse_foreign_files()
    if run_dir.exists() and run_dir.stages_begun() and Path(run_dir.job().tokenizer.folder).is_dir():
        _refuse_changed_data(job, run_dir)
    from ernie_dist.data.prepare import prepare
    from ernie_dist.data.resolve import resolve_prepared

    print(f"preparing data in {job.data_dir}, or finding it prepared", flush=True)
    resolved = resolve_prepared(job, prepare(job, workers=workers))
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with run_dir.owned():
        for change in run_dir.freeze(resolved):
            print(f"changed since the last attempt: {change}")
        number = run_dir.new_attempt(launcher="local", ranks=job.resources.world_size)
        code = launcher.run(Attempt(run_dir.root, number, job.resources))
        if code == FINISHED:
            _report(run_dir.root)
    if code == STOPPED:
        print(f"stopped; the same command goes on ({run_dir.root})")
    return code


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

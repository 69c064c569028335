"""What a run is doing, from the files it writes."""

from __future__ import annotations

import sys
import time

from launcher import history
from launcher.plan import duration
from launcher.run_dir import RunDir
from launcher.submission import Submission


def describe_run(run_dir: RunDir) -> list[str]:
    """State, queue, attempt, nodes, stage, step, loss, speed and time left, one line each."""
    from ernie_dist.events.goodput import of_run
    from ernie_dist.events.history import read_metrics

    attempt, submission = run_dir.last_attempt(), Submission.read(run_dir.files)
    lines = [f"run        {run_dir.root}"]
    if submission is not None:
        lines.append(f"queue      {submission.described()}")
    if not run_dir.exists():
        return [*lines, "state      submitted; nothing of it has begun"]
    job, steps = run_dir.job(), read_metrics(run_dir.files.metrics)
    again = f" ({attempt - 1} restart{'s' if attempt > 2 else ''})" if attempt > 1 else ""
    waits = submission is not None and submission.in_queue() and not run_dir.is_running()
    state = "in the queue, to go on from there" if waits and attempt else _state(run_dir, attempt)
    lines += [f"state      {state}", f"attempt    {attempt}{again}"]
    nodes = [node.get("host", "?") for node in history.nodes(run_dir, attempt)]
    if len(nodes) > 1:
        lines.append(f"nodes      {', '.join(nodes)}")
    if not steps:
        return [*lines, "step       none yet"]
    last = steps[-1]
    left = job.total_tokens - last["consumed_tokens"]
    recent = steps[-20:]
    speed = sum(step["tokens_per_second"] for step in recent) / len(recent)
    return [
        *lines,
        f"stage      {last['stage']}",
        f"step       {last['step']:,} of {job.total_batches:,} ({last['consumed_tokens'] / job.total_tokens:.1%})",
        f"loss       {last['loss']:.4f}",
        f"speed      {speed:,.0f} tokens/s",
        f"time left  {duration(left / speed) if left else 'none'}",
        f"goodput    {_shares(of_run(run_dir.files, job))}",
        f"last step  {duration(max(0.0, time.time() - last['time']))} ago",
    ]


def watch(run_dir: RunDir, *, every: float = 2.0) -> None:
    """Describes the run again and again, until it is over. every: seconds."""
    while True:
        text = "\n".join(describe_run(run_dir))
        print(f"\033[H\033[J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
        submission = Submission.read(run_dir.files)
        runs = run_dir.exists() and run_dir.is_running()
        if not runs and not (submission is not None and submission.in_queue()):
            return
        time.sleep(every)


def _shares(seconds: dict[str, float]) -> str:
    """Of the wall time up to the last record of the run."""
    from ernie_dist.events.goodput import described, goodput

    rest = ", ".join(f"{part} {share:.1%}" for part, _, share in described(seconds, least=0.01)[1:])
    whole = f"{goodput(seconds):.1%} of {duration(sum(seconds.values()))} in steps that counted"
    return f"{whole}; {rest}" if rest else whole


def _state(run_dir: RunDir, attempt: int) -> str:
    if run_dir.is_running():
        holder = run_dir.holder()
        where = f" on {holder}" if holder else ""
        if holder is not None and holder.alive() is None:
            where += ", as far as can be seen from here"
        if run_dir.files.stop.exists():
            return f"stopping{where}"
        return f"{'waiting to start again' if run_dir.files.end(attempt).exists() else 'running'}{where}"
    ending = run_dir.ending(attempt) if attempt else None
    if ending is None:
        return "not running; the last attempt was killed or never began" if attempt else "never started"
    if "message" in ending:
        return f"failed: {ending['message']}"
    return "finished" if ending["exit_code"] == 0 else "stopped on request, goes on with the next launch"

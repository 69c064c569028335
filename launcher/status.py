"""What a run is doing, from the files it writes."""

from __future__ import annotations

import time

from launcher.plan import duration
from launcher.run_dir import RunDir


def describe_run(run_dir: RunDir) -> list[str]:
    """State, attempt, stage, step, loss, speed and time left, one line each."""
    from ernie_dist.events.goodput import of_run
    from ernie_dist.events.history import read_metrics

    job, attempt = run_dir.job(), run_dir.last_attempt()
    steps = read_metrics(run_dir.files.metrics)
    lines = [f"run        {run_dir.root}", f"state      {_state(run_dir, attempt)}", f"attempt    {attempt}"]
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

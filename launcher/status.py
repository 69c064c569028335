"""What a run is doing, from the files it writes."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

from launcher import history
from launcher.plan import duration
from launcher.run_dir import RunDir
from launcher.submission import Submission, runs


@dataclass(frozen=True)
class Slow:
    """What takes its time to find out: a scheduler is asked, the whole record is read."""

    queue: str | None
    in_queue: bool | None
    runs: bool
    goodput: str

    @classmethod
    def ask(cls, run_dir: RunDir) -> Slow:
        from ernie_dist.events.goodput import of_run

        submission = Submission.read(run_dir.files)
        return cls(
            queue=submission.described() if submission else None,
            in_queue=submission.in_queue() if submission else False,
            runs=runs(run_dir),
            goodput=_shares(of_run(run_dir.files, run_dir.job())) if run_dir.files.metrics.is_file() else "",
        )


def describe_run(run_dir: RunDir, slow: Slow | None = None) -> list[str]:
    """Queue, state, attempt, nodes, stage, step, loss, speed and time left, one line each.

    slow: from a look that was not long ago; asked now by default.
    """
    slow = slow or Slow.ask(run_dir)
    attempt = run_dir.last_attempt()
    lines = [f"run        {run_dir.root}"]
    if slow.queue is not None:
        lines.append(f"queue      {slow.queue}")
    if not run_dir.exists():
        return [*lines, "state      submitted; nothing of it has begun"]
    again = f" ({attempt - 1} restart{'s' if attempt > 2 else ''})" if attempt > 1 else ""
    waits = slow.in_queue and not slow.runs and attempt
    state = "in the queue, to go on from there" if waits else _state(run_dir, attempt, slow)
    lines += [f"state      {state}", f"attempt    {attempt}{again}"]
    nodes = [node.get("host", "?") for node in history.nodes(run_dir, attempt)]
    if len(nodes) > 1:
        lines.append(f"nodes      {', '.join(nodes)}")
    recent = history.last_steps(run_dir, 20)
    if not recent:
        return [*lines, "step       none yet"]
    job, last = run_dir.job(), recent[-1]
    left = 0 if state == "finished" else job.total_tokens - last["consumed_tokens"]  # it may have ended early
    speed = sum(step["tokens_per_second"] or 0.0 for step in recent) / len(recent)
    return [
        *lines,
        f"stage      {last['stage']}",
        f"step       {last['step']:,} of {job.total_batches:,} ({last['consumed_tokens'] / job.total_tokens:.1%})",
        f"loss       {math.nan if last['loss'] is None else last['loss']:.4f}",
        f"speed      {speed:,.0f} tokens/s",
        f"time left  {duration(left / speed) if left and speed else 'none'}",
        f"goodput    {slow.goodput}",
        f"last step  {duration(max(0.0, time.time() - last['time']))} ago",
    ]


def watch(run_dir: RunDir, *, every: float = 2.0) -> None:
    """Describes the run again and again, until it is over. every: seconds; what is slow is asked less often."""
    slow, ask_again = None, 0.0
    while True:
        begun = time.monotonic()
        if slow is None or begun >= ask_again:
            slow = Slow.ask(run_dir)
            ask_again = begun + max(15.0, 20 * (time.monotonic() - begun))
        text = "\n".join(describe_run(run_dir, slow))
        print(f"\033[H\033[J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
        if not slow.runs and slow.in_queue is False:
            return
        time.sleep(every)


def _shares(seconds: dict[str, float]) -> str:
    """Of the wall time up to the last record of the run."""
    from ernie_dist.events.goodput import described, goodput

    rest = ", ".join(f"{part} {share:.1%}" for part, _, share in described(seconds, least=0.01)[1:])
    whole = f"{goodput(seconds):.1%} of {duration(sum(seconds.values()))} in steps that counted"
    return f"{whole}; {rest}" if rest else whole


def _state(run_dir: RunDir, attempt: int, slow: Slow) -> str:
    if slow.runs:
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

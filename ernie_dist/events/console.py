"""What a person watching the run reads: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO

from ernie_dist.events.event import (
    AttemptStarted,
    BatchesSkipped,
    BestCheckpoint,
    CheckpointRefused,
    CheckpointSaved,
    EarlyStopped,
    Evaluated,
    Event,
    Failed,
    Finished,
    Preflight,
    ReferenceAsked,
    Restored,
    StageStarted,
    StepFinished,
    Stopped,
    Straggler,
    TimeSpent,
    UpdateRefused,
)
from ernie_dist.events.goodput import PARTS, described
from ernie_dist.events.wording import (
    cut,
    display_width,
    human_bytes,
    human_count,
    human_seconds,
    names_text,
    network_text,
    perplexity_text,
)

REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 5.0
WINDOW_STEPS = 50


class ConsoleSink:
    """Writes to `stream`: the progress line is redrawn in place on a terminal; elsewhere it comes every few seconds.

    What happened (stages, checkpoints, evaluations ...) stays above it, one line each. `clock` counts seconds.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        plain_seconds: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._every = REDRAW_SECONDS if self._live else plain_seconds
        self._clock = clock
        self._width = width
        self._lock = threading.RLock()
        self._drawn = ""
        self._next_draw = -math.inf
        self._pending: StepFinished | None = None
        self._pace = Pace()
        self._refused_step: int | None = None
        self._total_batches = 0
        self._total_tokens = 0
        self._cells: list[Evaluated] = []
        self._losses: dict[str, float] = {}

    def handle(self, event: Event) -> None:
        with self._lock:
            if self._cells and not (isinstance(event, Evaluated) and event.step == self._cells[0].step):
                self._flush_evaluation()
            if isinstance(event, StepFinished):
                self._step(event)
            elif isinstance(event, Evaluated):
                self._cells.append(event)
            else:
                if isinstance(event, (Stopped, Failed, Finished)):
                    self._draw_pending()
                for text in self._describe(event):
                    self.write_above(text)

    def write_above(self, text: str) -> None:
        """Prints a line that stays, above the progress line. A log handler of the same terminal may call it too."""
        with self._lock:
            if self._drawn:
                self._stream.write("\r\x1b[2K")
            self._stream.write(text + "\n")
            self._stream.write(self._drawn)
            self._stream.flush()

    def close(self) -> None:
        """Leaves the cursor on a line of its own."""
        with self._lock:
            self._flush_evaluation()
            self._draw_pending()
            if self._drawn:
                self._stream.write("\n")
                self._drawn = ""
            self._stream.flush()

    def _step(self, event: StepFinished) -> None:
        self._pace.add(event)
        if not event.applied and event.step != self._refused_step:  # of a refusal the reason was told
            self.write_above(f"step {event.step}: the engine skipped the update (loss {event.loss:.4g})")
        self._pending = event
        if self._clock() >= self._next_draw:
            self._draw_pending()

    def _draw_pending(self) -> None:
        if self._pending is None:
            return
        text = self._progress(self._pending)
        self._pending = None
        self._next_draw = self._clock() + self._every
        if not self._live:
            self._stream.write(text + "\n")
        else:
            # One column stays free: a full last column makes some terminals wrap, and the line would no longer redraw.
            self._drawn = cut(text, self._columns() - 1)
            self._stream.write("\r\x1b[2K" + self._drawn)
        self._stream.flush()

    def _progress(self, event: StepFinished) -> str:
        left = self._pace.seconds_left(self._total_tokens - event.consumed_tokens)
        parts = [
            event.stage,
            f"step {event.step}/{self._total_batches}" if self._total_batches else f"step {event.step}",
            f"loss {event.loss:.4f}",
            f"{human_count(self._pace.tokens_per_second)} tokens/s",
            f"lr {event.learning_rate:.2e}",
        ]
        if event.mfu is not None:
            parts.append(f"mfu {event.mfu:.1%}")
        if self._total_tokens and left is not None:
            parts.append(f"{human_seconds(left)} left")
        return "  ".join(parts)

    def _flush_evaluation(self) -> None:
        """One line while it fits, one line per source where there are many."""
        if not self._cells:
            return
        cells, self._cells = self._cells, []
        first = cells[0]
        head = f"held-out loss at step {first.step}"
        if first.stage != "start":
            head += f", {'after' if first.at_stage_end else 'in'} {first.stage}"
        texts = [self._cell(cell) for cell in cells]
        self._losses.update({cell.source: cell.loss for cell in cells})
        line = f"{head}: " + "; ".join(texts)
        if display_width(line) <= max(self._columns() if self._live else 0, 120):
            self.write_above(line)
            return
        self.write_above(f"{head}:")
        for text in texts:
            self.write_above(f"  {text}")

    def _cell(self, cell: Evaluated) -> str:
        before = self._losses.get(cell.source)
        change = "" if before is None else f", {cell.loss - before:+.4f}"
        unit = "nats a pair" if cell.pairs else f"perplexity {perplexity_text(cell.loss)}"
        return f"{cell.source} {cell.loss:.4f} ({unit}{change})"

    def _describe(self, event: Event) -> list[str]:
        if isinstance(event, AttemptStarted):
            return self._start(event)
        if isinstance(event, Preflight):
            return _nodes(event)
        if isinstance(event, Restored):
            self._pace = Pace()
            lines = [f"goes on from {event.checkpoint}: step {event.step}, read in {event.seconds:.1f} s"]
            if event.lost_steps:
                lost = f"{event.lost_steps} steps, {human_count(event.lost_tokens)} tokens"
                lines.append(f"done again: {lost}, {human_seconds(event.lost_seconds)} of work")
            return [*lines, event.converted] if event.converted else lines
        if isinstance(event, CheckpointRefused):
            return [f"checkpoint {event.checkpoint} is not used: {event.reason}"]
        if isinstance(event, StageStarted):
            return [f"stage {event.stage} ({event.batches} steps), from step {event.step}"]
        if isinstance(event, ReferenceAsked):
            about = f"{event.sequences:,} of {event.of:,} sequences of {event.source}"
            return [f"asking what the model says now of the pairs of {event.stage}: {about}"]
        if isinstance(event, CheckpointSaved):
            size, waited = human_bytes(event.bytes), event.blocked
            return [f"checkpoint {event.checkpoint}: {size} in {event.seconds:.1f} s, {waited:.1f} s of it waited for"]
        if isinstance(event, BestCheckpoint):
            return [f"{event.checkpoint} is the best so far: held-out loss {event.loss:.4f} ({event.source})"]
        if isinstance(event, EarlyStopped):
            best = f"; the best was {event.best_loss:.4f} at step {event.best_step}" if event.best_loss else ""
            return [f"ends early after step {event.step}: {event.reason}{best}"]
        if isinstance(event, UpdateRefused):
            self._refused_step = event.step
            return [f"step {event.step}: the update is refused (batch {event.batch_index}): {event.reason}"]
        if isinstance(event, BatchesSkipped):
            return [f"batches {event.first} to {event.end - 1} are skipped from now on: {event.reason}"]
        if isinstance(event, Stopped):
            if event.repeated_steps:
                return [
                    f"stopped after step {event.step} ({event.reason}) with no time left for a checkpoint; "
                    f"{event.repeated_steps} steps ({event.repeated_tokens:,} tokens) will be done again"
                ]
            return [f"stopped after step {event.step} ({event.reason}); launch again to go on"]
        if isinstance(event, Straggler):
            return [
                f"rank {event.rank} is slow: {event.busy_seconds:.3g} s a step in reading and forward passes, "
                f"{event.imbalance:.1f} times the others' (since about step {event.step})"
            ]
        if isinstance(event, TimeSpent):
            return _time_table(event)
        if isinstance(event, Failed):
            return [f"rank {event.rank} failed after step {event.step}: {event.kind}: {event.message}"]
        if isinstance(event, Finished):
            return [f"finished: {event.step} steps, {event.consumed_tokens:,} tokens; model in {event.export}"]
        return []

    def _start(self, event: AttemptStarted) -> list[str]:
        self._total_batches, self._total_tokens = event.total_batches, event.total_tokens
        self._pace = Pace()
        device = "CPU" if event.device == "cpu" else event.device
        ranks = f"{event.world_size} {device} {'rank' if event.world_size == 1 else 'ranks'}"
        lines = [
            f"attempt {event.attempt} on {ranks}, {event.engine}: {_parameters(event)}, "
            f"{event.total_batches} steps, {event.total_tokens:,} tokens"
        ]
        if event.device == "cpu":
            lines.append(f"no GPU here: the job runs on {ranks}, which is slow and meant for small models")
        return lines

    def _columns(self) -> int:
        if self._width is not None:
            return self._width
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):  # no terminal behind it
            return int(os.environ.get("COLUMNS") or 80)


def _parameters(event: AttemptStarted) -> str:
    text = f"{human_count(event.parameters)} parameters"
    if event.trainable is None:
        return text
    return f"{text}, {human_count(event.trainable)} of them ({event.trainable / event.parameters:.2%}) trained"


def _nodes(event: Preflight) -> list[str]:
    if len(event.nodes) == 1 or event.latency is None or event.bandwidth is None:
        return []
    network = network_text(event.latency, event.bandwidth)
    return [f"{len(event.nodes)} nodes ({names_text(event.nodes)}): {network}"]


def _time_table(event: TimeSpent) -> list[str]:
    rows = described(event.seconds)
    head = f"wall time of all attempts: {human_seconds(sum(event.seconds.values()))}"
    width = max((len(part) for part, _, _ in rows), default=0)
    return [
        head,
        *(f"  {part:<{width}}  {share:>6.1%}  {human_seconds(s):>9}  {PARTS[part]}" for part, s, share in rows),
    ]


class Pace:
    """Speed over the last steps: tokens/s of the steps alone, and of the clock, pauses for evaluation included."""

    def __init__(self) -> None:
        self._steps: deque[StepFinished] = deque(maxlen=WINDOW_STEPS)

    def add(self, event: StepFinished) -> None:
        self._steps.append(event)

    @property
    def tokens_per_second(self) -> float:
        recent = [step.tokens_per_second for step in list(self._steps)[-10:]]
        return sum(recent) / len(recent)

    def seconds_left(self, tokens: int) -> float | None:
        """None until the speed is known."""
        first, last = self._steps[0], self._steps[-1]
        speed = last.tokens_per_second
        if last.time > first.time:
            speed = (last.consumed_tokens - first.consumed_tokens) / (last.time - first.time)
        return tokens / speed if speed > 0 else None

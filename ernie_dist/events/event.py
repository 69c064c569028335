"""The events of a run, and the bus that hands them to sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ernie_dist.spec.errors import RecordNotKept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is seconds since the epoch."""

    time: float = field(default_factory=time.time, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class AttemptStarted(Event):
    """A start of the run: the first one, or one that goes on."""

    attempt: int
    step: int
    total_batches: int
    total_tokens: int
    world_size: int
    device: str
    engine: str
    parameters: int
    versions: dict[str, str]
    trainable: int | None = None
    """of the parameters, with an adapter; None: all"""


@dataclass(frozen=True)
class Preflight(Event):
    """The ranks reach each other, see the same files and run the same versions."""

    attempt: int
    nodes: tuple[str, ...]
    seconds: float
    """it took"""
    latency: float | None = None
    """seconds of an all-reduce of one number; None with one rank"""
    bandwidth: float | None = None
    """of an all-reduce of a large tensor: bus bandwidth as nccl-tests define it, bytes/s"""


@dataclass(frozen=True)
class Restored(Event):
    """The attempt goes on from a checkpoint; what an earlier one did after it is done again."""

    attempt: int
    step: int
    consumed_tokens: int
    checkpoint: str
    seconds: float
    converted: str = ""
    """where ranks or engine differ from those that saved it: both"""
    lost_steps: int = 0
    lost_tokens: int = 0
    lost_seconds: float = 0.0


@dataclass(frozen=True)
class CheckpointRefused(Event):
    """A checkpoint was passed over because it does not verify."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class StageStarted(Event):
    step: int
    stage: str
    number: int
    batches: int
    consumed_tokens: int


@dataclass(frozen=True)
class StepFinished(Event):
    """One line of metrics.jsonl."""

    step: int
    stage: str
    loss: float
    learning_rate: float
    grad_norm: float
    consumed_tokens: int
    loss_tokens: int
    tokens_per_second: float
    mfu: float | None
    """0 to 1 of the device's peak, full-attention convention; None where the peak is not known"""
    attempt: int
    batch_hash: str
    applied: bool
    """False if the update was refused, or skipped by the engine"""
    slowest_rank: int | None = None
    """every 16 steps, where there are several ranks: who was longest busy by itself"""
    rank_imbalance: float | None = None
    """its busy time over the median of the others'"""
    preference_accuracy: float | None = None
    """of a preference stage: share of pairs whose chosen answer has gained on the other since the stage began"""
    preference_margin: float | None = None
    """beta x how much it has gained, mean over pairs, in nats"""


@dataclass(frozen=True)
class UpdateRefused(Event):
    """A step whose numbers cannot be right: the weights are as they were before it."""

    step: int
    batch_index: int
    reason: str
    loss: float
    grad_norm: float
    sequence_ids: list[list[int]]
    """source number (in the stage's mixture, sorted by name) and number in that source, of each sequence"""


@dataclass(frozen=True)
class BatchesSkipped(Event):
    """Batches first, ... end - 1 are never trained on: the next attempt goes back to a checkpoint and on after them."""

    first: int
    end: int
    step: int
    """of the first refused update in them"""
    attempt: int
    reason: str
    sequence_ids: list[list[int]]


@dataclass(frozen=True)
class ReferenceAsked(Event):
    """How far the model is in saying, before a preference stage, what it thinks of the pairs of one source now."""

    stage: str
    source: str
    sequences: int
    of: int


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out loss of one source: a cell of the stage x source matrix."""

    step: int
    stage: str
    """the stage just trained; "start" before the first step"""
    source: str
    loss: float
    """mean over labelled positions, or over pairs of answers, in nats"""
    tokens: int
    """positions or pairs"""
    consumed_tokens: int
    at_stage_end: bool
    pairs: bool = False
    """whether the loss compares answers: it then has no perplexity"""


@dataclass(frozen=True)
class BestCheckpoint(Event):
    """The held-out loss that the job goes by has never been lower: the checkpoint of this step is kept."""

    step: int
    checkpoint: str
    source: str
    """as in evaluate.best"""
    loss: float


@dataclass(frozen=True)
class EarlyStopped(Event):
    """The held-out loss has ceased to fall: the run ends here, and is finished."""

    step: int
    reason: str
    best_step: int | None
    best_loss: float | None


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint that counts: it was written behind the steps, `blocked` of its `seconds` they stood still."""

    step: int
    checkpoint: str
    bytes: int
    seconds: float
    blocked: float


@dataclass(frozen=True)
class PhaseEnded(Event):
    """Rank 0 is through with a start, an evaluation, a save (what of it holds up steps) or the export."""

    attempt: int
    phase: str
    step: int
    seconds: float


@dataclass(frozen=True)
class Straggler(Event):
    """A rank began to be slower than the others."""

    step: int
    rank: int
    imbalance: float
    """its busy time over the median of the others'"""
    busy_seconds: float
    """of a step, reading and forward passes, mean over the last ones"""


@dataclass(frozen=True)
class HangDetected(Event):
    """The watchdog ended the attempt."""

    attempt: int
    step: int
    ranks: tuple[int, ...]
    """to blame"""
    phase: str
    seconds: float
    limit: float
    message: str
    stacks: tuple[str, ...]
    """files, seen from the run directory"""


@dataclass(frozen=True)
class TimeSpent(Event):
    """Where the wall time of all attempts went so far, in seconds; see events/goodput.py for the parts."""

    step: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class MemoryPeaks(Event):
    """What the phases of this attempt took at most so far."""

    step: int
    attempt: int
    peaks: dict[str, tuple[int, int]]
    """start, step/STAGE, evaluate, ... -> bytes on the rank that held most in it, and which; of a GPU what torch handed
    out, of a CPU rank what was resident"""
    device_bytes: int
    """of rank 0's GPU, or of its machine"""


@dataclass(frozen=True)
class Stopped(Event):
    """Stopped on request, resumable."""

    step: int
    reason: str
    repeated_steps: int = 0
    """done again by the next attempt, because there was no time for a checkpoint"""
    repeated_tokens: int = 0


@dataclass(frozen=True)
class Failed(Event):
    step: int
    rank: int
    kind: str
    message: str


@dataclass(frozen=True)
class Finished(Event):
    step: int
    consumed_tokens: int
    export: str


class Sink(Protocol):
    """Receives every event, in order, on rank 0."""

    def handle(self, event: Event) -> None: ...

    def close(self) -> None: ...


class EventBus:
    """Hands events to sinks. A sink that fails is reported once and left out: it never stops training.

    Except for RecordNotKept: without its own record a run does not go on.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def emit(self, event: Event) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, sink.handle, event)

    def close(self) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)

    def _guarded(self, sink: Sink, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except RecordNotKept:
            raise
        except Exception:
            log.exception("%s failed and is left out from now on", type(sink).__name__)
            self._sinks.remove(sink)

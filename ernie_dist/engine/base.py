"""What the training loop knows of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ernie_dist.batch import Batch, MicroBatch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, seen from the whole world."""

    loss: float
    """mean over the labelled positions of the whole batch, or over its pairs of answers, in nats"""
    grad_norm: float
    """2-norm before clipping"""
    loss_tokens: int
    """labelled positions of the whole batch, or pairs of answers: what the loss is a mean over"""
    applied: bool
    """False where the update was left out: refused, or skipped by the engine (fp16 overflow)"""
    flagged: bool
    """whether any rank raised its flag"""
    figures: tuple[float, ...]
    """means of what the loss function gave besides the loss"""
    busy_seconds: float = field(compare=False)
    """this rank's forward passes, which wait for no other rank; under ZeRO-3 they do, and all ranks look alike"""


Measure = Callable[[nn.Module, MicroBatch], torch.Tensor]
Measured = tuple[MicroBatch, torch.Tensor]


class ForwardClock:
    """Seconds of a step's forward passes: `with clock:` around each. On a GPU ask once the loss has been read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._begun = self._mark()

    def __exit__(self, *_: object) -> None:
        ended = self._mark()
        if self._on_gpu:
            self._events.append((self._begun, ended))
        else:
            self._seconds += ended - self._begun

    def seconds(self) -> float:
        return self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def always(loss: float, grad_norm: float) -> bool:
    return True


def never() -> bool:
    return False


class Engine(Protocol):
    """Owns micro-batching, normalisation per loss token over the whole world, clipping and the update."""

    @property
    def parameters(self) -> int:
        """Weights of the whole model, wherever they lie."""
        ...

    @property
    def trainable(self) -> int:
        """Those of them that are trained in some stage: all, or an adapter's."""
        ...

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32: what "auto" came to on this device."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The transformers config values of the model."""
        ...

    def step(
        self,
        batch: Batch,
        learning_rate: float,
        *,
        accepts: Callable[[float, float], bool] = always,
        flag: Callable[[], bool] = never,
    ) -> StepResult:
        """Trains on one batch. Collective: every rank calls it with its part of the same global batch.

        `accepts` is given the loss and the gradient norm before the weights change, and leaves them as they are with
        False; it must say the same on all ranks. `flag` is a yes or no of this rank, carried along with the loss, so
        that what all ranks have to agree on costs no message of its own.
        """
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Loss summed over labelled positions, and their number, over all ranks' equally many micro-batches."""
        ...

    def measure(self, function: Measure, batches: Iterable[MicroBatch]) -> Iterator[Measured]:
        """Each micro-batch, and what `function` makes of the model and it, without gradients, in evaluation mode.

        Collective: equally many micro-batches on all ranks.
        """
        ...

    def freeze(self, patterns: Sequence[str]) -> None:
        """Parameters whose names match are not updated from now on; all others are."""
        ...

    def replicated_digest(self) -> str | None:
        """A hash of all parameters, where every data-parallel rank holds all of them; None where they are partitioned.

        Ranks that differ in one bit differ in it.
        """
        ...

    def snapshot(self) -> dict[str, Any]:
        """All that `load` needs, by file name, as torch.save takes it: a copy in host memory. Collective.

        With an adapter the weights under it are not in it: `load` finds them where the model was built from.
        Training may go on while it is written; the next snapshot uses the same memory again.
        """
        ...

    def load(self, folder: Path) -> None:
        """Goes on exactly where the snapshot in `folder` was taken. Collective. Raises CheckpointError."""
        ...

    def load_converted(self, folder: Path) -> None:
        """Goes on from a converted snapshot, taken with other ranks or another ZeRO stage. Collective."""
        ...

    def close(self) -> None:
        """Lets go of processes, groups and memory."""
        ...

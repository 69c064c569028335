"""Single-device torch: for laptops and tests, and the numeric reference of every other engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ernie_dist.batch import Batch, MicroBatch
from ernie_dist.engine.base import ForwardClock, Measure, Measured, StepResult, always, never
from ernie_dist.engine.optimizer import ParameterGroups, adamw
from ernie_dist.engine.replicas import digest
from ernie_dist.engine.snapshot import HostCopy, without_frozen
from ernie_dist.spec.errors import CheckpointError, SpecError
from ernie_dist.spec.training import EngineSpec, OptimizerSpec
from ernie_dist.trusted_files import read_state
from ernie_dist.world import World

Loss = Callable[[nn.Module, MicroBatch], torch.Tensor]
_STATE = "state.pt"


class PlainEngine:
    """Master weights in fp32; bf16 by autocast."""

    def __init__(
        self,
        spec: EngineSpec,
        optimizer: OptimizerSpec,
        freezes: Sequence[Sequence[str]],
        build: Callable[[], PreTrainedModel],
        loss: Loss,
        world: World,
        *,
        precision: str,
        pretrained: bool,
        adapter: bool,
    ) -> None:
        if precision == "fp16":
            raise SpecError(
                'engine.precision = "fp16": the plain engine has no loss scaling; use bf16, fp32 or deepspeed'
            )
        self._device, self.precision, self._loss = world.device, precision, loss
        self._max_grad_norm, self._adapter = spec.max_grad_norm, adapter
        self.model = build().to(self._device)
        self.config = self.model.config.to_dict()
        self.parameters, self.trainable = self.model.num_parameters(), self.model.num_parameters(only_trainable=True)
        self._groups = ParameterGroups(self.model, freezes)
        self._optimizer = adamw(self._groups(optimizer), optimizer)
        self._copy = HostCopy()

    def step(
        self,
        batch: Batch,
        learning_rate: float,
        *,
        accepts: Callable[[float, float], bool] = always,
        flag: Callable[[], bool] = never,
    ) -> StepResult:
        self.model.train()
        weight = sum(micro.weight for micro in batch.micro_batches)
        sums: list[torch.Tensor] = []
        clock = ForwardClock(self._device)
        for micro in batch.micro_batches:
            with clock, self._autocast():
                summed = self._loss(self.model, micro.to(self._device)).reshape(-1)
            (summed[0] / max(1, weight)).backward()
            sums.append(summed.detach())
        loss, *figures = (total / max(1, weight) for total in torch.stack(sums).sum(dim=0).tolist())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm).item()
        applied = accepts(loss, norm)
        if applied:
            self._groups.set_learning_rate(self._optimizer.param_groups, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, weight, applied, flag(), tuple(figures), clock.seconds())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        self.model.eval()
        loss, tokens = 0.0, 0
        for micro in batches:
            with self._autocast():
                loss += self._loss(self.model, micro.to(self._device)).reshape(-1)[0].item()
            tokens += micro.weight
        return loss, tokens

    def measure(self, function: Measure, batches: Iterable[MicroBatch]) -> Iterator[Measured]:
        self.model.eval()
        for micro in batches:
            with self._autocast(), torch.no_grad():
                found = function(self.model, micro.to(self._device))
            yield micro, found

    def freeze(self, patterns: Sequence[str]) -> None:
        self._groups.freeze(patterns)

    def replicated_digest(self) -> str | None:
        return digest(self.model.parameters())

    def snapshot(self) -> dict[str, Any]:
        return self._copy({_STATE: {"model": self._weights(), "optimizer": self._optimizer.state_dict()}})

    def load(self, folder: Path) -> None:
        state = read_state(folder / _STATE, self._device)
        if state["model"].keys() != self._weights().keys():
            raise CheckpointError(f"{folder}: holds the weights of another model")
        self.model.load_state_dict(state["model"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])

    def load_converted(self, folder: Path) -> None:
        raise CheckpointError(f"{folder}: the plain engine takes only what it saved itself")

    def close(self) -> None:
        del self.model, self._optimizer

    def _weights(self) -> dict[str, torch.Tensor]:
        weights = self.model.state_dict()
        return without_frozen(weights, self.model) if self._adapter else weights

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return nullcontext()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a folder that holds a snapshot's files, in fp32."""
    return read_state(folder / _STATE, "cpu")["model"]

"""DeepSpeed ZeRO 0 to 3 behind the Engine protocol. The only importer of deepspeed.

The token-exact loss: every micro-batch is backpropagated as summed_loss x ranks / labelled positions of the whole
batch; ZeRO's mean over ranks then leaves the mean per labelled position, however unevenly those are spread.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from ernie_dist.batch import Batch, MicroBatch
from ernie_dist.engine.base import ForwardClock, Measure, Measured, StepResult, always, never
from ernie_dist.engine.optimizer import ParameterGroups, adamw
from ernie_dist.engine.replicas import digest
from ernie_dist.engine.snapshot import HostCopy, without_frozen
from ernie_dist.engine.universal import convert_files, read_step
from ernie_dist.spec.ds_config import offloads, read_ds_config, zero_stage
from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.training import EngineSpec, OptimizerSpec
from ernie_dist.trusted_files import read_state
from ernie_dist.world import World

Loss = Callable[[nn.Module, MicroBatch], torch.Tensor]
_TAG = "state"
_CLASSES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
"""all that DeepSpeed's files hold besides tensors and plain values"""


class _WithLoss(nn.Module):
    """DeepSpeed hooks the forward of the module it is given: the loss has to be computed inside it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: MicroBatch, function: Measure | None = None) -> torch.Tensor:
        return (function or self._loss)(self.model, batch)


class _Files(CheckpointEngine):
    """What DeepSpeed would write is kept as a copy in host memory; what it reads may hold data, and no code."""

    def __init__(self, adapted: nn.Module | None) -> None:
        """`adapted`: the module, if its frozen weights are not kept."""
        super().__init__()
        self.kept: dict[str, Any] = {}
        self._adapted = adapted
        self._copies: dict[str, HostCopy] = {}

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        name = PurePath(path).as_posix()
        if self._adapted and "module" in state_dict:  # DeepSpeed leaves frozen ones out too, but of tied ones one name
            state_dict = {**state_dict, "module": without_frozen(state_dict["module"], self._adapted)}
        self.kept[name] = self._copies.setdefault(name, HostCopy())(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        state = read_state(Path(path), map_location, _CLASSES)
        if self._adapted and state.get("module"):  # of a converted checkpoint it is empty: weights lie beside it
            wanted = without_frozen(self._adapted.state_dict(), self._adapted).keys()
            if wrong := sorted(wanted ^ state["module"].keys()):  # DeepSpeed itself compares no names here
                raise CheckpointError(f"{path}: its weights do not fit the adapter: {wrong[:3]}; was peft updated?")
        return state

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


class DeepSpeedEngine:
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
        self._world, self._device, self.precision = world, world.device, precision
        self._adapter = adapter
        self._training = False  # pretrained weights come in evaluation mode
        policy = read_ds_config(spec.ds_config)
        self._zero_stage, self._fp32 = zero_stage(policy), precision == "fp32"
        config = _complete(policy, spec, precision, world.size)
        _connect(world)
        # While this object lives, transformers reads files straight into ZeRO-3's partitions. Random weights are not
        # drawn that way: they would differ from every other stage's.
        partitioning = HfDeepSpeedConfig(config) if self._zero_stage == 3 and pretrained else None
        model = build()
        del partitioning
        self.parameters = sum(map(_size, model.parameters()))
        self.trainable = sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
        self.config = model.config.to_dict()
        self._groups = ParameterGroups(model, freezes)
        groups = self._groups(optimizer)
        self._weight_decays = [group["weight_decay"] for group in groups]
        own = {"model_parameters": groups} if _cpu_adam(policy) else {"optimizer": adamw(groups, optimizer)}
        if _cpu_adam(policy):
            config["optimizer"] = _adam_config(optimizer)
        with _compiling_nothing():
            found = deepspeed.initialize(model=_WithLoss(model, loss), config=config, **own)
        self._engine, self._optimizer, _, _ = found
        self._accepted: Callable[[], bool] = lambda: True
        self._guard_updates()
        self._files = self._engine.checkpoint_engine = _Files(self._engine.module if adapter else None)
        self._engine._copy_recovery_script = lambda folder: None  # `ernie export` reads our checkpoints

    def step(
        self,
        batch: Batch,
        learning_rate: float,
        *,
        accepts: Callable[[float, float], bool] = always,
        flag: Callable[[], bool] = never,
    ) -> StepResult:
        engine, world = self._engine, self._world
        if not self._training:  # walks every module; DeepSpeed's own `training` never changes
            engine.train()
            self._training = True
        mine = sum(micro.weight for micro in batch.micro_batches)
        begun = world.begin_sum(torch.tensor(mine))
        weight = cache(lambda: int(begun()))  # wanted by the first backward, not before
        self._groups.set_learning_rate(self._optimizer.param_groups, learning_rate)
        totals: list[torch.Tensor] = []
        clock = ForwardClock(self._device)
        for number, micro in enumerate(batch.micro_batches, start=1):
            engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
            with clock:
                summed = engine(micro.to(self._device)).reshape(-1)
            totals.append(summed.detach())
            engine.backward(summed[0] * (world.size / max(1, weight())), scale_wrt_gas=False)
        flags = torch.full((1,), float(flag()), device=self._device)
        summed_up = world.begin_sum(torch.cat([torch.stack(totals).sum(dim=0), flags]))
        before_clipping = self._grad_norm_before_step()

        @cache
        def accepted() -> bool:  # asked for every parameter group
            return accepts(summed_up()[0].item() / max(1, weight()), self._grad_norm(before_clipping))

        self._accepted = accepted
        engine.step()
        *sums, flagged = summed_up().tolist()
        loss, *figures = (total / max(1, weight()) for total in sums)
        norm = self._grad_norm(before_clipping)
        applied = engine.was_step_applied() and accepted()
        return StepResult(loss, norm, weight(), applied, flagged > 0, tuple(figures), clock.seconds())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        self._engine.eval()
        self._training = False
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for micro in batches:
            sums[0] += self._engine(micro.to(self._device)).reshape(-1)[0]
            sums[1] += micro.weight
        self._world.sum(sums)
        return sums[0].item(), int(sums[1].item())

    def measure(self, function: Measure, batches: Iterable[MicroBatch]) -> Iterator[Measured]:
        self._engine.eval()
        self._training = False
        for micro in batches:
            with torch.no_grad():
                found = self._engine(micro.to(self._device), function)
            yield micro, found

    def freeze(self, patterns: Sequence[str]) -> None:
        self._groups.freeze(patterns)

    def replicated_digest(self) -> str | None:
        # ZeRO-3 keeps small parameters whole between steps, but which ones and when is DeepSpeed's affair.
        return None if self._zero_stage == 3 else digest(self._engine.module.parameters())

    def snapshot(self) -> dict[str, Any]:
        self._files.kept.clear()
        self._engine.save_checkpoint(".", tag=_TAG, save_latest=False, exclude_frozen_parameters=self._adapter)
        return dict(self._files.kept)

    def load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not self._adapter)
        if loaded is None:  # only a warning to DeepSpeed, which would go on from random weights
            raise CheckpointError(f"{folder}: DeepSpeed could not read this checkpoint; see the rank logs")

    def load_converted(self, folder: Path) -> None:
        config = self._engine._config
        config.load_universal_checkpoint = True
        try:
            self.load(folder)
        finally:
            config.load_universal_checkpoint = False
        # Under ZeRO-3 DeepSpeed gives every group the settings of the first, and all states one and the same step
        # counter, which then counts once for each of them; coming from there, ZeRO 1 and 2 get no counter at all.
        optimizer, step = _innermost(self._optimizer), read_step(folder / _TAG)
        for group, decay in zip(optimizer.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = decay
        fused = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's own Adam counts in plain integers
        for parameter, state in optimizer.state.items():
            state["step"] = torch.tensor(float(step), device=parameter.device) if fused else step

    def close(self) -> None:
        self._engine.destroy()

    def _guard_updates(self) -> None:
        """The weights change only when torch's optimizer steps; ZeRO knows the norm by then, and calls it last."""
        optimizer = _innermost(self._optimizer)
        update = optimizer.step
        optimizer.step = lambda *given, **named: update(*given, **named) if self._accepted() else None

    def _grad_norm_before_step(self) -> float | None:
        """ZeRO 0 in fp32 reports no norm: there the reduced gradients are whole on every rank, until the step."""
        if self._zero_stage > 0 or not self._fp32:
            return None
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item()

    def _grad_norm(self, before_step: float | None) -> float:
        if before_step is not None:
            return before_step
        norm = self._optimizer._global_grad_norm  # the engine's own copy is taken after the step
        return math.nan if norm is None else float(norm)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights out of a folder that holds a snapshot's files, whole and read by one process.

    In the precision the engine computes in; of ZeRO-3 the fp32 masters.
    """
    whole = folder / _TAG / "mp_rank_00_model_states.pt"
    if whole.is_file():
        weights = read_state(whole, "cpu", _CLASSES)["module"]
    else:  # ZeRO-3: every rank holds a part, kept in fp32
        refuse_code(folder)
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def convert(folder: Path, to: Path) -> None:
    """Writes what `load_converted` takes, on one process. Raises CheckpointError."""
    refuse_code(folder)
    convert_files(folder / _TAG, to / _TAG, read=lambda path: read_state(path, "cpu", _CLASSES))


def refuse_code(folder: Path) -> None:
    """DeepSpeed's own readers run whatever a file tells them to: none of them gets one with more than data in it."""
    known = {f"{one.__module__}.{one.__qualname__}" for one in _CLASSES}
    for path in sorted(folder.rglob("*.pt")):
        if strangers := set(get_unsafe_globals_in_checkpoint(path)) - known:
            raise CheckpointError(f"{path}: holds code ({', '.join(sorted(strangers))}) and is not read; delete it")


def _innermost(optimizer: Any) -> Any:
    """torch's optimizer, which ZeRO wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _size(parameter: nn.Parameter) -> int:
    if parameter.dtype == torch.uint8:  # of 4-bit weights two lie in a byte
        return 2 * parameter.numel()
    # Under ZeRO-3 a partitioned parameter has no elements of its own; ds_numel remembers them.
    return getattr(parameter, "ds_numel", parameter.numel())


def _connect(world: World) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # With no op known to be compatible, none is probed, which runs compilers, and the shared-memory reduction is not
    # built, which all ranks would race for at first use: gloo's own stays.
    deepspeed.ops.__compatible_ops__ = {}
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """torch.compile gives back what it is given: ZeRO imports Muon, used or not, whose functions are compiled by
    decorators, and only for that torch would load its compiler, a second of work. `engine.compile` came before."""
    name, before = "TORCHDYNAMO_DISABLE", os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _complete(policy: dict[str, Any], spec: EngineSpec, precision: str, ranks: int) -> dict[str, Any]:
    """The policy file and what the job says. Accumulation is ours: the boundary is set at every micro-batch."""
    config = {
        **policy,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "gradient_clipping": spec.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "disable_python_gc": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        if zero_stage(policy) > 0:  # without ZeRO DeepSpeed can only accumulate in bf16
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return config


def _cpu_adam(policy: dict[str, Any]) -> bool:
    """Offloaded states want DeepSpeed's vectorised Adam, where it can be compiled against CUDA."""
    return offloads(policy) and torch.cuda.is_available()


def _adam_config(spec: OptimizerSpec) -> dict[str, Any]:
    values = {"lr": 0.0, "betas": list(spec.betas), "eps": spec.eps, "weight_decay": spec.weight_decay}
    return {"type": "AdamW", "params": {**values, "adam_w_mode": True}}

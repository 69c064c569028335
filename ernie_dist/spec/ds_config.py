"""DeepSpeed files: memory and communication policy only. What the job decides is refused in them."""

from __future__ import annotations

import json
from typing import Any

from ernie_dist.spec.assets import find_asset
from ernie_dist.spec.errors import SpecError

_FROM_THE_JOB = {
    "train_batch_size": "tokens_per_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "tokens_per_batch and engine.micro_batch_size",
    "gradient_clipping": "engine.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "wandb": "track.wandb",
    "tensorboard": "track.tensorboard",
}
_REMOVED = {
    "elasticity", "curriculum_learning", "amp", "nebula", "compression_training", "quantize_training",
    "sparse_gradients", "zeropp_loco_param",
}  # fmt: skip


def read_ds_config(name: str) -> dict[str, Any]:
    """The policy of a packaged config ("zero2") or of a JSON file. Raises SpecError."""
    path = find_asset("ds_configs", name, ".json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{path}: not valid JSON ({error})") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise SpecError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3")
    for key in [*config, *zero]:
        if key in _FROM_THE_JOB:
            raise SpecError(f'{path}: remove "{key}"; the job sets it with {_FROM_THE_JOB[key]}')
        if key in _REMOVED or key.startswith("mics_"):
            raise SpecError(f'{path}: remove "{key}"; DeepSpeed no longer has it')
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def partitioning(config: dict[str, Any]) -> str:
    """What decides how optimizer states are cut up and where they lie, besides the ZeRO stage: JSON of those keys."""
    kept = ("offload_optimizer", "offload_param", "sub_group_size", "round_robin_gradients")
    zero = config["zero_optimization"]
    return json.dumps({key: zero[key] for key in kept if key in zero}, sort_keys=True)


def offloads(config: dict[str, Any]) -> bool:
    """Whether optimizer states live in host memory."""
    return "offload_optimizer" in config["zero_optimization"]

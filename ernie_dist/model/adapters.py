"""LoRA through peft: thin matrices beside frozen ones. With `loading`, the only importer of peft.

model.layers.0.self_attn.q_proj.weight -> ...q_proj.base_layer.weight  frozen
                                          ...q_proj.lora_A.default.weight, lora_B: trained
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import PreTrainedModel

from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.training import AdapterSpec

_WRAPPED = "base_model.model."
"""what peft's own model puts before every name"""


def add_adapter(model: PreTrainedModel, spec: AdapterSpec, seed: int) -> None:
    """Adds an adapter that changes nothing yet, and freezes all else. In place: modules keep their names.

    The adapter's weights depend on `seed` alone, not on how the model was read or is partitioned.
    """
    torch.manual_seed(seed + 1)  # `seed` itself drew the random weights of a model from scratch
    inject_adapter_in_model(_config(spec, model), model)


def adapted(base: PreTrainedModel, spec: AdapterSpec, weights: Mapping[str, torch.Tensor]) -> PeftModel:
    """peft's own model of a base and the trained weights of an adapter, named as `add_adapter` does; {}: untrained.

    Raises CheckpointError if they do not belong together.
    """
    model = get_peft_model(base, _config(spec, base))
    wanted = {name.removeprefix(_WRAPPED) for name, tensor in model.named_parameters() if tensor.requires_grad}
    if weights and (wrong := sorted(wanted ^ set(weights))):
        raise CheckpointError(f"the weights of the checkpoint do not fit the adapter: {wrong[:3]}")
    model.load_state_dict({_WRAPPED + name: tensor for name, tensor in weights.items()}, strict=False)
    if Path(base.name_or_path).is_dir():  # where an adapter lies in a folder, its base is found from anywhere
        model.active_peft_config.base_model_name_or_path = str(Path(base.name_or_path).resolve())
    return model


def merged(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter added to its weights."""
    return model.merge_and_unload(safe_merge=True)


def _config(spec: AdapterSpec, model: PreTrainedModel) -> LoraConfig:
    # Of names in the experts peft would make adapters of another kind, on fused tensors: there are none among these.
    experts = bool(getattr(model.config, "moe_num_experts", 0))
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scale,
        lora_dropout=spec.dropout,
        target_modules=list(spec.modules(experts=experts)),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        task_type="CAUSAL_LM",
    )

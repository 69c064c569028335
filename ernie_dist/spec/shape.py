"""Shapes of models: named presets, parameter counts and FLOPs, computed without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.problems import suggest
from ernie_dist.spec.training import AdapterSpec, ModelSpec

PRESETS: dict[str, dict[str, Any]] = {
    "ernie-4.5-tiny": {
        "model_type": "ernie4_5",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,  # about hidden_size ** -0.5: at the usual 0.02 so narrow a model hardly learns
    },
    "ernie-4.5-0.3b": {
        "model_type": "ernie4_5",
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "ernie-4.5-21b-a3b": {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
    },
    "ernie-4.5-300b-a47b": {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_num_shared_experts": 0,
        "moe_intermediate_size": 3584,
        "moe_layer_start_index": 3,
        "moe_layer_end_index": 53,
    },
}
"""transformers config values. Sizes as published with the ERNIE 4.5 models; `tiny` is ours, for tests."""

_PUBLISHED = {"0.3B": "ernie-4.5-0.3b", "21B-A3B": "ernie-4.5-21b-a3b", "300B-A47B": "ernie-4.5-300b-a47b"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide parameters, FLOPs and memory."""

    vocab_size: int
    hidden_size: int
    layers: int
    attention_width: int
    """heads x head_dim"""
    key_value_width: int
    mlp_width: int
    tied: bool
    heads: int
    experts: int = 0
    active_experts: int = 0
    expert_width: int = 0
    shared_experts: int = 0
    moe_layers: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vocab_size: int | None = None) -> ModelShape:
        """From transformers config values; `vocab_size` where the config leaves it to the tokenizer."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        experts = config.get("moe_num_experts") or 0
        layers = config["num_hidden_layers"]
        first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
        return cls(
            vocab_size=config.get("vocab_size") or vocab_size or 0,
            hidden_size=config["hidden_size"],
            layers=layers,
            attention_width=heads * head_dim,
            key_value_width=(config.get("num_key_value_heads") or heads) * head_dim,
            mlp_width=config["intermediate_size"],
            tied=config.get("tie_word_embeddings", True),
            heads=heads,
            experts=experts,
            active_experts=config.get("moe_k", 0) if experts else 0,
            expert_width=config.get("moe_intermediate_size", 0) if experts else 0,
            shared_experts=config.get("moe_num_shared_experts", 0) if experts else 0,
            moe_layers=((layers - 1 if last == -1 else last) - first + 1) if experts else 0,
        )

    @property
    def parameters(self) -> int:
        """All weights; tied embeddings count once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        norms = (2 * self.layers + 1) * self.hidden_size
        router = self.moe_layers * self.experts * (self.hidden_size + 1)
        return embeddings + norms + router + self._matrices(self.experts)

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with, the head among them, the embedding lookup not."""
        router = self.moe_layers * self.experts * self.hidden_size
        return self.vocab_size * self.hidden_size + router + self._matrices(self.active_experts)

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers, every expert's among them."""
        return self._matrices(self.experts)

    def adapter_parameters(self, adapter: AdapterSpec) -> int:
        """Weights of a LoRA adapter on every layer: rank x (inputs + outputs) per target, and DoRA's magnitudes."""
        hidden, attention, key_value, mlp = self.hidden_size, self.attention_width, self.key_value_width, self.mlp_width
        sizes: dict[str, tuple[int, int]] = {
            **{"q_proj": (hidden, attention), "k_proj": (hidden, key_value), "v_proj": (hidden, key_value)},
            **{"o_proj": (attention, hidden), "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp)},
            "down_proj": (mlp, hidden),
        }
        targets = [sizes[name] for name in adapter.modules(experts=self.experts > 0)]
        thin = sum(adapter.rank * (inputs + outputs) for inputs, outputs in targets)
        return self.layers * (thin + (sum(outputs for _, outputs in targets) if adapter.dora else 0))

    def flops_per_token(
        self, sequence_length: int, *, causal: bool = False, adapter: AdapterSpec | None = None
    ) -> float:
        """FLOPs of forward and backward for one token: 6 per active weight, and attention; 4 per frozen weight.

        Full-attention convention: 12 L d_attn T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); causal counts
        half of it.
        """
        attention = 12 * self.layers * self.attention_width * sequence_length
        weights = 6.0 * self.active_parameters
        if adapter:
            weights = 4.0 * self.active_parameters + 6.0 * self.adapter_parameters(adapter)
        return weights + attention * (0.5 if causal else 1.0)

    def _matrices(self, experts: int) -> int:
        attention = self.hidden_size * (2 * self.attention_width + 2 * self.key_value_width)
        dense = (self.layers - self.moe_layers) * 3 * self.hidden_size * self.mlp_width
        sparse = self.moe_layers * (experts + self.shared_experts) * 3 * self.hidden_size * self.expert_width
        return self.layers * attention + dense + sparse


def config_values(spec: ModelSpec, vocab_size: int | None = None) -> dict[str, Any] | None:
    """Config of a model, as far as it is known without a network. None for pretrained weights not seen before.

    A config without a vocab_size takes the tokenizer's, rounded up to a multiple of 64 for the matrix units.
    Raises SpecError for an unknown preset, an unreadable file, or more tokens than the model has rows.
    """
    if spec.from_pretrained:
        local = Path(spec.from_pretrained) / "config.json"
        if local.is_file():
            _refuse_pickles(local.parent)
            return _read_config(local)
        known = [PRESETS[preset] for mark, preset in _PUBLISHED.items() if f"ERNIE-4.5-{mark}" in spec.from_pretrained]
        return known[0] if known else None
    if spec.config:
        values = _read_config(Path(spec.config))
    elif spec.preset in PRESETS:
        values = PRESETS[spec.preset]
    else:
        raise SpecError(f'model.preset = "{spec.preset}": unknown preset; {suggest(str(spec.preset), PRESETS)}')
    values = {**values, **spec.override}
    if vocab_size is not None:
        values.setdefault("vocab_size", -(-vocab_size // 64) * 64)
        if values["vocab_size"] < vocab_size:
            raise SpecError(
                f"model has vocab_size {values['vocab_size']:,}, the tokenizer {vocab_size:,} tokens; "
                f"set model.override.vocab_size to at least {vocab_size}"
            )
    return values


def _refuse_pickles(folder: Path) -> None:
    """Weights from elsewhere are data, not programs. Raises SpecError if there are none of that kind."""
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if others:
        raise SpecError(
            f"model.from_pretrained = {folder}: holds weights only as {others[0]}, which can run any code when it is "
            "read; give model.safetensors: where you trust the file, load it with transformers and call "
            "save_pretrained, on a machine that holds nothing of value, or take a revision that has safetensors"
        )
    raise SpecError(f"model.from_pretrained = {folder}: holds no weights; a model.safetensors has to be there")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not a readable transformers config ({error})") from None
    missing = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "model_type"} - set(
        values
    )
    if missing:
        raise SpecError(f"{path}: lacks {', '.join(sorted(missing))}; give a causal language model's config.json")
    return values

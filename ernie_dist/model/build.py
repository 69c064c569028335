"""ModelSpec -> a transformers causal language model that attends within packed documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ernie_dist.model import attention
from ernie_dist.model.head import SAME_SUMS, with_loss_head
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.shape import config_values
from ernie_dist.spec.training import EngineSpec, ModelSpec


def build_model(
    spec: ModelSpec,
    vocab_size: int,
    seed: int,
    checkpointing: str | int = "none",
    compiled: bool = False,
    mlp_tiles: int = 1,
    attn_implementation: str = attention.NAME,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model, the same weights on every rank. `checkpointing`: none, full, or n for every n-th layer;
    `compiled`: layers go through torch.compile at their first use; `mlp_tiles`: parts in which a sequence goes through
    each MLP.

    With an adapter only that one requires gradients. In a `dtype` other than fp32 it is what transformers makes of the
    same weights in a folder: some, e.g. of a router, stay in fp32.
    Raises SpecError where the weights cannot be found or the config does not fit transformers.
    """
    if torch.cuda.is_available() and attn_implementation == attention.NAME:
        attention.activate_newest_flash(torch.cuda.get_device_capability())
    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": dtype}
    options["trust_remote_code"] = False  # not given, transformers asks at the terminal whether to run what it found
    if spec.adapter and spec.adapter.quantize != "none":
        options |= _in_four_bits()
    try:
        if spec.from_pretrained:
            model = AutoModelForCausalLM.from_pretrained(
                spec.from_pretrained, revision=spec.revision, use_safetensors=True, **options
            )
        else:
            values = config_values(spec, vocab_size)
            assert values is not None
            model = _drawn(values, options)
    except (OSError, ValueError, TypeError) as error:
        origin = spec.from_pretrained or spec.config or spec.preset
        hint = "; weights are read from safetensors only" if spec.from_pretrained else ""
        raise SpecError(f"model {origin}: cannot be built: {str(error).strip().splitlines()[0]}{hint}") from error
    rows = model.get_input_embeddings().num_embeddings
    if rows < vocab_size:
        raise SpecError(
            f"model has {rows:,} embedding rows, the tokenizer {vocab_size:,} tokens; they do not belong together"
        )
    with_loss_head(model)
    if spec.adapter is not None:
        from ernie_dist.model.adapters import add_adapter  # peft takes seconds to import

        add_adapter(model, spec.adapter, seed)
    if mlp_tiles > 1:
        _tile_mlps(model, mlp_tiles)
    _checkpoint_layers(model, checkpointing)
    if compiled:
        _compile_layers(model)
    return model


def _drawn(values: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    """Random weights, drawn in fp32 whatever they are kept in."""
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, **{**options, "dtype": torch.float32})
    if options["dtype"] == torch.float32:
        return model
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **options)


def layer_options(engine: EngineSpec) -> dict[str, Any]:
    """What build_model takes of a job's engine."""
    return {
        "checkpointing": engine.gradient_checkpointing,
        "compiled": engine.compile,
        "mlp_tiles": engine.mlp_tiles,
    }


def _in_four_bits() -> dict[str, Any]:
    """Reads linear layers as 4-bit floats onto this rank's GPU (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""
    where = 'model.adapter.quantize = "nf4"'
    if not torch.cuda.is_available():
        raise SpecError(f"{where}: needs a GPU, and there is none here; leave it out")
    if find_spec("bitsandbytes") is None:
        raise SpecError(f"{where}: needs bitsandbytes, which is not installed; pip install bitsandbytes")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantized, "device_map": {"": torch.cuda.current_device()}}


def _checkpoint_layers(model: PreTrainedModel, every: str | int) -> None:
    if every == "none":
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = 1 if every == "full" else int(every)
    for number, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = number % step == 0


def _tile_mlps(model: PreTrainedModel, tiles: int) -> None:
    """A sequence goes through an MLP part by part, each computed once more in the backward pass: of its activations,
    the widest of a layer, only one part's are ever there (TiledMLP of ALST, Bekman et al. 2025, arXiv:2506.13996)."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            raise SpecError("engine.mlp_tiles: experts choose their own parts of a sequence; leave it out")
        layer.mlp.forward = partial(_in_tiles, layer.mlp.forward, tiles)


def _in_tiles(forward: Callable[[torch.Tensor], torch.Tensor], tiles: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
    parts = hidden_BTD.chunk(tiles, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


def _compile_layers(model: PreTrainedModel) -> None:
    """Norms, rotary embedding and activation of a layer become one kernel each, and so does the loss on the logits. A
    layer is compiled as a whole or not at all, and anew only for another batch shape: which kernel adds up is not to
    depend on what came before."""
    if getattr(model.config, "moe_num_experts", 0):
        raise SpecError("engine.compile: layers with experts cannot be compiled as a whole; leave it out")
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, options=SAME_SUMS)
    model.get_output_embeddings().compile_loss()

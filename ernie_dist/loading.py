"""A folder or a hub id -> a model that answers.

model folder | adapter on its base | run directory: its export --> weights, adapter, tokenizer --> ChatModel
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ernie_dist.data.tokenizer import give_template
from ernie_dist.inference import ChatModel
from ernie_dist.model.base_weights import weights_fingerprint
from ernie_dist.spec.errors import EnvironmentProblem, ErnieError, SpecError
from ernie_dist.spec.run_files import EXPORTED
from ernie_dist.spec.training import ModelSpec

_OTHER_BASE = "put it on the base it was trained for"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    model: str | Path, *, adapter: str | Path | None = None, device: str | None = None, dtype: str | None = None
) -> ChatModel:
    """A model folder, the folder of a LoRA adapter, a run directory (its export) or a hub id, ready to answer.

    `adapter` is put on top of `model`. `device` (cpu, cuda, cuda:1) and `dtype` (fp32, bf16, fp16) default to a GPU and
    bf16 where there is one, else CPU and fp32. Raises SpecError with what is missing.
    """
    name, adapter = parts(model, adapter)
    known = _exported_base(Path(adapter)) if adapter is not None else {}
    revision = known.get("revision") if name == known.get("model") else None
    device, wanted = placed(device, dtype)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, TypeError) as error:
        raise SpecError(f"{name}: cannot be loaded: {_first_line(error)}; give a transformers folder") from error
    if adapter is not None:
        _refuse_other_base(Path(adapter), known, name, revision)
        loaded = _with_adapter(loaded, Path(adapter), name)
    tokenizer = _tokenizer(Path(adapter) if adapter is not None else None, name, revision)
    shown = f"{name} + {adapter}" if adapter is not None else name
    try:
        return ChatModel(loaded.to(device), tokenizer, shown)
    except torch.OutOfMemoryError:
        raise EnvironmentProblem(
            f"{shown}: does not fit into the memory of {device} as it is; give a smaller dtype, another device, or cpu"
        ) from None


def parts(model: str | Path, adapter: str | Path | None = None) -> tuple[str, str | Path | None]:
    """What `load` reads: a model folder or a hub id, and the folder of the adapter on top of it. Raises SpecError."""
    folder = _export_of(Path(model))
    if adapter is None and (folder / "adapter_config.json").is_file():
        model, adapter = _base_of(folder), folder
        folder = Path(model)
    name = str(folder) if folder.is_dir() else str(model)
    if not folder.is_dir() and (Path(model).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise SpecError(f"{model}: no such model folder; give a folder, a run directory or a hub id")
    return name, adapter


def placed(device: str | None = None, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """Where a model computes and in which numbers; see `load`. Raises SpecError for what cannot be had here."""
    found = _usable(device)
    if dtype not in (None, *_DTYPES):
        raise SpecError(f"dtype is {dtype}, expected {', '.join(_DTYPES)}")
    return found, _DTYPES[dtype or ("bf16" if found.type == "cuda" else "fp32")]


def _usable(device: str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SpecError(
            f"device {device}: cannot be used here: {_first_line(error)}; leave it out, or say cpu"
        ) from None
    return found


def _export_of(folder: Path) -> Path:
    """The model of a run directory; any other folder is itself."""
    if not (folder / "job.json").is_file():
        return folder
    export = folder / "export"
    if not export.is_dir():
        raise SpecError(
            f"{folder}: the run has no model yet; `ernie export {folder} --to DIR` makes one of a checkpoint"
        )
    return export


def _base_of(adapter: Path) -> str:
    base = None
    with suppress(OSError, ValueError):
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise SpecError(f"{adapter}: the adapter names no base model; give the base, and the adapter with --adapter")
    return str(base)


def _with_adapter(model: PreTrainedModel, adapter: Path, base: str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not weights.is_file():
        raise SpecError(f"{adapter}: is no adapter; a folder with adapter_config.json and {weights.name} is one")
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
        with safe_open(weights, "pt") as file:
            unused = set(file.keys()) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SpecError(f"{adapter}: does not fit {base}: {_first_line(error)}; {_OTHER_BASE}") from error
    if unused:  # peft passes over what it finds no place for
        raise SpecError(f"{adapter}: does not fit {base}: no place for {min(unused)}; {_OTHER_BASE}")
    return adapted  # type: ignore[return-value]


def _exported_base(adapter: Path) -> dict[str, Any]:
    """Which weights an adapter that was exported here belongs to; empty for any other."""
    with suppress(OSError, ValueError):
        return json.loads((adapter / EXPORTED).read_text(encoding="utf-8")).get("base") or {}
    return {}


def _refuse_other_base(adapter: Path, known: dict[str, Any], base: str, revision: str | None) -> None:
    """Shapes do not tell."""
    if known and weights_fingerprint(ModelSpec(from_pretrained=base, revision=revision)) != known["weights"]:
        raise SpecError(f"{adapter}: is an adapter of {known['model']}, and {base} holds other weights; give its base")


def _tokenizer(adapter: Path | None, base: str, revision: str | None) -> PreTrainedTokenizerBase:
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    name = str(adapter) if own else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise SpecError(
            f"{name}: no tokenizer can be loaded: {_first_line(error)}; put its files beside the weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise SpecError(
            f"{name}: its tokenizer names no eos_token, so no answer would end; name one in tokenizer_config.json"
        )
    return give_template(tokenizer)


def _first_line(error: BaseException) -> str:
    if isinstance(error, ErnieError):
        return str(error)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""A complete transformers directory: weights as safetensors, config, generation config, tokenizer, chat template.

Of a run with an adapter the two are merged; or the adapter is written alone, a folder for peft.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ernie_dist.checkpoint import engine_folder
from ernie_dist.engine.select import read_weights
from ernie_dist.model.base_weights import base_fingerprint, weights_fingerprint
from ernie_dist.model.build import build_model
from ernie_dist.spec.errors import CheckpointError, SpecError
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import EXPORTED, read_state
from ernie_dist.spec.training import ModelSpec


def export_model(job: ResolvedJob, checkpoint: Path | None, to: Path, *, adapter_only: bool = False) -> Path:
    """Writes the model of a verified checkpoint; without one, as it was before the first step.

    The folder appears whole or not at all. Raises CheckpointError if `to` exists and is not an export; SpecError if
    there is no adapter to write alone, or no base that it could be put on.
    """
    if to.is_file() or (to.is_dir() and any(to.iterdir()) and not (to / EXPORTED).is_file()):
        raise CheckpointError(f"{to}: exists and is not an export; give another folder")
    if adapter_only:
        _refuse_without_base(job.spec.model)
    if checkpoint is not None and job.spec.model.adapter is not None:
        _refuse_other_base(job, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer.folder)
    model = _model(job, checkpoint, adapter_only=adapter_only)
    origin: dict[str, Any] = {"run": job.spec.name, "checkpoint": checkpoint.name if checkpoint else None}
    origin["format"] = job.format
    if adapter_only:
        spec = job.spec.model
        weights = weights_fingerprint(spec)
        origin["base"] = {"model": spec.from_pretrained, "revision": spec.revision, "weights": weights}
    else:
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / EXPORTED).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(to, ignore_errors=True)
    aside.rename(to)
    return to


def _model(job: ResolvedJob, checkpoint: Path | None, *, adapter_only: bool) -> PreTrainedModel:
    """With the weights of a checkpoint, in their precision. Of an adapter alone: peft's model, in fp32."""
    spec = job.spec.model
    weights = read_weights(job.spec.engine.kind, engine_folder(checkpoint)) if checkpoint else {}
    model = build_model(spec.base, job.tokenizer.vocab_size, job.spec.seed, attn_implementation="sdpa")
    if spec.adapter is not None:
        from ernie_dist.model.adapters import adapted, merged

        wrapped = adapted(model, spec.adapter, weights)
        if adapter_only:
            return wrapped
        model = merged(wrapped)
    elif weights:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        untied = [name for name in missing if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
        if untied or unexpected:
            raise CheckpointError(f"{checkpoint}: weights do not fit the model: {[*untied, *unexpected][:3]}")
    return model.to(next(iter(weights.values())).dtype) if weights else model


def _refuse_other_base(job: ResolvedJob, checkpoint: Path) -> None:
    """The checkpoint of an adapter says which weights it was trained on, and holds none of them."""
    spec = job.spec.model
    if read_state(checkpoint)["base"] != base_fingerprint(spec, job.tokenizer.vocab_size, job.spec.seed):
        raise CheckpointError(
            f"{checkpoint}: its adapter was trained on other weights than {spec.from_pretrained} holds now; bring the "
            "earlier ones back"
        )


def _refuse_without_base(spec: ModelSpec) -> None:
    if spec.adapter is None:
        raise SpecError("this run trains no adapter (model.adapter): export it without --adapter-only")
    if not spec.from_pretrained:
        raise SpecError("the base of this run is random weights, which are in no folder: leave out --adapter-only")

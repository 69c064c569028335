"""A complete transformers directory: weights as safetensors, config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from ernie_dist.checkpoint import engine_folder
from ernie_dist.engine.select import read_weights
from ernie_dist.model.build import build_model
from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.resolve import ResolvedJob

_MARK = "ernie_dist.json"
"""where an export comes from; only a folder that has it is ever replaced"""


def export_model(job: ResolvedJob, checkpoint: Path | None, to: Path) -> Path:
    """Writes the model of a verified checkpoint; without one, as it was before the first step.

    The folder appears whole or not at all. Raises CheckpointError if `to` exists and is not an export.
    """
    if to.is_file() or (to.is_dir() and any(to.iterdir()) and not (to / _MARK).is_file()):
        raise CheckpointError(f"{to}: exists and is not an export; give another folder")
    model = build_model(job.spec.model, job.tokenizer.vocab_size, job.spec.seed, attn_implementation="sdpa")
    if checkpoint is not None:
        weights = read_weights(job.spec.engine.kind, engine_folder(checkpoint))
        model.to(next(iter(weights.values())).dtype)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        untied = [name for name in missing if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
        if untied or unexpected:
            raise CheckpointError(f"{checkpoint}: weights do not fit the model: {[*untied, *unexpected][:3]}")
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer.folder)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    origin = {"run": job.spec.name, "checkpoint": checkpoint.name if checkpoint else None, "format": job.format}
    (aside / _MARK).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(to, ignore_errors=True)
    aside.rename(to)
    return to

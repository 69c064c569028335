"""Which weights an adapter belongs to: a fingerprint of what lies in the files it was put on."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import cached_file

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.training import ModelSpec
from ernie_dist.trusted_files import entry


def base_fingerprint(spec: ModelSpec, vocab_size: int, seed: int) -> str:
    """Of the frozen weights that `build_model` makes of these, the adapter left out. Raises SpecError."""
    if spec.from_pretrained:
        return weights_fingerprint(spec)
    drawn = [spec.base.model_dump(mode="json"), vocab_size, seed]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(spec: ModelSpec) -> str:
    """Of the content of all safetensors files of `from_pretrained`, a folder or a hub id that has been downloaded.

    Takes about 1 s/GB. Raises SpecError if there are none.
    """
    name = str(spec.from_pretrained)
    try:
        folder = Path(str(cached_file(name, "config.json", revision=spec.revision))).parent
    except OSError as error:
        raise SpecError(f"{name}: cannot be found: {str(error).strip().splitlines()[0]}") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SpecError(f"{name}: holds no weights as safetensors, so it cannot be told whether an adapter is its own")
    with ThreadPoolExecutor() as pool:
        parts = sorted(one["sha256"] for one in pool.map(entry, files))
    return hashlib.sha256("".join(parts).encode()).hexdigest()

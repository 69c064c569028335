"""Prepared data and a resolved job made of numbers, for benchmarks whose subject is not the content.

FOLDER/documents/manifest.json packs/train-T/    FOLDER/tokens/00000/tokens.bin ...
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ernie_dist.data.packing import Packs
from ernie_dist.data.shard import Manifest, SplitCount, packs_folder
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve

VOCABULARY = 103424


def write_source(folder: Path, packs: Packs, shard_tokens: tuple[int, ...], *, seed: int | None = 17) -> ResolvedSource:
    """A plain-text source of uint32 tokens, packed as given. Without a seed its files are holes, which read as 0."""
    own, tokens = folder / "documents", folder / "tokens"
    random = None if seed is None else np.random.default_rng(seed)
    for number, size in enumerate(shard_tokens):
        path = tokens / f"{number:05d}" / "tokens.bin"
        path.parent.mkdir(parents=True)
        if random is None:
            with path.open("wb") as file:
                os.truncate(file.fileno(), size * 4)
        else:
            random.integers(0, VOCABULARY, size, dtype=np.uint32).tofile(path)
    packs.save(packs_folder(own, "train", packs.sequence_length))
    pieces, nothing = len(packs.lengths), SplitCount(documents=0, tokens=0)
    manifest = Manifest(
        name="text",
        kind="text",
        fingerprint="synthetic",
        tokenizer_fingerprint="synthetic",
        vocab_size=VOCABULARY,
        token_type="uint32",
        label_replacements={},
        rows=pieces,
        documents=pieces,
        quarantined=0,
        duplicates=0,
        splits={"train": SplitCount(documents=pieces, tokens=packs.tokens), "validation": nothing, "test": nothing},
        length_histogram={},
        longest=int(packs.lengths.max()),
        tokens_folder="../tokens",
        shard_tokens=shard_tokens,
        inputs=(),
        versions={},
    )
    (own / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    packed = PackedLength(sequences=len(packs), tokens=packs.tokens)
    return ResolvedSource(
        folder=str(own), fingerprint="synthetic", kind="text", packed={packs.sequence_length: packed}, held_out=False
    )


def one_stage_job(source: ResolvedSource, tokens_per_batch: int, batches: int) -> ResolvedJob:
    """A job of one stage over one source, at the only length that it is packed to; micro-batches of 32K positions."""
    (length,) = source.packed
    stage = {"name": "only", "duration": f"{batches} steps", "sequence_length": length, "mixture": {"text": 1.0}}
    raw = {
        "name": "synthetic",
        "model": {"preset": "ernie-4.5-0.3b"},
        "tokenizer": "synthetic",
        "tokens_per_batch": tokens_per_batch,
        "sources": {"text": {"path": "nowhere.jsonl", "text": "text", "repeat": True}},
        "curriculum": [stage],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "engine": {"micro_batch_size": max(1, (1 << 15) // length)},
    }
    tokenizer = ResolvedTokenizer(folder="nowhere", fingerprint="synthetic", vocab_size=VOCABULARY)
    return resolve(parse_job(raw, "synthetic"), tokenizer, {"text": source})

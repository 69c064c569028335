"""Prepared data -> the facts a job is resolved with."""

from __future__ import annotations

from pathlib import Path

from ernie_dist.data.packing import Packs
from ernie_dist.data.prepare import PreparedJob
from ernie_dist.data.shard import PreparedSource
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve


def resolve_prepared(spec: JobSpec, prepared: PreparedJob) -> ResolvedJob:
    """The job with every number fixed. Raises SpecError where the data does not suffice."""
    tokenizer = ResolvedTokenizer(
        folder=str(prepared.tokenizer_folder.resolve()),
        fingerprint=prepared.tokenizer_fingerprint,
        vocab_size=prepared.vocab_size,
    )
    sources = {name: _facts(spec, name, folder) for name, folder in prepared.sources.items()}
    return resolve(spec, tokenizer, sources)


def _facts(spec: JobSpec, name: str, folder: Path) -> ResolvedSource:
    source = PreparedSource.open(folder)
    return ResolvedSource(
        folder=str(folder.resolve()),
        fingerprint=source.fingerprint,
        kind=source.kind,
        packed={length: _packed(source.packs("train", length)) for length in spec.sequence_lengths(name)},
        held_out=len(source.documents("validation")[0]) > 0,
    )


def _packed(packs: Packs) -> PackedLength:
    return PackedLength(sequences=len(packs), tokens=packs.tokens)

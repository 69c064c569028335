"""Prepared data on disk, and its reader.

    DATA_DIR/SOURCE/tokens-CONTENT/00000/   tokens.bin [mask.bin] lengths.bin digests.bin bad.jsonl shard.json
                                  /00001/   ...  a shard appears by one rename, so it is there or it is not
    DATA_DIR/SOURCE/FINGERPRINT/            train.starts.bin train.lengths.bin ... packs/ manifest.json

Tokens depend on the rows and the tokenizer; the second folder lists which documents belong to which split, and how
they are packed. Offsets count tokens over all shards of a source; no document crosses shards.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from ernie_dist.data.packing import Packs, ranges
from ernie_dist.data.split import SPLITS
from ernie_dist.spec.curriculum import Kind
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.strict import Strict

FORMAT = 1
"""raised when tokens or documents of the same input would come out differently"""
_SLICED = 64
"""pieces of so many tokens on average are copied one by one, which is quicker there than by the index of every token"""


class ShardRecord(Strict):
    """shard.json: one shard, and where in the input the next one starts."""

    format: Literal[1] = 1
    rows: int
    documents: int
    tokens: int
    bad_rows: int
    left_out: dict[str, int] = Field(default_factory=dict)
    """rows passed over as the source asked for, by reason"""
    end: tuple[int, int, int]
    """readers.Position after the last row"""
    consumed: int
    """bytes of the source's files read up to there"""
    last: bool


class SplitCount(Strict):
    documents: int
    tokens: int


class InputRecord(Strict):
    """A file that went into a source."""

    path: str
    bytes: int
    sha256: str


class Manifest(Strict):
    """manifest.json: what a prepared source is and holds."""

    format: Literal[1] = 1
    name: str
    kind: Kind
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    token_type: Literal["uint16", "uint32"]
    label_replacements: dict[int, int]
    """tokens in the inputs -> what the model learns to say there"""
    rows: int
    documents: int
    """what rows became, duplicates among them; of triples one row may become several"""
    quarantined: int
    """bad rows, in quarantine.jsonl"""
    left_out: dict[str, int] = Field(default_factory=dict)
    """rows passed over as the source asked for, by reason"""
    duplicates: int
    """documents left out because their content was seen before"""
    splits: dict[str, SplitCount]
    length_histogram: dict[int, int]
    """upper bound, a power of two: documents of at most so many tokens, and more than half"""
    longest: int
    """tokens of the longest document"""
    tokens_folder: str
    """relative to the folder of the manifest"""
    shard_tokens: tuple[int, ...]
    inputs: tuple[InputRecord, ...]
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens in all splits."""
        return sum(count.tokens for count in self.splits.values())


class PreparedSource:
    """A prepared source, read through memory maps. Cheap to open, and never written to."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.name, self.kind, self.fingerprint = manifest.name, manifest.kind, manifest.fingerprint
        tokens_folder = folder / manifest.tokens_folder
        starts = np.concatenate([[0], np.cumsum(manifest.shard_tokens, dtype=np.int64)])
        self._starts: list[int] = starts.tolist()
        shards = [(tokens_folder / f"{number:05d}", size) for number, size in enumerate(manifest.shard_tokens)]
        self._tokens = [map_array(shard / "tokens.bin", manifest.token_type, size) for shard, size in shards]
        masked = [] if manifest.kind == "text" else shards
        self._masks = [map_array(shard / "mask.bin", "uint8", size) for shard, size in masked]

    @classmethod
    def open(cls, folder: Path) -> PreparedSource:
        """Raises DataError if `folder` is no complete prepared source."""
        return cls(folder, read_manifest(folder))

    def documents(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Starts (uint64, in tokens over all shards) and lengths (uint32, tokens) of the documents of a split."""
        if split not in SPLITS:
            raise DataError(f"{self.folder}: no split {split!r}; there are {', '.join(SPLITS)}")
        count = self.manifest.splits[split].documents
        return (
            map_array(self.folder / f"{split}.starts.bin", "uint64", count),
            map_array(self.folder / f"{split}.lengths.bin", "uint32", count),
        )

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids (int64) and loss mask (uint8; None for text) of `length` tokens within one document."""
        shard = bisect_right(self._starts, start) - 1
        begin = start - self._starts[shard]
        span = slice(begin, begin + length)
        tokens = self._tokens[shard][span].astype(np.int64)
        if len(tokens) != length:
            raise IndexError(f"{self.folder}: no {length} tokens at {start}: {self._starts[-1]} in all")
        return tokens, self._masks[shard][span] if self._masks else None

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What `read` gives for each of many pieces, int64 [pieces], one after the other."""
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        places = np.cumsum(lengths) - lengths
        tokens = np.empty(lengths.sum(), np.int64)
        mask = np.empty(len(tokens), np.uint8) if self._masks else None
        for shard in np.unique(shards).tolist():
            here = shards == shard
            source, target, length = starts[here] - self._starts[shard], places[here], lengths[here]
            arrays: list[tuple[np.ndarray, np.ndarray]] = [(tokens, self._tokens[shard])]
            if mask is not None:
                arrays.append((mask, self._masks[shard]))
            if length.mean() < _SLICED:
                source, target = ranges(source, length), ranges(target, length)
                for into, out_of in arrays:
                    into[target] = out_of[source]
                continue
            for begin, place, count in zip(source.tolist(), target.tolist(), length.tolist(), strict=True):
                for into, out_of in arrays:
                    into[place : place + count] = out_of[begin : begin + count]
        return tokens, mask

    def packs(self, split: str, sequence_length: int) -> Packs:
        """The packs that prepare planned. Raises DataError if it never did."""
        folder = packs_folder(self.folder, split, sequence_length)
        try:
            return Packs.load(folder)
        except FileNotFoundError:
            raise DataError(
                f"{self.folder}: {split} is not packed to {sequence_length} tokens; run `ernie prepare` with this job"
            ) from None
        except ValueError as error:
            raise DataError(str(error)) from None


def packs_folder(folder: Path, split: str, sequence_length: int) -> Path:
    """Where the packs of a prepared source lie."""
    return folder / "packs" / f"{split}-{sequence_length}"


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError if it is missing or of another version."""
    try:
        return Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except OSError:
        raise DataError(f"{folder}: not a complete prepared source (no manifest.json); run `ernie prepare`") from None
    except ValidationError:
        raise DataError(f"{folder}: prepared by another version; remove the folder and run `ernie prepare`") from None


def read_shards(tokens_folder: Path) -> list[ShardRecord]:
    """The finished shards, in order, up to the first that is missing."""
    records: list[ShardRecord] = []
    while (path := tokens_folder / f"{len(records):05d}" / "shard.json").exists():
        try:
            records.append(ShardRecord.model_validate_json(path.read_bytes()))
        except ValidationError:
            raise DataError(f"{path}: written by another version, or damaged; remove {tokens_folder}") from None
        if records[-1].last:
            break
    return records


def read_bad_rows(tokens_folder: Path, shard: int, limit: int) -> list[dict[str, str | int]]:
    """The first rows that were set aside in a shard: file, line, reason, row."""
    with (tokens_folder / f"{shard:05d}" / "bad.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]


def map_array(path: Path, dtype: str, count: int) -> np.ndarray:
    """A file as a read-only array [count]. Raises DataError if it has another size."""
    expected = count * np.dtype(dtype).itemsize
    actual = path.stat().st_size if path.exists() else 0
    if actual != expected:
        raise DataError(
            f"{path}: has {actual:,} bytes, expected {expected:,}; remove its folder and run `ernie prepare`"
        )
    if count == 0:
        return np.empty(0, dtype)
    # A plain view: slicing np.memmap itself is several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))

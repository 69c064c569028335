"""Shards -> which documents belong to which split, duplicates left out; and the packs of each split.

lengths, digests of all shards --content hash--> train.starts.bin, train.lengths.bin, validation... + manifest.json
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ernie_dist.data.packing import Overlong, plan_packs
from ernie_dist.data.shard import Manifest, PreparedSource, ShardRecord, SplitCount, map_array, packs_folder
from ernie_dist.data.split import SPLITS, split_of
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.errors import DataError

_BUCKET = 1 << 25
"""digests compared at once, which bounds the memory"""


def find_duplicates(digests: list[np.ndarray]) -> np.ndarray:
    """uint64 digests, per shard -> bool [documents]: whether an earlier document has the same digest."""
    ends = np.cumsum([0, *map(len, digests)])
    duplicate = np.zeros(ends[-1], np.bool_)
    bits = max(0, int(ends[-1]) // _BUCKET).bit_length()
    for bucket in range(1 << bits):
        found = []
        for shard, start in zip(digests, ends[:-1].tolist(), strict=True):
            here = np.flatnonzero(shard >> np.uint64(64 - bits) == bucket) if bits else np.arange(len(shard))
            found.append((here + start, shard[here]))
        where = np.concatenate([positions for positions, _ in found])
        values = np.concatenate([values for _, values in found])
        _, first = np.unique(values, return_index=True)
        is_first = np.zeros(len(where), np.bool_)
        is_first[first] = True
        duplicate[where[~is_first]] = True
    return duplicate


def write_index(
    folder: Path,
    tokens_folder: Path,
    records: list[ShardRecord],
    source: SourceSpec,
    split: SplitSpec,
    manifest: Callable[..., Manifest],
) -> Manifest:
    """Writes `folder` with the documents of each split, the quarantined rows and the manifest; all or nothing.

    `manifest` makes the manifest from the counts found here.
    """
    shards = [tokens_folder / f"{number:05d}" for number in range(len(records))]
    sized = list(zip(shards, (record.documents for record in records), strict=True))
    lengths = [map_array(shard / "lengths.bin", "uint32", count) for shard, count in sized]
    digests = [map_array(shard / "digests.bin", "uint64", count) for shard, count in sized]
    duplicates = find_duplicates(digests) if source.dedupe else None

    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    counts = {name: [0, 0] for name in SPLITS}
    histogram = np.zeros(33, np.int64)
    longest = first_document = first_token = 0
    with ExitStack() as stack:
        files = {
            (name, what): stack.enter_context((aside / f"{name}.{what}.bin").open("wb"))
            for name in SPLITS
            for what in ("starts", "lengths")
        }
        for here, marks, record in zip(lengths, digests, records, strict=True):
            starts = np.zeros(len(here), np.uint64)
            np.cumsum(here[:-1], out=starts[1:])
            starts += np.uint64(first_token)
            which = split_of(marks, split)
            if duplicates is not None:
                which[duplicates[first_document : first_document + len(here)]] = len(SPLITS)
            for number, name in enumerate(SPLITS):
                chosen = which == number
                kept = here[chosen]
                _append(files[name, "starts"], starts[chosen])
                _append(files[name, "lengths"], kept)
                counts[name][0] += len(kept)
                counts[name][1] += int(kept.sum(dtype=np.int64))
                histogram += np.bincount(_ceil_log2(kept), minlength=33)
                longest = max(longest, int(kept.max(initial=0)))
            first_document += len(here)
            first_token += record.tokens
    left_out: Counter[str] = Counter()
    for record in records:
        left_out.update(record.left_out)
    quarantined = _write_quarantine(aside / "quarantine.jsonl", shards, records)
    result = manifest(
        rows=sum(record.rows for record in records),
        documents=first_document,
        quarantined=quarantined,
        left_out=dict(left_out.most_common()),
        duplicates=int(duplicates.sum()) if duplicates is not None else 0,
        splits={name: SplitCount(documents=count[0], tokens=count[1]) for name, count in counts.items()},
        length_histogram={1 << power: int(count) for power, count in enumerate(histogram) if count},
        longest=longest,
        tokens_folder=os.path.relpath(tokens_folder, folder),
        shard_tokens=tuple(record.tokens for record in records),
    )
    (aside / "manifest.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # at most an incomplete one
    os.replace(aside, folder)
    return result


def plan_missing_packs(prepared: PreparedSource, overlong: Overlong, wanted: list[tuple[str, int]]) -> None:
    """Plans and saves the packs (split, sequence_length) that are not there yet. Raises DataError for overlong ones."""
    for split, sequence_length in wanted:
        folder = packs_folder(prepared.folder, split, sequence_length)
        if (folder / "packs.json").exists():
            continue
        starts, lengths = prepared.documents(split)
        policy: Overlong = "split" if prepared.kind == "text" else overlong
        if policy == "fail" and split != "train":
            policy = "drop"  # held-out conversations are measured on, not learnt from: one too long costs nothing
        field = f"sources.{prepared.name}"
        try:
            packs = plan_packs(starts, lengths, sequence_length, overlong=policy)
        except ValueError as error:
            raise DataError(f"{field}: {error} ({field}.overlong: truncate, or drop)") from None
        if split == "train" and not len(packs):
            raise DataError(
                f"{field}: each of its {len(lengths):,} training documents is longer than {sequence_length} tokens, "
                f"and {field}.overlong is drop: raise sequence_length, or set it to truncate"
            )
        packs.save(folder)


def _write_quarantine(path: Path, shards: list[Path], records: list[ShardRecord]) -> int:
    with path.open("wb") as quarantine:
        for shard, record in zip(shards, records, strict=True):
            if record.bad_rows:
                with (shard / "bad.jsonl").open("rb") as rows:
                    shutil.copyfileobj(rows, quarantine)
    return sum(record.bad_rows for record in records)


def _ceil_log2(lengths: np.ndarray) -> np.ndarray:
    """The least power of two that is not less than each length: exactly, since a float64 holds any uint32."""
    return np.frexp(np.maximum(lengths.astype(np.float64) * 2 - 1, 1))[1] - 1


def _append(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.tobytes())

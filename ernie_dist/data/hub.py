"""The one door to `datasets`: hub datasets and folders written by save_to_disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_dist.data.inputs import Input
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def find_dataset(name: str, source: SourceSpec) -> Input:
    """A dataset and the files it lies in on this machine, fetched from the hub if need be. Raises DataError."""
    assert source.dataset is not None
    folder = _folder(source.dataset)
    if folder is not None:
        if (folder / "dataset_dict.json").exists():
            folder = folder / source.dataset_split
        files = sorted(folder.glob("*.arrow"))  # found without importing `datasets`, which takes seconds
        if not files or not (folder / "state.json").exists():
            raise DataError(
                f"sources.{name}.dataset: {folder}: no dataset written by save_to_disk lies here; give its folder, and "
                f"the split as sources.{name}.dataset_split"
            )
        return Input(str(folder), "dataset", tuple(files))
    dataset = _load(name, source)
    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    return Input(f"{source.dataset}[{source.dataset_split}]", "dataset", tuple(files))


def read_dataset(source: SourceSpec, skip: int) -> Iterator[tuple[int, dict[str, Any], float]]:
    """(number, row, share read) from row `skip` on."""
    dataset = _load("dataset", source)
    total = len(dataset)
    for first in range(skip, total, 256):
        columns = dataset[first : min(first + 256, total)]
        for offset in range(len(next(iter(columns.values())))):
            number = first + offset
            yield number, {name: values[offset] for name, values in columns.items()}, number / total


def _folder(dataset: str) -> Path | None:
    path = Path(os.path.expanduser(os.path.expandvars(dataset)))
    return path if path.is_dir() else None


def _load(name: str, source: SourceSpec) -> Dataset:
    import datasets

    assert source.dataset is not None
    folder = _folder(source.dataset)
    try:
        if folder is not None:
            loaded = datasets.load_from_disk(str(folder))
            return loaded[source.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(source.dataset, source.subset, split=source.dataset_split)
    except Exception as error:  # the hub, the network and the dataset's own code can each fail in any way
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"sources.{name}.dataset: {source.dataset}: cannot be loaded ({type(error).__name__}: {reason}); check the "
            "id, the subset and dataset_split, or give a folder written by save_to_disk"
        ) from None

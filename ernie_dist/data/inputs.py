"""The files of a source, and their SHA-256, remembered by size and time of change: an unchanged file is hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.spec.errors import DataError


@dataclass(frozen=True)
class Input:
    """One file of a source, or a whole `datasets` dataset."""

    label: str
    """as messages name it"""
    format: str
    """jsonl, json, csv, tsv, txt, md, parquet or dataset"""
    files: tuple[Path, ...]
    """what it is made of on disk, and hashed by"""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)


def unpacked_bytes(file: Path) -> int:
    """Roughly how many bytes a file has when decompressed."""
    return file.stat().st_size * (4 if file.suffix in (".gz", ".zst", ".parquet") else 1)


class HashCache:
    """Hashes of files, kept in one JSON file. `save` writes what was learnt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[int | str]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self._known = {}  # it only saves time
        self._changed = False

    def hash_all(self, files: Iterable[Path], hashed: Callable[[int], None] = lambda size: None) -> dict[Path, str]:
        """SHA-256 (hex) of each file. `hashed` is told the size of each file that had to be read."""
        result: dict[Path, str] = {}
        unknown: list[tuple[Path, os.stat_result]] = []
        for file in files:
            stat = _stat(file)
            known = self._known.get(str(file.resolve()))
            if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
                result[file] = str(known[2])
            else:
                unknown.append((file, stat))
        with ThreadPoolExecutor(4) as pool:
            for (file, stat), value in zip(unknown, pool.map(_sha256, [file for file, _ in unknown]), strict=True):
                self._known[str(file.resolve())] = [stat.st_size, stat.st_mtime_ns, value]
                self._changed, result[file] = True, value
                hashed(stat.st_size)
        return result

    def save(self) -> None:
        if self._changed:
            with suppress(OSError):  # it only saves time
                aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
                aside.write_text(json.dumps(self._known, ensure_ascii=False, indent=0), encoding="utf-8")
                os.replace(aside, self._path)

    def is_unchanged(self, file: Path) -> bool:
        """Whether a file is still the one that was hashed."""
        stat = _stat(file)
        known = self._known.get(str(file.resolve()))
        return known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _sha256(file: Path) -> str:
    value = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as stream:
            while data := stream.read(1 << 20):
                value.update(data)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    return value.hexdigest()

"""Files that are hashed while they are written, and verified before anything in them is believed.

folder/any/file      written by one rank each: bytes and sha256 come back, and are gathered
       manifest.json {"files": {"any/file": {"bytes", "sha256"}}}
       COMPLETE      last
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals, set_crc32_options

from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.run_files import COMPLETE

MANIFEST = "manifest.json"
UNREAD = "cannot be read"
"""in a reason: nothing is known against the file itself"""
_BLOCK = 1 << 22
_TRIES, _PAUSE = 3, 1.0
"""for a disk or a file server in trouble; seconds"""

Entry = dict[str, Any]
"""{"bytes": int, "sha256": hex digits}, as `sha256sum` prints it"""


def write_state(path: Path, state: Any) -> Entry:
    """Writes what torch.save takes; on disk for good once this returns. Tensors have to lie in host memory."""
    set_crc32_options(False)  # the zip's own checksum costs more than ours, and says less
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        hashed = _Hashed(file)
        try:
            torch.save(state, hashed)
        except RuntimeError:  # torch's writer, still closing the file, hides why it could not be written
            if hashed.problem is None:
                raise
            raise hashed.problem from None
        os.fsync(file.fileno())
    return hashed.entry()


def write_text(path: Path, text: str) -> Entry:
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_state(path: Path, device: torch.device | str, classes: Sequence[type] = ()) -> Any:
    """What `write_state` wrote. Tensors, plain values and `classes` only: raises CheckpointError if there is more."""
    try:
        with safe_globals(list(classes)):
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: holds more than data and is not read; delete this checkpoint ({why})") from None


def entry(path: Path, *, settle: bool = False) -> Entry:
    """Of a file that somebody else wrote; on disk for good if told to `settle` it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if settle:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def complete(folder: Path, files: dict[str, Entry]) -> None:
    """Makes a folder with these files one that counts: manifest, COMPLETE, and all of it on disk."""
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1))
    write_text(folder / COMPLETE, "")
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(inner)


def publish(aside: Path, final: Path) -> None:
    """Gives a complete folder its name, which it then has for good."""
    aside.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Raises ValueError with the reason if there is none that can be read."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])} for name, one in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not readable ({type(error).__name__}: {error})") from None


def difference(folder: Path, expected: Iterable[tuple[str, Entry]]) -> str | None:
    """The first file that is not what was written, and how; None if all are. Reads every byte."""
    for name, written in expected:
        for left in reversed(range(_TRIES)):
            try:
                problem = _difference(folder / name, written)
                break
            except OSError as error:
                problem = f"{UNREAD} ({error.strerror})"
                time.sleep(_PAUSE if left else 0)
        if problem:
            return f"{name} {problem}"
    return None


def _difference(path: Path, written: Entry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != written["bytes"]:
        return f"has {size:,} bytes instead of {written['bytes']:,}"
    return None if entry(path)["sha256"] == written["sha256"] else "differs from what was written"


class _Hashed:
    """A file as torch.save wants it, which is written from front to back."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self._size += len(view)
        try:
            while len(view):
                view = view[self._file.write(view) :]  # the operating system may take less than it is given
        except OSError as error:
            self.problem = self.problem or error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def entry(self) -> Entry:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

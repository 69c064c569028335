"""Files -> blocks -> rows. Blocks are what travels to worker processes; a position in them is where a resume starts.

    *.jsonl[.gz|.zst]  --raw whole lines-->  Block  --in a worker--> decode, parse --> rows
    csv, tsv, json, txt, md, parquet, datasets --parse--> rows --pickle--> Block --in a worker--> rows

A Markdown file is one document. A txt file holds documents set apart by blank lines.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ernie_dist.data.decoding import Opened, is_line_safe
from ernie_dist.data.inputs import Input
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

BLOCK_BYTES = 1 << 20
"""about so many bytes of input go to a worker at once"""
_LONGEST = 1 << 26
"""characters of one row beyond which it is taken for a broken file"""
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".md": "md",
    ".markdown": "md",
    ".parquet": "parquet",
}


class Position(NamedTuple):
    """Where in a source the next block starts."""

    input: int = 0
    offset: int = 0
    """bytes of decompressed lines, or rows in the other formats"""
    line: int = 1


class Broken(NamedTuple):
    """A row that cannot be read."""

    reason: str
    raw: str


class Located(NamedTuple):
    """A row and where it came from."""

    input: int
    line: int
    """of the file, from 1; in parquet and datasets the row"""
    row: dict[str, Any] | Broken


@dataclass(frozen=True)
class Block:
    """Some rows in a row, as bytes."""

    payload: bytes
    """whole lines of JSONL, or a pickled list[Located]"""
    is_lines: bool
    start: Position
    end: Position
    consumed: int
    """bytes of the source's files read so far, as on disk"""
    size: int
    """bytes of the payload, also where that was left out"""


def find_inputs(name: str, source: SourceSpec) -> list[Input]:
    """The files of a source, sorted by path. Raises DataError for a file, glob or variable that is not there."""
    if source.dataset is not None:
        from ernie_dist.data.hub import find_dataset

        return [find_dataset(name, source)]
    found: dict[str, None] = {}
    for given, pattern in zip(source.path or (), source.paths, strict=True):
        if re.search(r"\$(\{\w+\}|[A-Za-z_]\w*)", pattern):
            raise DataError(f"sources.{name}.path: {given}: an environment variable in it is not set; export it first")
        is_glob = any(mark in pattern for mark in "*?[") and not os.path.exists(pattern)
        matches = glob.glob(pattern, recursive=True) if is_glob else [pattern]
        files = sorted(path for path in matches if os.path.isfile(path))
        if not files:
            what = "no file matches" if is_glob else "is a folder" if os.path.isdir(pattern) else "no such file"
            remedy = f"; write {given.rstrip('/')}/*.jsonl for the files in it" if what == "is a folder" else ""
            raise DataError(f"sources.{name}.path: {given}: {what} (looked in {Path.cwd()}){remedy}")
        found.update(dict.fromkeys(files))
    return [Input(path, _format(name, path, source), (Path(path),)) for path in sorted(found)]


def _format(name: str, path: str, source: SourceSpec) -> str:
    if source.format != "auto":
        return source.format
    ending = Path(re.sub(r"\.(gz|zst)$", "", path)).suffix.lower()
    if ending not in _FORMATS:
        raise DataError(
            f"sources.{name}.path: {path}: the ending {ending!r} does not tell the format; known: "
            f"{', '.join(_FORMATS)}, also .gz and .zst of them; or set sources.{name}.format"
        )
    if ending == ".json":  # many a .json file holds JSON lines
        with Opened(Path(path)) as file:
            start = file.stream.read(4096).decode(source.encoding, errors="ignore").lstrip("\ufeff \t\r\n")
        return "json" if start.startswith("[") else "jsonl"
    return _FORMATS[ending]


def read_blocks(source: SourceSpec, inputs: Sequence[Input], start: Position = Position()) -> Iterator[Block]:  # noqa: B008
    """Blocks from `start` on, in order; the same blocks wherever one starts. Raises DataError for unreadable files."""
    pending: list[Located] = []
    size, first, before = 0, start, sum(item.size for item in inputs[: start.input])
    for index in range(start.input, len(inputs)):
        item, begin = inputs[index], start if index == start.input else Position(index)
        if item.format == "jsonl":
            if pending:
                yield _row_block(pending, first, begin, before)
                pending, size = [], 0
            yield from _line_blocks(source, item, begin, before)
        else:
            for at, located, done in _read_rows(source, item, begin):
                if not pending:
                    first = Position(index, at)
                pending.append(located)
                size += _weight(located.row)
                if size >= BLOCK_BYTES or len(pending) >= 4096:
                    yield _row_block(pending, first, Position(index, at + 1), before + int(done * item.size))
                    pending, size = [], 0
        before += item.size
    if pending:
        yield _row_block(pending, first, Position(len(inputs)), before)


def parse_block(block: Block, encoding: str) -> Iterator[Located]:
    """The rows of a block. For lines, this is where they are decoded and parsed."""
    if not block.is_lines:
        yield from pickle.loads(block.payload)
        return
    for line, raw in enumerate(block.payload.split(b"\n"), block.start.line):
        if not raw or raw.isspace():
            continue
        row: dict[str, Any] | Broken
        try:
            row = json.loads(raw.decode(encoding))
        except UnicodeDecodeError as error:
            row = Broken(f"byte {error.start} is not {encoding} ({error.reason})", _shown(raw, encoding))
        except (ValueError, RecursionError) as error:
            row = Broken(f"not valid JSON: {error}", _shown(raw, encoding))
        else:
            if not isinstance(row, dict):
                row = Broken("not a JSON object with named fields", _shown(raw, encoding))
        yield Located(block.start.input, line, row)


def _line_blocks(source: SourceSpec, item: Input, start: Position, before: int) -> Iterator[Block]:
    recode = None if is_line_safe(source.encoding) else source.encoding
    with Opened(item.files[0], recode=recode) as file:
        file.skip(start.offset)
        at = start
        while data := file.stream.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += file.stream.readline()
            end = Position(at.input, at.offset + len(data), at.line + data.count(b"\n"))
            if at.offset == 0:
                data = data.removeprefix(b"\xef\xbb\xbf")
            yield Block(data, True, at, end, before + file.consumed, len(data))
            at = end


def line_encoding(source: SourceSpec) -> str:
    """The encoding in which blocks of lines arrive at a worker."""
    return source.encoding if is_line_safe(source.encoding) else "utf-8"


def _row_block(rows: list[Located], start: Position, end: Position, consumed: int) -> Block:
    payload = pickle.dumps(rows, 5)  # a fixed protocol: sizes decide where shards end
    return Block(payload, False, start, end, consumed, len(payload))


def _weight(row: dict[str, Any] | Broken) -> int:
    """Roughly how many bytes a row has; it decides the borders of blocks, so it must not depend on the machine."""
    values = row if isinstance(row, Broken) else row.values()
    return sum(3 * len(value) if isinstance(value, str) else 16 for value in values)


def _read_rows(source: SourceSpec, item: Input, start: Position) -> Iterator[tuple[int, Located, float]]:
    """(number of the row in its file, row, share of the file read) from row `start.offset` on."""
    if item.format == "dataset":
        from ernie_dist.data.hub import read_dataset

        for number, value, done in read_dataset(source, start.offset):
            yield number, Located(start.input, number + 1, value), done
    elif item.format == "parquet":
        for number, value, done in _parquet(item.files[0], start.offset):
            yield number, Located(start.input, number + 1, value), done
    else:
        with Opened(item.files[0]) as file:
            rows = _ROWS[item.format](file.text(source.encoding), item.label)
            for number, (line, parsed) in enumerate(islice(rows, start.offset, None), start.offset):
                yield number, Located(start.input, line, parsed), file.share


def _csv(text: io.TextIOBase, label: str, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{label}:{line}: the header is not valid CSV: {error}") from None
            yield line, Broken(f"not valid CSV: {error}; the row that starts here has a quote that does not match", "")
            continue
        if not values:
            continue
        if header is None:
            header = [name.strip() for name in values]
            if len(set(header)) != len(header) or not all(header):
                raise DataError(f"{label}:{line}: the header needs a different name for each column, got {values}")
        elif len(values) != len(header):
            raw = delimiter.join(values)
            yield line, Broken(f"has {len(values)} columns, and the header {len(header)}: {', '.join(header)}", raw)
        else:
            yield line, dict(zip(header, values, strict=True))


def _tsv(text: io.TextIOBase, label: str) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    return _csv(text, label, "\t")


def _txt(text: io.TextIOBase, label: str) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """Documents set apart by blank lines; one of more than 64M characters is cut at the end of a line."""
    lines: list[str] = []
    size, number = 0, 0
    for number, line in enumerate(text, 1):
        blank = line.isspace()
        if lines and (blank or size > _LONGEST):
            yield number - len(lines), {"text": "".join(lines).rstrip("\r\n").replace("\r\n", "\n")}
            lines, size = [], 0
        if not blank:
            lines.append(line)
            size += len(line)
    if lines:
        yield number + 1 - len(lines), {"text": "".join(lines).rstrip("\r\n").replace("\r\n", "\n")}


def _markdown(text: io.TextIOBase, label: str) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    yield 1, {"text": text.read().replace("\r\n", "\n")}


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_array(text: io.TextIOBase, label: str) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """The elements of one array, read in pieces. Raises DataError where it breaks: no row after that can be found."""
    held, line, wanted = "", 1, "["
    while True:
        at = _match_end(held, 0)
        if at == len(held) and (more := text.read(BLOCK_BYTES)):
            line, held = line + held.count("\n"), more
            continue
        line += held.count("\n", 0, at)
        mark, held = held[at : at + 1], held[at + 1 :]
        if mark == "]" and wanted == ",":
            break
        if mark != wanted:
            raise _broken_array(label, line, f"expected {wanted!r}, found {mark!r}" if mark else "it ends too early")
        wanted = ","
        value, raw, held = _next_element(text, held, label, line)
        if value is _END:
            break
        line += raw.count("\n", 0, _match_end(raw, 0))
        yield line, value if isinstance(value, dict) else Broken("not a JSON object with named fields", raw.strip())
        line += raw.count("\n", _match_end(raw, 0))
    if held.strip() or text.read().strip():
        raise _broken_array(label, line, "there is more after the end of the array")


_END = object()


def _next_element(text: io.TextIOBase, held: str, label: str, line: int) -> tuple[Any, str, str]:
    """(element, its text with the space before it, what was read beyond it); _END for an empty array's ]."""
    size = BLOCK_BYTES
    while True:
        begin = _match_end(held, 0)
        error: Exception
        try:
            if held[begin : begin + 1] == "]":
                return _END, "", held[begin + 1 :]
            value, end = _DECODER.raw_decode(held, begin)
            if _match_end(held, end) < len(held):  # else a number may go on in what was not read yet
                return value, held[:end], held[end:]
            error = ValueError("it ends too early")
        except (ValueError, RecursionError) as found:
            error = found
        more = text.read(size)
        if not more or len(held) > _LONGEST:
            position = error.pos if isinstance(error, json.JSONDecodeError) else begin
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise _broken_array(label, line + held.count("\n", 0, position), reason)
        held, size = held + more, size * 2


def _match_end(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def _broken_array(label: str, line: int, reason: str) -> DataError:
    return DataError(
        f"{label}:{line}: not a valid JSON array: {reason}; what follows cannot be read, so no row can be set aside "
        "here: mend it, or convert the file to JSONL"
    )


_ROWS = {"csv": _csv, "tsv": _tsv, "txt": _txt, "md": _markdown, "json": _json_array}


def _parquet(path: Path, skip: int) -> Iterator[tuple[int, dict[str, Any], float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        total, number = file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number + count <= skip:
                number += count
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                for row in batch.to_pylist():
                    if number >= skip:
                        yield number, row, number / total
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _shown(raw: bytes, encoding: str) -> str:
    return raw.decode(encoding, errors="backslashreplace")

"""One source's blocks -> shards on disk, in parallel and in order, resumable after any finished shard.

read_blocks --bounded queue--> workers: rows -> documents -> tokens --in order--> 00000/ 00001/ ...
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ernie_dist.data.documents import BadRow, Document, canonical, document_maker
from ernie_dist.data.inputs import Input, unpacked_bytes
from ernie_dist.data.readers import Block, Broken, Position, line_encoding, parse_block, read_blocks
from ernie_dist.data.render import Encoder
from ernie_dist.data.shard import ShardRecord, read_bad_rows, read_shards
from ernie_dist.data.split import digest
from ernie_dist.data.tokenizer import PublishedTokenizer
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError, EnvironmentProblem

SHARD_BYTES = 1 << 26
"""about so many bytes of input make one shard: what a kill costs at most"""
_SHARDS = 64
"""about so many shards at most: of larger sources the shards grow, since a reader keeps a file open for each"""
REPORTED = 20
"""bad rows that a message lists"""


class BadLine(NamedTuple):
    """A row set aside."""

    input: int
    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Encoded:
    """What became of one block."""

    rows: int
    tokens: np.ndarray
    mask: np.ndarray | None
    lengths: np.ndarray
    digests: np.ndarray
    """uint64 [documents]"""
    bad: list[BadLine]


class Pool(Protocol):
    """Whoever encodes the blocks of a source: processes of this machine, or those of a cluster. Used in a `with`."""

    def encode(
        self, source: SourceSpec, inputs: list[Input], start: Position, wanted: Callable[[], bool]
    ) -> Iterator[tuple[Block, Encoded]]:
        """Reads the blocks of a source from `start` on and encodes them, a bounded number at a time.

        Results come in order, with their blocks, payload left out. `wanted` may be asked, block by block, whether
        tokens are still of use; without them the rows are only checked.
        """
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...


class Workers:
    """Processes that encode blocks, started at the first; with count 1 this process does it. Use it in a `with`."""

    def __init__(self, count: int, tokenizer: PublishedTokenizer) -> None:
        self._count = count
        self._tokenizer = tokenizer
        self._pool: ProcessPoolExecutor | None = None
        self._started = False

    def _start(self) -> None:
        self._started = True
        if self._count == 1:
            start_encoder(self._tokenizer)
            return
        # Never fork: this process may hold threads and locks (tokenizers, pyarrow).
        self._pool = ProcessPoolExecutor(self._count, get_context("spawn"), _start_worker, (self._tokenizer,))
        # Children inherit the mask: a Ctrl-C while they start would make each of them print a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self._count):
                self._pool.submit(os.getpid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def encode(
        self, source: SourceSpec, inputs: list[Input], start: Position, wanted: Callable[[], bool]
    ) -> Iterator[tuple[Block, Encoded]]:
        waiting: deque[tuple[Block, Future[Encoded]]] = deque()
        try:
            for block in read_blocks(source, inputs, start):
                if not self._started:
                    self._start()
                bare = replace(block, payload=b"")
                if self._pool is None:
                    yield bare, encode_block(block, source, wanted())
                    continue
                waiting.append((bare, self._pool.submit(encode_block, block, source, wanted())))
                if len(waiting) >= 3 * self._count:
                    bare, future = waiting.popleft()
                    yield bare, future.result()
            while waiting:
                bare, future = waiting.popleft()
                yield bare, future.result()
        except BrokenProcessPool:
            raise EnvironmentProblem(
                "a worker process was killed or could not start, perhaps for want of memory; finished shards are kept: "
                "start again, with fewer workers"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None


def start_encoder(tokenizer: PublishedTokenizer) -> None:
    """Makes this process ready for `encode_block`."""
    global _encoder
    _encoder = Encoder(tokenizer.folder / "tokenizer.json", tokenizer.stop_id, tokenizer.frame)


def _start_worker(tokenizer: PublishedTokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends us in order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: there is a process per core
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a parent killed outright tells nobody, and its children would wait for ever
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    start_encoder(tokenizer)


def encode_block(block: Block, source: SourceSpec, encode: bool) -> Encoded:
    """Rows -> documents -> tokens; without `encode` the rows are only checked. Runs in a worker."""
    assert _encoder is not None
    make = document_maker(source)
    documents: list[Any] = []
    digests: list[int] = []
    bad: list[BadLine] = []
    rows = 0
    for index, line, row in parse_block(block, line_encoding(source)):
        rows += 1
        try:
            if isinstance(row, Broken):
                raise BadRow(row.reason)
            document: Document = make(row)
            content = canonical(document)
            _encoder.check(document)
        except BadRow as error:
            raw = row.raw if isinstance(row, Broken) else json.dumps(row, ensure_ascii=False, default=str)
            bad.append(BadLine(index, line, str(error), raw))
        else:
            documents.append(document)
            digests.append(digest(content))
    if not encode:
        documents, digests = [], []
    encoding = _encoder.encode(source.kind, documents)
    return Encoded(rows, encoding.tokens, encoding.mask, encoding.lengths, np.array(digests, np.uint64), bad)


def tokenise(
    name: str,
    source: SourceSpec,
    inputs: list[Input],
    folder: Path,
    token_type: str,
    workers: Pool,
    advance: Callable[[int, int, int], None],
) -> list[ShardRecord]:
    """Writes the shards of a source that are still missing in `folder`, and returns all of them.

    `advance` is told (bytes consumed so far, rows, tokens) after each block. Raises DataError for bad rows, unless the
    source sets them aside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.partial"):
        shutil.rmtree(left)
    records = read_shards(folder)
    fails = source.on_bad_row == "fail"
    if fails and any(record.bad_rows for record in records):
        raise bad_rows_error(name, inputs, stored_bad_rows(folder, records))
    if records and records[-1].last:
        return records
    start = Position(*records[-1].end) if records else Position()
    consumed = records[-1].consumed if records else 0
    advance(consumed, 0, 0)
    shard_bytes = max(SHARD_BYTES, sum(unpacked_bytes(file) for item in inputs for file in item.files) // _SHARDS)
    bad: list[BadLine] = []
    end = start
    with ExitStack() as stack:
        writer: _ShardWriter | None = None
        # Once a row is bad nothing more is encoded: the rest is only checked, to list more bad rows at once.
        for block, encoded in workers.encode(source, inputs, start, lambda: not bad):
            if fails and (bad or encoded.bad):
                bad.extend(encoded.bad)
                advance(block.consumed, encoded.rows, 0)
                if len(bad) >= REPORTED:
                    break
                continue
            writer = writer or stack.enter_context(_ShardWriter(folder, len(records), token_type, source.kind))
            writer.add(block, encoded, inputs)
            end, consumed = block.end, block.consumed
            advance(consumed, encoded.rows, len(encoded.tokens))
            if writer.size >= shard_bytes:
                records.append(writer.publish(end, consumed, last=False))
                writer = None
        if bad:
            raise bad_rows_error(name, inputs, [(inputs[row.input].label, row.line, row.reason) for row in bad])
        writer = writer or stack.enter_context(_ShardWriter(folder, len(records), token_type, source.kind))
        records.append(writer.publish(end, consumed, last=True))
    return records


def stored_bad_rows(folder: Path, records: list[ShardRecord]) -> list[tuple[str, int, str]]:
    """(file, line, reason) of the first rows that were set aside."""
    found: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        if record.bad_rows and len(found) < REPORTED:
            found += read_bad_rows(folder, number, REPORTED)
    return [(row["file"], row["line"], row["reason"]) for row in found]


def bad_rows_error(name: str, inputs: list[Input], rows: list[tuple[str, int, str]]) -> DataError:
    """The message that lists bad rows, each with file and line."""
    count = f"{len(rows)} bad row{'s' * (len(rows) != 1)}" if len(rows) < REPORTED else f"the first {REPORTED} bad rows"
    listed = "\n".join(f"  {file}:{line}: {reason}" for file, line, reason in rows[:REPORTED])
    return DataError(
        f"sources.{name}: {count}:\n{listed}\n"
        f"Mend them, or set sources.{name}.on_bad_row: quarantine to set bad rows aside and count them."
    )


class _ShardWriter:
    """Writes one shard aside; `publish` puts it in place. In a `with`, so that its files get closed."""

    def __init__(self, folder: Path, number: int, token_type: str, kind: str) -> None:
        self._final = folder / f"{number:05d}"
        self._aside = folder / f"{number:05d}.partial"
        self._token_type = np.dtype(token_type)
        names = ("tokens.bin", "lengths.bin", "digests.bin", "bad.jsonl", "mask.bin")
        self._names = names[:-1] if kind == "text" else names
        self._files: dict[str, BinaryIO] = {}
        self._rows = self._documents = self._tokens = self._bad = 0
        self.size = 0
        """bytes of input so far"""

    def __enter__(self) -> _ShardWriter:
        self._aside.mkdir()
        self._files = {name: (self._aside / name).open("wb") for name in self._names}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def add(self, block: Block, encoded: Encoded, inputs: list[Input]) -> None:
        self.size += block.size
        _write(self._files["tokens.bin"], encoded.tokens.astype(self._token_type, copy=False))
        _write(self._files["lengths.bin"], encoded.lengths)
        _write(self._files["digests.bin"], encoded.digests)
        if encoded.mask is not None:
            _write(self._files["mask.bin"], encoded.mask)
        for row in encoded.bad:
            shown = {"file": inputs[row.input].label, "line": row.line, "reason": row.reason, "row": row.raw}
            text = json.dumps(shown, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._files["bad.jsonl"].write(text + b"\n")
        self._rows += encoded.rows
        self._documents += len(encoded.lengths)
        self._tokens += len(encoded.tokens)
        self._bad += len(encoded.bad)

    def publish(self, end: Position, consumed: int, *, last: bool) -> ShardRecord:
        record = ShardRecord(
            rows=self._rows,
            documents=self._documents,
            tokens=self._tokens,
            bad_rows=self._bad,
            end=end,
            consumed=consumed,
            last=last,
        )
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        (self._aside / "shard.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(self._aside, self._final)
        return record


def _write(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.tobytes())

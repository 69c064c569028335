"""Bytes on disk -> bytes or text: decompression, encodings, and how much of the file has been read."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ernie_dist.spec.errors import DataError

# In these a line break is always the byte 0x0A, so raw lines can be cut out before they are decoded.
_LINE_SAFE = {
    *("ascii", "utf-8", "utf-8-sig", "latin-1", "koi8-r", *(f"cp125{digit}" for digit in range(9))),
    *("gb18030", "gbk", "gb2312", "big5", "big5hkscs", "cp950"),
    *("euc_jp", "shift_jis", "cp932", "euc_kr", "cp949"),
}


def is_line_safe(encoding: str) -> bool:
    """Whether lines can be told apart without decoding."""
    return codecs.lookup(encoding).name in {codecs.lookup(name).name for name in _LINE_SAFE}


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Undecodable bytes become lone surrogates, which no valid text holds: the row is found out later, on its own."""
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error("ernie_dist.mark", _mark)


class Opened:
    """A file opened for reading, decompressed by its ending (.gz, .zst). Use it in a `with`.

    With `recode`, `stream` gives the text of that encoding as UTF-8. Raises DataError for what cannot be read.
    """

    def __init__(self, path: Path, *, recode: str | None = None) -> None:
        self._path = path
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        self._size = max(1, path.stat().st_size)
        inner: Any = self._raw
        self.compressed = path.suffix in (".gz", ".zst")
        if path.suffix == ".gz":
            inner = gzip.GzipFile(fileobj=self._raw)
        elif path.suffix == ".zst":
            inner = _Chunks(_decompress(self._raw))
        stream: Any = io.BufferedReader(inner, 1 << 20) if self.compressed else inner
        if recode:
            self.compressed = True
            lines = (line.encode("utf-8", "surrogatepass") for line in self._decode(stream, recode))
            stream = io.BufferedReader(_Chunks(lines), 1 << 20)
        self.stream: BinaryIO = stream

    @property
    def consumed(self) -> int:
        """Bytes read so far, as on disk."""
        return self._raw.tell()

    @property
    def share(self) -> float:
        """Part of the file read so far, 0 to 1."""
        return self.consumed / self._size

    def skip(self, count: int) -> None:
        """Goes forward `count` bytes of `stream`, from the start."""
        if not self.compressed:
            self.stream.seek(count)
            return
        while count > 0:
            count -= len(self.stream.read(min(count, 1 << 20)))

    def text(self, encoding: str) -> io.TextIOWrapper:
        """The whole as text with its line ends kept; what cannot be decoded becomes lone surrogates."""
        encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        return self._decode(self.stream, encoding)

    def _decode(self, stream: Any, encoding: str) -> io.TextIOWrapper:
        # Kept, because a wrapper that is collected closes the file below it.
        self._text = io.TextIOWrapper(stream, encoding=encoding, errors="ernie_dist.mark", newline="")
        return self._text

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._raw.close()
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile | _BadZstd):
            reason = "ends too early" if isinstance(error, EOFError) else str(error)
            raise DataError(f"{self._path}: {reason}; it may be cut off or damaged: fetch it again") from None
        if isinstance(error, OSError):
            raise DataError(f"{self._path}: cannot be read ({error.strerror or error})") from None


class _BadZstd(Exception):
    pass


def _decompress(raw: BinaryIO) -> Iterator[bytes]:
    """All frames of a .zst file. The library's own stream reader takes a cut-off file for a complete one."""
    import zstandard

    data = b""
    while data := data or raw.read(1 << 18):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _BadZstd(str(error)) from None
            data = frame.unused_data
            if not frame.eof and not (data := raw.read(1 << 18)):
                raise EOFError


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a raw file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._held = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = memoryview(chunk)
        part, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

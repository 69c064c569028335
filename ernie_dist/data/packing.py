"""Document lengths -> fixed-length sequences, by best fit on the histogram of lengths.

documents  |---a---| |-b-| |------c------| |d|
sequences  [------c------d] [---a----b---..]        . = padding
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np

Overlong = Literal["split", "truncate", "drop", "fail"]

_FORMAT = 1
_ARRAYS = ("starts", "lengths", "offsets")
_AT_ONCE = 1 << 16
"""documents cut and put into place at once: what planning holds beside the documents and the packs"""


@dataclass(frozen=True, eq=False)
class Packs:
    """Which pieces of a source's token space make up each of its sequences."""

    starts: np.ndarray
    """uint64 [pieces]: token offset of each piece in the source's token space."""
    lengths: np.ndarray
    """uint32 [pieces]: tokens in each piece, 1 to sequence_length."""
    offsets: np.ndarray
    """int64 [sequences + 1]: the pieces of sequence i are offsets[i]:offsets[i + 1]."""
    sequence_length: int
    """Token positions in one sequence."""
    truncated: int
    """Documents cut to sequence_length."""
    dropped: int
    """Documents left out, because they were longer than sequence_length."""

    def __len__(self) -> int:
        """Sequences."""
        return len(self.offsets) - 1

    def pieces(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the pieces of one sequence, 0 <= sequence < len(self); IndexError otherwise."""
        if not 0 <= sequence < len(self):  # -1 would silently be an empty slice
            raise IndexError(f"sequence {sequence} of {len(self)}")
        span = slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))
        return self.starts[span], self.lengths[span]

    def pieces_of(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] -> starts and lengths of all their pieces, sequence by sequence, and how many pieces each has.

        All int64. IndexError for a sequence that is not there.
        """
        if len(sequences) and not 0 <= sequences.min() <= sequences.max() < len(self):
            raise IndexError(f"sequences {sequences.min()} to {sequences.max()} of {len(self)}")
        first = self.offsets[sequences]
        count = self.offsets[sequences + 1] - first
        which = ranges(first, count)
        return self.starts[which].astype(np.int64), self.lengths[which].astype(np.int64), count

    @cached_property
    def tokens(self) -> int:
        """Tokens in all pieces, padding not counted."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def padding_fraction(self) -> float:
        """Share of token positions that hold no token, 0 to 1."""
        positions = len(self) * self.sequence_length
        return 1 - self.tokens / positions if positions else 0.0

    def save(self, folder: Path) -> None:
        """Write three .npy files and, last, packs.json: without it the folder does not load."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "packs.json").unlink(missing_ok=True)  # else an old one would vouch for a mixture of old and new
        for name in _ARRAYS:
            _replace(folder / f"{name}.npy", partial(np.save, arr=getattr(self, name)))
        text = json.dumps(self._header(), indent=2) + "\n"
        _replace(folder / "packs.json", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: Path) -> Packs:
        """Memory-map what `save` wrote: constant time and memory.

        Raises FileNotFoundError where a save never finished, ValueError where the files do not belong together.
        """
        if not (folder / "packs.json").exists():
            raise FileNotFoundError(f"{folder}: no packs.json, so no complete packs lie here; plan and save them again")
        header = json.loads((folder / "packs.json").read_bytes())
        if header.get("format") != _FORMAT:
            raise ValueError(f"{folder}: packs of format {header.get('format')}, expected {_FORMAT}; plan them again")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        packs = cls(**arrays, **{name: header[name] for name in ("sequence_length", "truncated", "dropped")})
        if packs._header() != header or len(packs.starts) != len(packs.lengths):
            raise ValueError(f"{folder}: packs.json and its .npy files do not belong together; plan them again")
        return packs

    def _header(self) -> dict[str, int]:
        return {
            "format": _FORMAT,
            "sequence_length": self.sequence_length,
            "sequences": len(self),
            "pieces": len(self.lengths),
            "truncated": self.truncated,
            "dropped": self.dropped,
        }


def plan_packs(starts: np.ndarray, lengths: np.ndarray, sequence_length: int, *, overlong: Overlong) -> Packs:
    """Pack documents into as few sequences of `sequence_length` tokens as best-fit decreasing finds.

    `starts` and `lengths` are integers [documents]: token offset and tokens of each document. Only a document longer
    than a sequence is ever cut, as `overlong` says: "split" into full pieces and a remainder that is packed like any
    document (plain text); "truncate", "drop" or "fail" (conversations). The result depends on the arguments alone.

    Best fit is taken per distinct length, not per document, as in histogram packing (Krell et al. 2021,
    arXiv:2107.02027); for best fit as a way to cut few documents see Ding et al. 2024, arXiv:2404.10830.

    Raises ValueError for arrays that are no such list, for empty documents, and under "fail" for overlong ones.
    """
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong is {overlong!r}, expected one of: {', '.join(get_args(Overlong))}")
    _check(starts, lengths, sequence_length)
    longer = int(np.count_nonzero(lengths > sequence_length))
    if longer and overlong == "fail":
        raise ValueError(
            f"{longer} of {len(lengths)} documents are longer than sequence_length {sequence_length} "
            f"(the longest has {lengths.max()} tokens): raise sequence_length, or choose to truncate or drop them"
        )
    pieces = partial(_pieces, starts, lengths, sequence_length, overlong)
    histogram = np.zeros(sequence_length + 1, np.int64)
    for _, some in pieces():
        histogram += np.bincount(some, minlength=sequence_length + 1)
    starts, lengths, offsets = _arrange(pieces(), histogram)
    return Packs(
        starts=starts,
        lengths=lengths,
        offsets=offsets,
        sequence_length=sequence_length,
        truncated=longer if overlong == "truncate" else 0,
        dropped=longer if overlong == "drop" else 0,
    )


def _check(starts: np.ndarray, lengths: np.ndarray, sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}, expected at least 1")
    if starts.ndim != 1 or starts.shape != lengths.shape:
        raise ValueError(f"starts {starts.shape} and lengths {lengths.shape} must be one value each per document")
    if starts.dtype.kind not in "iu" or lengths.dtype.kind not in "iu":
        raise ValueError(f"starts ({starts.dtype}) and lengths ({lengths.dtype}) must be integers")
    if len(lengths) and lengths.min() <= 0:
        first = int(np.argmax(lengths <= 0))
        raise ValueError(f"document {first} has {lengths[first]} tokens: leave empty documents out before packing")
    if len(starts) and starts.min() < 0:
        first = int(np.argmax(starts < 0))
        raise ValueError(f"document {first} starts at token {starts[first]}, expected 0 or more")


def _pieces(
    starts: np.ndarray, lengths: np.ndarray, sequence_length: int, overlong: Overlong
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents -> pieces of at most sequence_length, in the order of the text, some at a time.

    Yields their starts, uint64, and lengths, int64.
    """
    for at in range(0, len(lengths), _AT_ONCE):
        some_starts = np.asarray(starts[at : at + _AT_ONCE], np.uint64)
        some_lengths = np.asarray(lengths[at : at + _AT_ONCE])
        longer = some_lengths > sequence_length
        if longer.any():
            if overlong == "split":
                some_starts, some_lengths = _split(some_starts, some_lengths, sequence_length)
            elif overlong == "truncate":
                some_lengths = np.minimum(some_lengths, sequence_length)
            else:
                some_starts, some_lengths = some_starts[~longer], some_lengths[~longer]
        yield some_starts, some_lengths.astype(np.int64, copy=False)


def _split(starts: np.ndarray, lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents -> pieces of sequence_length, and the remainder of each document, in the order of the text."""
    lengths = lengths.astype(np.int64)
    count = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(count)), count)  # that each piece is of
    nth = np.arange(len(document)) - (np.cumsum(count) - count)[document]
    before = nth * sequence_length  # tokens of the document before each piece
    # uint64 before the sum: numpy adds uint64 and int64 as float64, which is inexact above 2**53
    return starts[document] + before.astype(np.uint64), np.minimum(lengths[document] - before, sequence_length)


def _arrange(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], histogram: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces, some at a time, and the histogram of all their lengths -> starts, lengths and offsets as in Packs.

    The rank of a piece is its index among all of them, the longest first and equal ones in the order of the text.
    """
    sequence_length = len(histogram) - 1
    placements, sequences = _best_fit(histogram, sequence_length)
    first, count, before, each = placements.T
    end = np.cumsum(count * each)  # placements come longest piece first: the i-th is of the ranks begin[i]:end[i]
    begin = end - count * each

    more = np.zeros(sequences + 1, np.int64)  # pieces that a sequence has more than the one before it
    np.add.at(more, first, each)
    np.subtract.at(more, first + count, each)
    offsets = np.zeros(sequences + 1, np.int64)
    np.cumsum(np.cumsum(more[:-1]), out=offsets[1:])

    total = int(histogram.sum())
    starts, lengths = np.empty(total, np.uint64), np.empty(total, np.uint32)
    next_rank = total - np.cumsum(histogram)[::-1]  # of the next piece of each shortness, which is 0 for a full one
    for some_starts, some_lengths in pieces:
        # as narrow as can be: numpy sorts uint16 by radix, which is several times faster
        shortness = (sequence_length - some_lengths).astype(np.min_scalar_type(sequence_length - 1))
        order = np.argsort(shortness, kind="stable")
        here = np.bincount(shortness, minlength=sequence_length + 1)
        rank = np.arange(len(order)) + np.repeat(next_rank - (np.cumsum(here) - here), here)
        next_rank += here
        placement = np.searchsorted(end, rank, side="right")
        nth_sequence, nth_piece = np.divmod(rank - begin[placement], each[placement])
        place = offsets[first[placement] + nth_sequence] + before[placement] + nth_piece
        starts[place], lengths[place] = some_starts[order], some_lengths[order]
    return starts, lengths, offsets


def _best_fit(histogram: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing for all pieces of a length at once.

    Returns placements (first, count, before, each), int64 [placements, 4]: "the next count * each pieces, longest
    first, go to the sequences first:first + count, `each` to every one of them, which has `before` pieces already";
    and the number of sequences.
    """
    placements = array("q")  # first, count, before, each, first, ...
    room: dict[int, list[tuple[int, int, int]]] = {}  # free positions -> sequences with them: first, count, before
    spaces: list[int] = []  # the keys of `room`, ascending
    sequences = 0
    present = np.flatnonzero(histogram)
    shortest = int(present[0]) if len(present) else 0

    def place(first: int, count: int, before: int, each: int, space: int, length: int) -> None:
        if count and each:
            placements.extend((first, count, before, each))
        space -= each * length
        if count and space >= shortest:  # else nothing to come can fit
            if space not in room:
                insort(spaces, space)
            room.setdefault(space, []).append((first, count, before + each))

    for length in present[::-1].tolist():
        waiting = int(histogram[length])
        while waiting:
            at = bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces[at]
                first, count, before = room[space].pop()
                if not room[space]:
                    del room[space], spaces[at]
            else:
                space = sequence_length
                first, count, before = sequences, -(-waiting // (space // length)), 0
                sequences += count
            # A sequence that took one piece has now the least room that fits, so it takes all it can before the next.
            each = space // length
            full = min(count, waiting // each)
            rest = waiting - full * each if full < count else 0
            place(first, full, before, each, space, length)
            if full < count:
                place(first + full, 1, before, rest, space, length)
                place(first + full + 1, count - full - 1, before, 0, space, length)
            waiting -= full * each + rest

    return np.array(placements, np.int64).reshape(-1, 4), sequences


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """int64 [sum(count)]: first[0], first[0] + 1, ... (count[0] of them), first[1], first[1] + 1, ..."""
    ends = np.cumsum(count)
    values = np.arange(ends[-1] if len(ends) else 0)
    values += np.repeat(first - ends + count, count)
    return values


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside, then put it in place at once."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)

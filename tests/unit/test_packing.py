"""Packing: every token once, nothing split without need, tight, and readable without loading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_dist.data import packing
from ernie_dist.data.packing import Overlong, Packs, plan_packs

document_lengths = st.lists(st.integers(1, 60), max_size=80)
sequence_lengths = st.integers(1, 32)


def documents(lengths: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of documents that lie one after the other, the first at token 1000."""
    values = np.asarray(lengths, dtype=np.uint32)
    return np.cumsum(values, dtype=np.uint64) - values + np.uint64(1000), values


def pieces_of(packs: Packs) -> list[tuple[int, int]]:
    """All (start, length), by start; asserts on the way that no sequence is empty or too full."""
    found = []
    for sequence in range(len(packs)):
        starts, lengths = packs.pieces(sequence)
        assert 1 <= lengths.sum() <= packs.sequence_length
        found += list(zip(starts.tolist(), lengths.tolist(), strict=True))
    return sorted(found)


def best_fit_decreasing(lengths: list[int], sequence_length: int) -> int:
    """The textbook algorithm, one document at a time: how many sequences it needs."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in spaces if space >= length]
        if fits:
            spaces.remove(min(fits))
        spaces.append((min(fits) if fits else sequence_length) - length)
    return len(spaces)


@settings(deadline=None)
@given(document_lengths, sequence_lengths)
def test_split_places_every_token_once_and_cuts_only_what_is_longer(lengths: list[int], sequence_length: int) -> None:
    starts, values = documents(lengths)
    packs = plan_packs(starts, values, sequence_length, overlong="split")
    expected = [
        (int(start) + at, min(sequence_length, length - at))
        for start, length in zip(starts, lengths, strict=True)
        for at in range(0, length, sequence_length)
    ]
    assert pieces_of(packs) == expected
    assert packs.tokens == sum(lengths)
    assert packs.truncated == packs.dropped == 0


@settings(deadline=None)
@given(document_lengths, sequence_lengths)
def test_conversations_are_whole_or_counted(lengths: list[int], sequence_length: int) -> None:
    starts, values = documents(lengths)
    whole = list(zip(starts.tolist(), lengths, strict=True))
    longer = sum(length > sequence_length for length in lengths)

    dropping = plan_packs(starts, values, sequence_length, overlong="drop")
    assert pieces_of(dropping) == [(start, length) for start, length in whole if length <= sequence_length]
    assert (dropping.dropped, dropping.truncated) == (longer, 0)

    truncating = plan_packs(starts, values, sequence_length, overlong="truncate")
    assert pieces_of(truncating) == [(start, min(length, sequence_length)) for start, length in whole]
    assert (truncating.dropped, truncating.truncated) == (0, longer)


@settings(deadline=None)
@given(st.lists(st.integers(1, 24), max_size=80))
def test_as_tight_as_best_fit_decreasing_by_hand(lengths: list[int]) -> None:
    packs = plan_packs(*documents(lengths), 24, overlong="fail")
    assert len(packs) == best_fit_decreasing(lengths, 24)


def test_padding_is_small_on_realistic_lengths() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    lengths = np.maximum(1, rng.lognormal(5.2, 1.0, 20_000)).astype(np.uint32)
    packs = plan_packs(*documents(lengths), 4096, overlong="split")
    assert packs.padding_fraction < 0.002
    assert packs.padding_fraction == 1 - int(lengths.sum()) / (len(packs) * 4096)


def test_starts_above_double_precision_stay_exact() -> None:
    packs = plan_packs(np.array([2**60 + 1], np.uint64), np.array([5], np.uint32), 4, overlong="split")
    assert pieces_of(packs) == [(2**60 + 1, 4), (2**60 + 5, 1)]


def test_long_sequences() -> None:
    packs = plan_packs(*documents([131_072, 131_073, 7, 131_000, 64]), 131_072, overlong="split")
    assert len(packs) == 3
    assert packs.tokens == 131_072 + 131_073 + 7 + 131_000 + 64


def test_the_order_never_changes() -> None:
    packs = plan_packs(*documents([5, 3, 9, 1, 8, 2, 2, 20, 4]), 8, overlong="split")
    assert packs.offsets.tolist() == [0, 1, 2, 3, 4, 6, 8, 12]
    assert packs.starts.tolist() == [1008, 1018, 1030, 1038, 1000, 1005, 1046, 1050, 1026, 1028, 1016, 1017]
    assert packs.lengths.tolist() == [8, 8, 8, 8, 5, 3, 4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("at_once", [7, 5000])
@pytest.mark.parametrize(
    ("overlong", "sequence_length", "digest"),
    [
        ("split", 64, "170628a527f2f0ac"),
        ("split", 1000, "6c7388a9293f2482"),
        ("truncate", 1000, "af773ee4f29a1e27"),
        ("drop", 1000, "ffaeb2e70368ad0b"),
        ("fail", 70_000, "8c3521ce3c7a003f"),
    ],
)
def test_the_order_never_changes_however_many_documents_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int, overlong: Overlong, sequence_length: int, digest: str
) -> None:
    """Prepared data holds these packs, and a run resumes in the middle of them."""
    lengths = np.arange(2000) ** 2 * 7919 % 9973 % 1999 + 1  # 1 to 1999, many of them equal
    monkeypatch.setattr(packing, "_AT_ONCE", at_once)
    packs = plan_packs(*documents(lengths), sequence_length, overlong=overlong)
    found = hashlib.blake2b(digest_size=8)
    for values in (packs.starts, packs.lengths, packs.offsets):
        found.update(values.tobytes())
    assert found.hexdigest() == digest


@pytest.mark.parametrize("lengths", [[5, 3, 9, 1, 8], []])
def test_saved_packs_are_memory_mapped_not_read(tmp_path: Path, lengths: list[int]) -> None:
    planned = plan_packs(*documents(lengths), 8, overlong="truncate")
    planned.save(tmp_path / "packs")
    loaded = Packs.load(tmp_path / "packs")
    for name in ("starts", "lengths", "offsets"):
        assert isinstance(getattr(loaded, name), np.memmap)
        assert getattr(loaded, name).dtype == getattr(planned, name).dtype
        np.testing.assert_array_equal(getattr(loaded, name), getattr(planned, name))
    for name in ("sequence_length", "truncated", "dropped", "tokens", "padding_fraction"):
        assert getattr(loaded, name) == getattr(planned, name)
    assert {path.name for path in (tmp_path / "packs").iterdir()} == {
        "packs.json", "starts.npy", "lengths.npy", "offsets.npy"
    }  # fmt: skip


def test_a_save_that_was_cut_short_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_packs(*documents([5, 3]), 8, overlong="fail").save(tmp_path)

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", disk_full)
        with pytest.raises(OSError, match="No space"):
            plan_packs(*documents([8, 8, 8]), 8, overlong="fail").save(tmp_path)
    with pytest.raises(FileNotFoundError, match="plan and save them again"):
        Packs.load(tmp_path)


def test_files_that_do_not_belong_together_do_not_load(tmp_path: Path) -> None:
    plan_packs(*documents([5, 3, 8]), 8, overlong="fail").save(tmp_path)
    header = json.loads((tmp_path / "packs.json").read_text())
    (tmp_path / "packs.json").write_text(json.dumps(header | {"pieces": 2}))
    with pytest.raises(ValueError, match="do not belong together"):
        Packs.load(tmp_path)
    (tmp_path / "packs.json").write_text(json.dumps(header | {"format": 0}))
    with pytest.raises(ValueError, match="format 0, expected 1"):
        Packs.load(tmp_path)


def test_refusals_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"2 of 3 documents .* sequence_length 8 .* 12 tokens.*truncate or drop"):
        plan_packs(*documents([12, 3, 9]), 8, overlong="fail")
    with pytest.raises(ValueError, match="document 1 has 0 tokens"):
        plan_packs(*documents([3, 0]), 8, overlong="split")
    with pytest.raises(ValueError, match="split, truncate, drop, fail"):
        plan_packs(*documents([3]), 8, overlong="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence_length is 0"):
        plan_packs(*documents([3]), 0, overlong="split")
    with pytest.raises(ValueError, match="must be integers"):
        plan_packs(np.array([0.0]), np.array([3]), 8, overlong="split")
    with pytest.raises(ValueError, match="one value each per document"):
        plan_packs(np.array([0, 3]), np.array([3]), 8, overlong="split")
    with pytest.raises(ValueError, match="document 0 starts at token -1"):
        plan_packs(np.array([-1]), np.array([3]), 8, overlong="split")


def test_no_sequence_outside_the_range() -> None:
    packs = plan_packs(*documents([5, 3]), 8, overlong="split")
    for sequence in (-1, 1):
        with pytest.raises(IndexError):
            packs.pieces(sequence)

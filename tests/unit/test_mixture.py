"""Mixture and shuffle: pure, random access, true to the weights, and the same for ever."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_dist.data.mixture import BLOCK, Mixture
from ernie_dist.data.shuffle import _splitmix, mix, permute, uniform

THREE = Mixture(weights=(0.4, 0.4, 0.2), tokens_per_sequence=(4000.0, 1000.0, 2500.0), seed=17)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 10 * BLOCK), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_pick_is_random_access(indices: list[int], random: Random) -> None:
    sources, ranks = THREE.pick(np.array(indices))
    together = {index: (int(sources[i]), int(ranks[i])) for i, index in enumerate(indices)}
    random.shuffle(indices)
    for index in indices:
        source, rank = Mixture(THREE.weights, THREE.tokens_per_sequence, THREE.seed).pick(np.array(index))
        assert (int(source), int(rank)) == together[index]


def test_pick_keeps_the_shape() -> None:
    flat = THREE.pick(np.arange(24))
    for source_or_rank, expected in zip(THREE.pick(np.arange(24).reshape(2, 3, 4)), flat, strict=True):
        assert source_or_rank.dtype == np.int64
        np.testing.assert_array_equal(source_or_rank, expected.reshape(2, 3, 4))
    assert THREE.pick(np.zeros((0, 3), np.int64))[0].shape == (0, 3)


def test_a_position_far_away_costs_no_walk() -> None:
    far = 2**40
    sources, ranks = THREE.pick(np.arange(far * BLOCK, (far + 1) * BLOCK))
    for source, each in enumerate(THREE.count(BLOCK)):
        assert np.sort(ranks[sources == source]).tolist() == list(range(far * each, (far + 1) * each))


def test_each_source_is_read_in_order_without_a_gap() -> None:
    sources, ranks = THREE.pick(np.arange(3 * BLOCK + 1234))
    for source, count in enumerate(THREE.count(3 * BLOCK + 1234)):
        assert ranks[sources == source].tolist() == list(range(count))


@pytest.mark.parametrize(
    ("weights", "tokens"),
    [
        ((0.4, 0.4, 0.2), (4000.0, 1000.0, 2500.0)),
        ((0.97, 0.03), (512.0, 4096.0)),
        ((1 / 3, 1 / 3, 1 / 3), (100.0, 101.0, 4096.0)),
    ],
)
def test_weights_are_shares_of_tokens(weights: tuple[float, ...], tokens: tuple[float, ...]) -> None:
    mixture = Mixture(weights, tokens, seed=3)
    for sequences in (BLOCK, 10 * BLOCK, 10 * BLOCK + 1000):
        of_each = np.array(mixture.count(sequences))
        assert of_each.sum() == sequences
        rate = sequences / np.sum(np.divide(weights, tokens))  # tokens of the stage so far, were it all exact
        # one sequence off per block at most, and one in the block that has begun
        assert np.all(np.abs(of_each - rate * np.divide(weights, tokens)) <= sequences / BLOCK + 1)


def test_every_prefix_has_about_the_right_share() -> None:
    mixture = Mixture((0.5, 0.3, 0.2), (1.0, 1.0, 1.0), seed=8)
    for sequences in range(1, BLOCK, 7):
        assert np.all(np.abs(np.array(mixture.count(sequences)) - sequences * np.array(mixture.weights)) < 2.5)


def test_a_small_source_is_in_every_block_and_a_weightless_one_in_none() -> None:
    mixture = Mixture((1 - 1e-9, 0.0, 1e-9), (1.0, 0.0, 1.0), seed=0)
    assert mixture.count(BLOCK) == (BLOCK - 1, 0, 1)
    many = Mixture((0.9, *[0.1 / 1000] * 1000), (1.0,) * 1001, seed=0)
    assert many.count(BLOCK)[0] == BLOCK - 1000
    assert set(many.count(BLOCK)[1:]) == {1}


def test_the_order_depends_on_the_seed_and_the_block() -> None:
    first = THREE.pick(np.arange(BLOCK))[0]
    other_block = THREE.pick(np.arange(BLOCK, 2 * BLOCK))[0]
    other_seed = Mixture(THREE.weights, THREE.tokens_per_sequence, seed=18).pick(np.arange(BLOCK))[0]
    assert not np.array_equal(first, other_block)
    assert not np.array_equal(first, other_seed)


def test_bad_mixtures_are_refused() -> None:
    for weights, tokens, reason in [
        ((0.5, 0.4), (1.0, 1.0), "sum to 0.9, expected 1"),
        ((1.5, -0.5), (1.0, 1.0), "0 or more each"),
        ((float("nan"), 1.0), (1.0, 1.0), "0 or more each"),
        ((1.0,), (1.0, 1.0), "1 weights for 2"),
        ((), (), "sum to 0"),
        ((0.5, 0.5), (1.0, 0.0), "more than 0 for each source with a weight"),
        ((1 / 5000,) * 5000, (1.0,) * 5000, "at most 4096"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Mixture(weights, tokens, seed=0)
    with pytest.raises(IndexError):
        THREE.pick(np.array([3, -1]))
    with pytest.raises(ValueError, match="sequences is -1"):
        THREE.count(-1)


# Golden values: a run that is resumed after an upgrade must go on in the same order. If one of these fails, the code
# is wrong, not the value.


def test_golden_mixture() -> None:
    assert THREE.count(BLOCK) == (706, 2825, 565)
    sources, ranks = THREE.pick(np.arange(5 * BLOCK, 5 * BLOCK + 12))
    assert (sources.tolist(), ranks.tolist()) == (
        [1, 1, 2, 1, 0, 1, 1, 0, 1, 1, 1, 2],
        [14125, 14126, 2825, 14127, 3530, 14128, 14129, 3531, 14130, 14131, 14132, 2826],
    )


def test_golden_permutations() -> None:
    assert permute(np.arange(10), 10, seed=17).tolist() == [2, 5, 8, 7, 4, 9, 1, 6, 3, 0]
    assert permute(np.arange(5), 300, seed=17).tolist() == [239, 266, 273, 213, 164]
    assert permute(np.arange(5), 2**62, seed=17).tolist() == [
        2748117129908524423,
        1246767926618485426,
        7699454533022172,
        3600827657184967394,
        172815955077336987,
    ]
    assert uniform(3, seed=17).tolist() == [0.502021189821688, 0.3914336791976073, 0.32832981436770614]


def test_golden_seeds() -> None:
    assert [mix(), mix(0), mix(0, 0), mix(1, 2), mix(2, 1), mix(-1)] == [
        12035550249420947055,
        7434303198761161278,
        7837772200849413355,
        2453250398285392783,
        451343805861447041,
        1608115468372935206,
    ]
    assert _splitmix(0) == 0xE220A8397B1DCDAF  # the first output of the reference implementation, seed 0


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65_537, 300_000])
def test_permute_is_a_bijection(size: int) -> None:
    for seed in (0, 1, 2**63):
        moved = permute(np.arange(size), size, seed)
        assert moved.dtype == np.int64
        assert np.array_equal(np.sort(moved), np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_permute_is_random_access_at_any_size(size: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True))
    moved = permute(np.array(indices), size, seed)
    assert moved.min() >= 0
    assert moved.max() < size
    assert len(set(moved.tolist())) == len(indices)
    assert [int(permute(np.array(index), size, seed)) for index in indices] == moved.tolist()


def test_permute_scatters() -> None:
    """Neighbours move apart and nobody has a favourite place, at large sizes and at small ones."""
    moved = permute(np.arange(100_000), 100_000, seed=4)
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), moved)[0, 1]) < 0.02
    for size in (2, 3, 5, 8, 300):
        places = np.stack([permute(np.arange(size), size, seed) for seed in range(500)])
        halves = np.stack([np.bincount(places[:, index] * 2 // size, minlength=2) for index in range(size)])
        expected = np.bincount(np.arange(size) * 2 // size) * 500 / size
        assert np.all(np.abs(halves / expected - 1) < 0.25)


def test_permute_refuses_what_is_out_of_range() -> None:
    for size in (0, 2**62 + 1):
        with pytest.raises(ValueError, match="expected 1 to 2"):
            permute(np.array([0]), size, seed=0)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            permute(np.array([index]), 10, seed=0)
    assert permute(np.zeros(0, np.int64), 10, seed=0).shape == (0,)

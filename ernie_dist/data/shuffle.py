"""Random-access shuffling and sub-seeds, from splitmix64 alone.

No numpy.random: the order of a run must not change with the version of a library.
"""

from __future__ import annotations

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 / golden ratio, odd
_ROUND_PAIRS = 4  # eight Feistel rounds
_SMALL = 256  # up to here a table is faster, and fairer: halves of two bits make some places favourites


def mix(*values: int) -> int:
    """Hash integers (each taken modulo 2**64) into a seed, 0 <= seed < 2**64.

    Order and number of the values count. The same in every process, on every machine and Python version.
    """
    state = 0
    for value in (len(values), *values):
        state = _splitmix((state ^ _splitmix(int(value) & _MASK)) & _MASK)
    return state


def uniform(count: int, seed: int) -> np.ndarray:
    """float64 [count] in [0, 1): the first `count` values of the splitmix64 stream of a seed."""
    states = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed & _MASK)
    bits: np.ndarray = _splitmix_array(states) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def permute(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where a seeded shuffle of range(size) puts each index: a bijection on range(size), without a table of it.

    `indices` are integers of any shape, 0 <= index < size; the result is int64 of the same shape. Time and memory are
    O(len(indices)) for any size from 1 to 2**62. Above a few hundred, a Feistel network on the fewest bits that hold
    `size`, walked until it is back in range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Raises ValueError for such a size, IndexError for an index out of range.
    """
    if not 1 <= size <= 2**62:
        raise ValueError(f"size is {size}, expected 1 to 2**62")
    indices = np.asarray(indices)
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise IndexError(f"indices {indices.min()} to {indices.max()} are not all in range({size})")
    if size <= _SMALL:
        table = np.argsort(uniform(size, mix(seed)), kind="stable")
        return table[indices.astype(np.int64).ravel()].reshape(indices.shape)
    bits = (size - 1).bit_length()
    keys = [np.uint64(mix(seed, number)) for number in range(2 * _ROUND_PAIRS)]
    values = indices.astype(np.uint64).ravel()
    outside = np.arange(values.size)
    while outside.size:  # each turn brings more than half of them home
        walked = _feistel(values[outside], bits, keys)
        values[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return values.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """uint64 [n] below 2**bits -> the same; each half in turn is changed by a hash of the other alone."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        low = low ^ (_splitmix_array(high ^ even) & low_mask)
        high = high ^ (_splitmix_array(low ^ odd) & high_mask)
    return (high << low_bits) | low


def _splitmix(state: int) -> int:
    """One output of splitmix64 (Steele, Lea and Flood 2014; constants of Stafford's variant 13)."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _splitmix_array(states: np.ndarray) -> np.ndarray:
    """`_splitmix` of each element, uint64 [n]; arrays only, because numpy warns when a scalar wraps around."""
    z = states + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

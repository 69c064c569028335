"""tokens_per_batch <-> micro-batches and accumulation. Refuses what does not divide; never rounds.

tokens_per_batch = sequence_length x micro_batch_size x gradient_accumulation_steps x data_parallel_size
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is cut. The first two do not depend on the number of ranks."""

    tokens_per_batch: int
    global_batch_size: int
    """sequences per optimizer step, whole world"""
    sequences_per_rank: int
    micro_batch_size: int
    """sequences per rank and forward pass"""
    gradient_accumulation_steps: int


def solve(tokens_per_batch: int, sequence_length: int, micro_batch_size: int, world_size: int) -> BatchPlan:
    """Cuts a batch over `world_size` ranks. `micro_batch_size` is an upper bound.

    Raises ValueError that names the numbers that would do.
    """
    if tokens_per_batch % sequence_length:
        below, above = _around(tokens_per_batch, sequence_length * world_size)
        raise ValueError(
            f"tokens_per_batch {tokens_per_batch:,} is not a whole number of sequences of {sequence_length:,} tokens; "
            f"nearest for {world_size} rank(s): {below}{above:,}"
        )
    sequences = tokens_per_batch // sequence_length
    if sequences % world_size:
        below, above = _around(tokens_per_batch, sequence_length * world_size)
        ranks = ", ".join(str(count) for count in _divisors(sequences) if count <= 4 * world_size)
        raise ValueError(
            f"a batch of {sequences:,} sequences ({tokens_per_batch:,} tokens / {sequence_length:,}) "
            f"cannot be dealt to {world_size} ranks; use {ranks} ranks, or tokens_per_batch {below}{above:,}"
        )
    per_rank = sequences // world_size
    micro = min(micro_batch_size, per_rank)
    if per_rank % micro:
        possible = ", ".join(str(size) for size in _divisors(per_rank))
        raise ValueError(
            f"micro_batch_size {micro_batch_size} does not divide the {per_rank} sequences of each of {world_size} "
            f"rank(s); possible: {possible}"
        )
    return BatchPlan(tokens_per_batch, sequences, per_rank, micro, per_rank // micro)


def _around(value: int, unit: int) -> tuple[str, int]:
    below = value // unit * unit
    return (f"{below:,} or " if below else ""), below + unit


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0] if number <= 100_000 else [1, number]

"""Rank facts, read once from the environment that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        return cls(
            rank=int(environment.get("RANK", 0)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            size=int(environment.get("WORLD_SIZE", 1)),
        )

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes what exists once."""
        return self.rank == 0

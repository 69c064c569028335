"""Rank facts, read once from the environment that torchrun sets, and the few things ranks agree on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ernie_dist.spec.errors import EnvironmentProblem


@dataclass(frozen=True)
class World:
    """This process among all ranks. With one rank nothing is ever communicated."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    node_rank: int = 0
    node: str = ""
    """what the scheduler calls this node, or its host name"""
    group: Any = None
    """torch's process group, None for the one that `connect` makes"""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        return cls(
            rank=int(environment.get("RANK", 0)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            size=int(environment.get("WORLD_SIZE", 1)),
            node_rank=int(environment.get("GROUP_RANK", 0)),
            node=environment.get("ERNIE_NODE") or socket.gethostname(),
        )

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes what exists once."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def connect(self, timeout: timedelta = timedelta(hours=2)) -> None:
        """Joins the process group: gloo for host tensors, NCCL for a GPU's."""
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise EnvironmentProblem(
                    f"{torch.cuda.device_count()} GPU(s) here, and local rank {self.local_rank} wants one of its own; "
                    "lower resources.gpus_per_node or give --ranks"
                )
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=timeout)

    def apart(self, timeout: timedelta = timedelta(hours=12)) -> World:
        """The same ranks with a channel of their own, for a thread: host tensors only. Collective."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`sum` that goes on while other work is done: call what it returns to wait for the result."""
        if self.size == 1:
            return lambda: tensor
        under_way = dist.all_reduce(tensor, group=self.group, async_op=True)

        def finished() -> torch.Tensor:
            under_way.wait()
            return tensor

        return finished

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. The same answer on all."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))).item())

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any(False)

    def close(self) -> None:
        """Ends the channel of `apart`; of the world itself, all of them."""
        if dist.is_initialized():
            dist.destroy_process_group(self.group)

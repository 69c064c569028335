"""The nodes of a Ray cluster: which there are, which are about to go, and how an attempt gets some of them."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ernie_dist.spec.errors import EnvironmentProblem
from ernie_dist.spec.resources import ResourcesSpec

_FEWER = 10.0
"""seconds to wait for a number of nodes that is said to be there"""
_SAY_AFTER, _SAY_EVERY = 5.0, 60.0
NODE_ID = "ray.io/node-id"
"""a label that every node has"""


def connect() -> None:
    """Joins the cluster that this process runs in, unless it has. Raises EnvironmentProblem if there is none."""
    if ray.is_initialized():
        return
    before = signal.getsignal(signal.SIGTERM)  # Ray would put its own there, and a stop would end us at once
    try:
        ray.init(address="auto", logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise EnvironmentProblem(
            f"no Ray cluster can be joined from here: {reason}. On a node of the cluster, set its RAY_AUTH_MODE and "
            "token; from elsewhere give --address http://HEAD:8265"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Request:
    """What an attempt wants of each node."""

    bundle: dict[str, float]
    labels: dict[str, str]
    without: frozenset[str]
    """names of nodes that are not fit"""

    @classmethod
    def of(cls, resources: ResourcesSpec, without: Collection[str] = ()) -> Request:
        """GPUs are asked for where the job wants them, or else the cluster has any: without them ranks are on CPUs."""
        ranks = resources.gpus_per_node
        bundle = {"CPU": float(resources.ray.cpus_per_node or ranks)}
        wanted = resources.ray.gpus
        if wanted is None:
            wanted = any(node["Resources"].get("GPU") for node in _alive())
        if wanted:
            bundle["GPU"] = float(ranks)
        return cls(bundle, dict(resources.ray.labels), frozenset(without))

    def candidates(self) -> list[str]:
        """Names of the nodes that would do, busy or not."""
        leaving = draining()
        return sorted(
            node["NodeName"]
            for node in _alive()
            if node["NodeName"] not in self.without
            and node["NodeID"] not in leaving
            and all(node["Resources"].get(name, 0) >= amount for name, amount in self.bundle.items())
            and all(node["Labels"].get(name) == value for name, value in self.labels.items() if _is_plain(value))
        )

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.bundle.items()]
        parts += [f"{name}={value}" for name, value in self.labels.items()]
        return " and ".join(parts)

    def selector(self) -> dict[str, str]:
        """The labels, as Ray wants them."""
        unfit = [node["NodeID"] for node in _alive() if node["NodeName"] in self.without]
        return {**self.labels, **({NODE_ID: f"!in({','.join(unfit)})"} if unfit else {})}


@contextmanager
def placed(
    request: Request,
    sizes: Sequence[int],
    patience: float,
    end_now: Callable[[], bool],
    say: Callable[[str], None],
) -> Iterator[PlacementGroup | None]:
    """A group of one bundle per node on as many nodes as can be had, given back at the end.

    sizes: numbers of nodes that would do, the best first; it is waited for during `patience` seconds. Gives None if
    end_now() said so. Raises EnvironmentProblem if no number of nodes can be had.
    """
    group: PlacementGroup | None = None
    try:
        for size in sizes:
            if size != sizes[0] and size > len(request.candidates()):
                continue
            group = placement_group(
                [request.bundle] * size,
                strategy="STRICT_SPREAD",
                bundle_label_selector=[request.selector()] * size if request.selector() else None,
            )
            say_at = time.monotonic() + _SAY_AFTER
            until = time.monotonic() + (patience if size == sizes[0] else _FEWER)
            while not group.wait(timeout_seconds=0.5):
                if end_now():
                    yield None
                    return
                now = time.monotonic()
                if now >= until:
                    break
                if now >= say_at:
                    say(f"waiting up to {until - now:.0f} s for {_lack(request, size)}")
                    say_at = now + _SAY_EVERY
            else:
                if size != sizes[0]:
                    say(f"going on with {size} of {sizes[0]} nodes, since {_lack(request, sizes[0])}")
                yield group
                return
            remove_placement_group(group)
            group = None
        wanted = " or ".join(map(str, sizes))
        raise EnvironmentProblem(f"{wanted} node(s) cannot be had: {_lack(request, sizes[-1])}")
    finally:
        if group is not None:
            remove_placement_group(group)


def draining() -> dict[str, float | None]:
    """Ids of the nodes that are to be taken away, and when: seconds since the epoch, None if nobody says."""
    # Ray's own libraries take it from here too: there is no public name for it.
    found = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 if deadline else None for node, deadline in found.items()}


def name_of(node_id: str) -> str:
    """What the cluster calls a node: `ray start --node-name`, or else its address."""
    return next((node["NodeName"] for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def _is_plain(value: str) -> bool:
    """Whether a label has to be just so; Ray also takes `!x`, `in(x,y)` and `!in(x,y)`."""
    return not value.startswith(("!", "in("))


def _lack(request: Request, size: int) -> str:
    there = request.candidates()
    unfit = f", {', '.join(sorted(request.without))} left out as not fit" if request.without else ""
    what = "they are busy" if len(there) >= size else f"{size - len(there)} missing"
    return f"{size} node(s) with {request} each: {len(there)} there ({', '.join(there) or 'none'}){unfit}; {what}"


def _alive() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]

"""Before a model is built: do all ranks reach each other, see the same files and run the same versions? Who does not?

facts of each rank --gather--> who differs -> files that one node writes and another reads -> all-reduce, timed
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from ernie_dist.events.event import Preflight
from ernie_dist.spec.errors import PreflightFailed
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.world import World

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 90.0
"""for a file to be seen on another node: NFS clients believe for up to 60 s what they have seen (acregmax, acdirmax)"""
_PACKAGES = ("torch", "deepspeed", "transformers", "ernie_dist")
_SKEW_SECONDS = 60.0
"""time limits and notices are times of day, given by one machine and read by another"""
_IN_USE = 0.1
"""share of a GPU's memory that may be in use before we begin: contexts, and what a display takes"""
_LEAVING_SECONDS = 60.0
"""for processes of an attempt before to be gone from a GPU"""
_SMALL, _LARGE_CPU, _LARGE_GPU = 1, 1 << 18, 1 << 26
"""elements of 4 bytes that are added up: for the latency, and for the bandwidth"""
_REPEATS = 5

Places = Sequence[tuple[int, str]]
"""of each rank: number and name of its node"""


def preflight(files: RunFiles, attempt: int, world: World) -> Preflight:
    """Collective, after `world.connect`. With one rank there is nothing to compare.

    Raises PreflightFailed on all ranks if a node is not fit; its file in the attempt's folder says `unhealthy` then.
    """
    begun = time.monotonic()
    if world.size == 1:
        _warn_of_company(world)
        return Preflight(attempt, (world.node,), time.monotonic() - begun)
    host = world.apart(timedelta(minutes=10))
    flight = _Flight(files, attempt, world, host)
    for look in (flight.facts, flight.clocks, flight.shared_files, flight.memory):
        flight.refuse(look())
    latency, bandwidth = flight.all_reduce()
    host.close()
    return Preflight(attempt, tuple(flight.names.values()), time.monotonic() - begun, latency, bandwidth)


class _Flight:
    """What all ranks do together. Each look is collective: node -> what is wrong with it, the same on all ranks."""

    def __init__(self, files: RunFiles, attempt: int, world: World, host: World) -> None:
        """host: a channel for host tensors; `world` would connect GPUs, which comes last."""
        self._files, self._attempt, self._world, self._host = files, attempt, world, host
        self._places: Places = host.gather((world.node_rank, world.node))
        self.names = dict(self._places)

    def facts(self) -> dict[int, str]:
        """Versions, the job, the kind of device."""
        job = self._files.job
        try:
            digest = hashlib.sha256(job.read_bytes()).hexdigest()[:12]
        except OSError as error:
            digest = f"unreadable ({error.strerror})"
        versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
        facts = {**versions, str(job): digest, "device": self._world.device.type}
        return differing(self._host.gather(facts), self._places)

    def clocks(self) -> dict[int, str]:
        self._host.barrier()
        return wrong_clocks(self._host.gather(time.time()), self._places)

    def shared_files(self) -> dict[int, str]:
        """Rank 0 writes, the first rank of every node reads that and writes, rank 0 reads what they wrote."""
        if len(self.names) == 1:
            return {}
        world, host, folder = self._world, self._host, self._files.attempt(self._attempt) / "preflight"
        token = host.from_main(secrets.token_hex())
        if problem := host.from_main(_write(folder / "token", token) if world.is_main else ""):
            return {self._places[0][0]: problem}
        own = ""
        if world.local_rank == 0:
            until = time.monotonic() + PATIENCE_SECONDS
            own = _unseen(folder / "token", token, until) or _write(folder / f"node_{world.node_rank:04d}", token)
        found = self._by_node(own)
        if world.is_main:
            until = time.monotonic() + PATIENCE_SECONDS
            for node in sorted(self.names.keys() - found.keys()):
                if problem := _unseen(folder / f"node_{node:04d}", token, until):
                    found[node] = f"what it writes does not reach node {world.node}: {problem}"
            shutil.rmtree(folder, ignore_errors=True)
        return host.from_main(found)

    def memory(self) -> dict[int, str]:
        """On one node only a warning: at a desk a GPU may be shared on purpose."""
        if len(self.names) == 1:
            _warn_of_company(self._world)
            return {}
        until = time.monotonic() + _LEAVING_SECONDS
        while (problem := _company(self._world)) and time.monotonic() < until:
            time.sleep(1)
        return self._by_node(problem)

    def all_reduce(self) -> tuple[float, float]:
        """Seconds for one number, and bus bandwidth in bytes/s for a large tensor. Raises PreflightFailed.

        Bus bandwidth as nccl-tests define it, size / time x 2 (n - 1) / n: it can be held against the hardware's,
        whatever the number of ranks (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
        """
        world = self._world
        large = _LARGE_GPU if world.device.type == "cuda" else _LARGE_CPU
        try:
            (latency, right), (seconds, right_too) = self._timed(_SMALL), self._timed(large)
        except RuntimeError as error:
            raise PreflightFailed(
                f"{world.size} ranks on {', '.join(self.names.values())} cannot add up a number together: "
                f"{str(error).splitlines()[0]}; NCCL_SOCKET_IFNAME, NCCL_IB_HCA and GLOO_SOCKET_IFNAME say which "
                "network to use, NCCL_DEBUG=INFO makes NCCL say more"
            ) from error
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        wrong = "" if right and right_too else "a sum over all ranks is wrong there; suspect its GPU, memory or network"
        self.refuse(self._by_node(wrong))
        return self._host.from_main((latency, 4 * large / seconds * 2 * (world.size - 1) / world.size))

    def refuse(self, found: Mapping[int, str]) -> None:
        """Raises PreflightFailed if a node was found; what is wrong with it is in its file by then."""
        if not found:
            return
        fit = [rank for rank, (node, _) in enumerate(self._places) if node not in found]
        if self._world.rank == min(fit, default=0):  # who does not see the folder cannot tell
            for node, problem in found.items():
                self._record(node, problem)
        self._host.barrier()  # a rank that ends takes the others with it
        raise PreflightFailed("; ".join(f"node {self.names[node]} is not fit: {found[node]}" for node in sorted(found)))

    def _record(self, node: int, problem: str) -> None:
        path, known = self._files.node(self._attempt, node), {}
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
        content = {"host": self.names[node], **known, "unhealthy": problem}
        aside = path.with_suffix(".tmp")
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            aside.replace(path)

    def _by_node(self, problem: str) -> dict[int, str]:
        """Each rank gives its own problem, "" for none."""
        every = self._host.gather(problem)
        return {node: problem for (node, _), problem in zip(self._places, every, strict=True) if problem}

    def _timed(self, elements: int) -> tuple[float, bool]:
        """Median seconds, and whether every sum was right. The first one connects, and is not timed."""
        world, seconds, right = self._world, [], True
        for _ in range(1 + _REPEATS):
            tensor = torch.full((elements,), world.rank + 1.0, device=world.device)
            self._host.barrier()
            begun = _now(world)
            dist.all_reduce(tensor)
            seconds.append(_now(world) - begun)
            right = right and bool((tensor == world.size * (world.size + 1) / 2).all())
        return statistics.median(seconds[1:]), right


def differing(every: Sequence[Mapping[str, str]], places: Places) -> dict[int, str]:
    """Facts of each rank -> node -> in what it differs from most ranks; from rank 0 where no value is that of most."""
    found: dict[int, str] = {}
    for name, first in every[0].items():
        value, count = Counter(facts[name] for facts in every).most_common(1)[0]
        usual = value if 2 * count > len(every) else first
        for (node, _), facts in zip(places, every, strict=True):
            if facts[name] != usual:
                found.setdefault(node, f"{name} is {facts[name]} there and {usual} elsewhere")
    return found


def wrong_clocks(clocks: Sequence[float], places: Places) -> dict[int, str]:
    """Time of each rank at one moment -> node -> how far off it is: from the median, of two nodes from rank 0's."""
    right = statistics.median(clocks) if len(dict(places)) > 2 else clocks[0]
    off = {node: clock - right for (node, _), clock in zip(places, clocks, strict=True)}
    return {
        node: f"its clock is {abs(by):.0f} s {'ahead' if by > 0 else 'behind'}, {_SKEW_SECONDS:.0f} s are allowed; "
        "set it (chronyc makestep)"
        for node, by in off.items()
        if abs(by) > _SKEW_SECONDS
    }


def _write(path: Path, text: str) -> str:
    """Why it cannot be written; "" if it has been."""
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"{path} cannot be written there: {error.strerror}"
    return ""


def _unseen(path: Path, text: str, until: float) -> str:
    """Why the file does not come to be seen as another node wrote it; "" as soon as it is."""
    while True:
        try:
            list(path.parent.iterdir())  # makes an NFS client look again at what it takes to be missing
            problem = "" if path.read_text(encoding="utf-8") == text else "other content"
        except OSError as error:
            problem = str(error.strerror)
        if not problem:
            return ""
        if time.monotonic() > until:
            return (
                f"{path} was written on another node and is not seen ({problem}); the run directory has to be on a "
                "file system that all nodes share: mount it there, or give another --run-dir"
            )
        time.sleep(0.1)


def _warn_of_company(world: World) -> None:
    if problem := _company(world):
        log.warning("%s", problem)


def _company(world: World) -> str:
    """Who else uses this rank's GPU, judged by its memory; "" on a CPU."""
    if world.device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(world.device)
    if total - free <= _IN_USE * total:
        return ""
    used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
    return (
        f"of GPU {world.local_rank} {used} are in use before we begin; "
        f"{_IN_USE:.0%} are allowed, nvidia-smi shows the processes to end"
    )


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()

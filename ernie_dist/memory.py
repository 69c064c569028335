"""How much memory this rank held at most: of a GPU what torch's allocator handed out, of a CPU what was resident.

a phase ends --> its peak, kept if none was higher --all ranks--> the fullest rank of each phase
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

import torch

from ernie_dist.world import World


class Memory(Protocol):
    """Bytes of one rank."""

    process: int
    """taken when this object was made, also by what torch does not count"""
    device: int
    """there are, for all that share them"""

    def now(self) -> int:
        """Held at this moment."""
        ...

    def begin(self) -> None:
        """The peak is counted from here."""
        ...

    def peak(self) -> int:
        """Most that was held since."""
        ...


def memory_of(device: torch.device) -> Memory:
    return CudaMemory() if device.type == "cuda" else HostMemory()


class HostMemory:
    """Resident memory of this process, less what files mapped into it take: libraries page in as they are used."""

    def __init__(self) -> None:
        self.process = _status("VmRSS")
        self.device = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def now(self) -> int:
        return _status("RssAnon")

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        return _status("VmHWM") - _status("RssFile")


class CudaMemory:
    """What torch's allocator handed out."""

    def __init__(self) -> None:
        free, self.device = torch.cuda.mem_get_info()
        self.process = self.device - free

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class Peaks:
    """The most that each phase of an attempt took, on this rank and on the fullest one."""

    def __init__(self, world: World) -> None:
        self._world, self._memory = world, memory_of(world.device)
        self._most: dict[str, int] = {}
        self._counts = True
        self._begin()

    @property
    def device(self) -> int:
        """Bytes of this rank's GPU; of a CPU, of the machine that ranks share."""
        return self._memory.device

    def ended(self, phase: str) -> None:
        """A phase is over, and the next one begins."""
        if self._counts:
            self._most[phase] = max(self._most.get(phase, 0), self._memory.peak())
            self._begin()

    def fullest(self) -> dict[str, tuple[int, int]]:
        """Phase -> bytes on the rank that held most in it, and its number. Collective."""
        ranks = self._world.gather(self._most)
        held: dict[str, list[tuple[int, int]]] = {}
        for rank, most in enumerate(ranks):
            for phase, size in most.items():
                held.setdefault(phase, []).append((size, rank))
        return {phase: max(sizes, key=lambda one: one[0]) for phase, sizes in held.items()}

    def _begin(self) -> None:
        try:
            self._memory.begin()
        except OSError:  # a sandbox without clear_refs: what is not known is not told
            self._counts = False


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), flags=re.M)
    assert found
    return 1024 * int(found[1])

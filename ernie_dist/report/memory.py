"""What the phases of a run took at most, on the fullest rank of any attempt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PHASES = {
    "start": "building model and engine, reading a checkpoint",
    "step": "steps of {}",
    "evaluate": "held-out losses, references of pairs",
    "save": "copying the state for a checkpoint",
    "export": "writing the model",
}


@dataclass(frozen=True)
class Held:
    """The most that one phase took."""

    what: str
    bytes: int
    """of a GPU what torch's allocator handed out, of a CPU rank what was resident, mapped files left out"""
    rank: int
    attempt: int
    share: float
    """of the GPU, or of the machine that CPU ranks share"""


def memory_held(events: list[dict[str, Any]]) -> list[Held]:
    """In the order of a run; phases that take next to nothing of their own are left out."""
    most: dict[str, Held] = {}
    for event in events:
        if event["event"] != "MemoryPeaks":
            continue
        for phase, (size, rank) in event["peaks"].items():
            kind, _, stage = phase.partition("/")
            if kind in _PHASES and (phase not in most or size > most[phase].bytes):
                what = _PHASES[kind].format(stage)
                most[phase] = Held(what, size, rank, event["attempt"], size / event["device_bytes"])
    return [most[phase] for kind in _PHASES for phase in most if phase.partition("/")[0] == kind]

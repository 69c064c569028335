"""What every launcher can do: get nodes, and have each of them run the node command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ernie_dist.spec.resources import ResourcesSpec

FINISHED, WRONG, STOPPED, CRASHED = 0, 2, 75, 1
"""exit codes: done; the job or its data is wrong, do not retry; stopped on request, resumable; anything else"""


@dataclass(frozen=True)
class Attempt:
    """What a launcher needs to know to start one attempt."""

    run_dir: Path
    number: int
    resources: ResourcesSpec
    deadline: float | None = None
    """when it has to be over, in seconds since the epoch"""


class Launcher(Protocol):
    def render(self, attempt: Attempt) -> str:
        """The script that starts the attempt: pure, readable, and runnable again by hand."""
        ...

    def run(self, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        """Starts the attempt and waits for it. Returns its own exit code, negative for a signal.

        end_now: asked every half second or so; whether to kill the attempt at once. If it raises, the attempt is killed
        too. How the attempt ended, and why, is read from the files it leaves.
        """
        ...

"""What every launcher can do: have each node that there is run the node command, and say when there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


class Launcher(ABC):
    """Starts attempts on the nodes it has."""

    name: str

    deadline: float | None = None
    """when the nodes are taken away, in seconds since the epoch; None if nobody takes them"""

    @abstractmethod
    def render(self, attempt: Attempt) -> str:
        """The script that starts the attempt: pure, readable, and runnable again by hand."""

    @abstractmethod
    def run(self, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        """Starts the attempt and waits for it. Returns its own exit code, negative for a signal.

        end_now: asked every half second or so; whether to kill the attempt at once. If it raises, the attempt is killed
        too. How the attempt ended, and why, is read from the files it leaves.
        """

    def notice(self) -> float | None:
        """Seconds until the nodes are gone, asked when a signal has come; None if nobody says."""
        return None

    def unfit(self) -> str:
        """Why no further attempt can be started on the nodes there are, asked after each; "" if one can."""
        return ""

"""What each start of a run did and how it ended, and which ranks were slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.events.wording import network_text


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    number: int
    time: float
    from_step: int
    last_step: int
    steps: int
    """steps it executed"""
    world_size: int
    device: str
    engine: str
    parameters: int
    versions: dict[str, str]
    nodes: tuple[str, ...]
    """their names; none where the attempt is older than the preflight"""
    network: str
    """what the preflight measured; "" with one rank"""
    restored_from: str | None
    outcome: str
    """finished, stopped, failed, hung, killed; of the last one without a word: running or killed"""
    detail: str


@dataclass(frozen=True)
class SlowRank:
    """A rank that was longer busy than the others."""

    rank: int
    windows: int
    """of 16 steps, in which it was slower than the job's watchdog.straggler allows"""
    measured: int
    """windows of the whole run"""
    worst: float
    """busy time over the median of the others'"""
    worst_step: int


def attempts_of(events: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[Attempt]:
    """The starts of a run in order. `lines`: all of metrics.jsonl."""
    executed: dict[int, list[int]] = {}
    for line in lines:
        executed.setdefault(line["attempt"], []).append(line["step"])
    starts = [index for index, event in enumerate(events) if event["event"] == "AttemptStarted"]
    attempts = []
    for begin, end in itertools.pairwise([*starts, len(events)]):
        start, rest = events[begin], events[begin + 1 : end]
        outcome, detail = _outcome(rest)
        if not outcome:  # it left no last word
            outcome = "running or killed" if end == len(events) else "killed"
        restored, looked = (_of_attempt(events, start["attempt"], kind) for kind in ("Restored", "Preflight"))
        steps = executed.get(start["attempt"], [])
        attempts.append(
            Attempt(
                number=start["attempt"],
                time=start["time"],
                from_step=start["step"],
                last_step=max(steps, default=start["step"]),
                steps=len(steps),
                world_size=start["world_size"],
                device=start["device"],
                engine=start["engine"],
                parameters=start["parameters"],
                versions=start["versions"],
                nodes=tuple(looked["nodes"]) if looked else (),
                network=network_text(looked["latency"], looked["bandwidth"]) if looked and looked["latency"] else "",
                restored_from=Path(restored["checkpoint"]).name if restored else None,
                outcome=outcome,
                detail=detail,
            )
        )
    return attempts


def _of_attempt(events: list[dict[str, Any]], attempt: int, kind: str) -> dict[str, Any] | None:
    return next((event for event in events if event["event"] == kind and event["attempt"] == attempt), None)


def _outcome(events: list[dict[str, Any]]) -> tuple[str, str]:
    for event in reversed(events):
        if event["event"] == "Finished":
            return "finished", ""
        if event["event"] == "Stopped":
            return "stopped", event["reason"]
        if event["event"] == "HangDetected":
            return "hung", event["message"]
        if event["event"] == "Failed":
            return "failed", f"rank {event['rank']}: {event['kind']}: {event['message']}"
    return "", ""


def slow_ranks(lines: Sequence[dict[str, Any]], threshold: float) -> list[SlowRank]:
    """Ranks that passed the threshold at some time, the most frequent first."""
    measured = [line for line in lines if line.get("rank_imbalance") is not None]
    slow: dict[int, list[dict[str, Any]]] = {}
    for line in measured:
        if line["rank_imbalance"] >= threshold:
            slow.setdefault(line["slowest_rank"], []).append(line)
    found = []
    for rank, own in slow.items():
        worst = max(own, key=lambda line: line["rank_imbalance"])
        found.append(SlowRank(rank, len(own), len(measured), worst["rank_imbalance"], worst["step"]))
    return sorted(found, key=lambda one: -one.windows)

"""Where the wall time of a run went: into steps that counted, or elsewhere.

launch.json of the attempts, metrics.jsonl, events.jsonl -> seconds of each part; together they are the wall time
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ernie_dist.events.history import read_all_attempts, read_events
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles

PARTS = {
    "steps": "steps that counted",
    "start-up": "from each launch to its first step: processes, imports, model, connecting",
    "restore": "reading checkpoints",
    "evaluation": "held-out losses",
    "save": "saving, as far as steps wait for it",
    "export": "writing the model",
    "lost": "steps executed again, and what a crash or hang cut off",
    "waiting": "between two attempts",
    "other": "the rest",
}
_PHASES = {"evaluate": "evaluation", "save": "save", "export": "export"}


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the wall time that went into steps that counted, 0 to 1."""
    wall = math.fsum(seconds.values())
    return seconds.get("steps", 0.0) / wall if wall > 0 else 0.0


def step_seconds(line: Mapping[str, Any], batch_tokens: Mapping[str, int]) -> float:
    """How long the step of a line of metrics.jsonl took; `batch_tokens`: stage -> tokens_per_batch."""
    speed = line["tokens_per_second"]
    return batch_tokens.get(line["stage"], 0) / speed if speed > 0 else 0.0


def time_spent(
    launches: Sequence[float],
    lines: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    batch_tokens: Mapping[str, int],
) -> dict[str, float]:
    """Seconds of each of PARTS.

    launches: when each attempt was launched, in order; lines: all of metrics.jsonl, also steps executed twice.
    """
    spent = dict.fromkeys(PARTS, 0.0)
    started = [event["time"] for event in events if event["event"] == "AttemptStarted"]
    launches = sorted(launches) or started
    counting: dict[int, int] = {}
    for number, line in enumerate(lines):
        known = counting.get(line["step"])
        if known is None or line["attempt"] >= lines[known]["attempt"]:
            counting[line["step"]] = number
    marked = [({**line, "counts": counting[line["step"]] == number}) for number, line in enumerate(lines)]
    records: list[list[Mapping[str, Any]]] = [[] for _ in launches]
    for record in sorted((*marked, *events), key=lambda record: record["time"]):
        attempt = bisect_right(launches, record["time"]) - 1
        if attempt >= 0:
            records[attempt].append(record)
    before = None
    for launch, own in zip(launches, records, strict=True):
        if before is not None:
            spent["waiting"] += launch - before
        _add_attempt(spent, launch, own, batch_tokens)
        before = own[-1]["time"] if own else launch
    return spent


def _add_attempt(
    spent: dict[str, float], launch: float, records: Sequence[Mapping[str, Any]], batch_tokens: Mapping[str, int]
) -> None:
    if not records:
        return
    end = records[-1]["time"]
    own = dict.fromkeys(PARTS, 0.0)
    begun, last = None, launch  # of the first thing that follows start-up; end of the last thing that was completed
    for record in records:
        kind = record.get("event")
        if kind == "Restored":
            own["restore"] += record["seconds"]
        elif kind == "PhaseEnded" and record["phase"] == "start":
            begun = record["time"]
        elif kind == "PhaseEnded" and record["phase"] in _PHASES:
            own[_PHASES[record["phase"]]] += record["seconds"]
        elif kind is None:
            seconds = step_seconds(record, batch_tokens)
            own["steps" if record["counts"] else "lost"] += seconds
            begun = record["time"] - seconds if begun is None else begun
        if kind not in ("HangDetected", "Failed", "TimeSpent"):
            last = record["time"]
    begun = end if begun is None else max(launch, begun)
    own["start-up"] = max(0.0, begun - launch - own["restore"])
    if any(record.get("event") in ("HangDetected", "Failed") for record in records) and end > begun:
        own["lost"] += end - max(last, begun)
    own["other"] = max(0.0, end - launch - math.fsum(own.values()))
    for part, seconds in own.items():
        spent[part] += seconds


def of_run(files: RunFiles, job: ResolvedJob) -> dict[str, float]:
    """Seconds of each of PARTS, of a run directory as it is now."""
    launches = []
    for path in sorted(files.attempts.glob("[0-9]*/launch.json")):
        with suppress(OSError, ValueError, KeyError):
            launches.append(float(json.loads(path.read_text(encoding="utf-8"))["time"]))
    tokens = {stage.name: stage.tokens_per_batch for stage in job.stages}
    return time_spent(launches, read_all_attempts(files.metrics), read_events(files.events), tokens)


def described(seconds: Mapping[str, float], *, least: float = 0.001) -> list[tuple[str, float, float]]:
    """(part, seconds, share of the wall time) of the parts that are not negligible, the steps first."""
    wall = math.fsum(seconds.values())
    rows = [(part, seconds.get(part, 0.0), seconds.get(part, 0.0) / wall) for part in PARTS] if wall > 0 else []
    return [row for row in rows if row[0] == "steps" or row[2] >= least]

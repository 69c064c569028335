"""How the attempts of a run ended, from the files they left; end.json keeps what later files would no longer tell."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ernie_dist.spec.run_files import checkpoint_step, complete_checkpoints
from ernie_dist.spec.stop_file import read as read_stop
from launcher.base import CRASHED, STOPPED
from launcher.restart import AttemptEnd
from launcher.run_dir import RunDir

_SIGTERM, _SIGABRT = 15, 6
_FAILURE = re.compile(r"rank +: (\d+) .*\n +exitcode +: -(\d+) ")
"""a rank that a signal ended, in torchrun's summary"""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    exit_code: int
    message: str = ""
    final: bool = False
    kind: str = ""
    log: Path | None = None
    """where to read more"""


def cause(run_dir: RunDir, attempt: int, returncode: int | None) -> Cause:
    """The ranks' own word, unless a signal ended one of them: then the others fail because of it, and say so wrongly.

    returncode: of the node command, negative for a signal; None if nobody waited for it.
    """
    files = run_dir.files
    unfit = unfit_nodes(run_dir, attempt)
    if unfit:
        said = "; ".join(f"{host}: {why}" for host, why in unfit.items())
        return Cause(CRASHED, f"a node is not fit: {said}", kind="UnfitNode")
    logs = sorted(files.attempt(attempt).glob("node_*.log"))
    text = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    ending = run_dir.ending(attempt)
    victims = (_SIGTERM, _SIGABRT) if ending else (_SIGTERM,)  # NCCL aborts the ranks that lost a neighbour
    killed = [(int(rank), int(number)) for rank, number in _FAILURE.findall(text) if int(number) not in victims]
    if killed and not (ending and ending.get("kind") in ("Hang", "NodeLost")):  # which kill, or lose, whole nodes
        rank, number = killed[0]
        where = _on_node(run_dir, attempt, rank)
        return Cause(CRASHED, f"rank {rank}{where} was killed by signal {number}", log=files.rank_log(attempt, rank))
    if ending is None:
        how = "unseen" if returncode is None else f"exit code {returncode}"
        how = f"signal {-returncode}" if returncode is not None and returncode < 0 else how
        return Cause(CRASHED, f"it ended ({how}) before a rank could say why", log=logs[0] if text else None)
    code = int(ending["exit_code"])
    if "message" not in ending:
        return Cause(code)
    rank = int(ending["rank"])
    where = f"{ending['kind']} in rank {rank}{_on_node(run_dir, attempt, rank)}"
    said = f"{ending['message']} ({where})" if code == CRASHED else ending["message"]
    return Cause(
        code,
        said,
        final=bool(ending.get("final")),
        kind=ending["kind"],
        log=files.rank_log(attempt, rank),
    )


def record_end(run_dir: RunDir, attempt: int, found: Cause) -> AttemptEnd:
    """Writes end.json of an attempt that is over."""
    checkpoints = complete_checkpoints(run_dir.files.checkpoints)
    end = AttemptEnd(
        attempt=attempt,
        exit_code=found.exit_code,
        message=found.message,
        final=found.final,
        kind=found.kind,
        after_step=_last_step(run_dir, attempt),
        checkpoint_before=int(_read(run_dir.files.attempt(attempt) / "launch.json").get("checkpoint", 0)),
        checkpoint=checkpoint_step(checkpoints[0]) if checkpoints else 0,
        again=found.exit_code == STOPPED and _goes_on(run_dir, attempt),
    )
    _write(run_dir, end)
    return end


def mark_given_up(run_dir: RunDir, end: AttemptEnd) -> None:
    """The next launch begins a new count."""
    _write(run_dir, replace(end, given_up=True))


def ends(run_dir: RunDir) -> list[AttemptEnd]:
    """How each attempt ended, in order. One whose launcher was killed with it is judged by what it left behind."""
    found = []
    for attempt in run_dir.attempts():
        content = _read(run_dir.files.end(attempt))
        if content:
            found.append(AttemptEnd(**content))
        elif (run_dir.files.attempt(attempt) / "launch.json").is_file():
            found.append(record_end(run_dir, attempt, cause(run_dir, attempt, None)))
    return found


def has_begun(run_dir: RunDir, attempt: int) -> bool:
    """Whether the attempt has anything to lose: until then its ranks are starting up."""
    return _start(run_dir, attempt) is not None


def nodes(run_dir: RunDir, attempt: int) -> list[dict[str, Any]]:
    """The nodes of an attempt that came up, first one first: {"host", "ranks": [first, last], "unhealthy"}."""
    found = (_read(path) for path in sorted((run_dir.files.node(attempt, 0).parent).glob("*.json")))
    return [node for node in found if "host" in node and "ranks" in node]


def unfit_nodes(run_dir: RunDir, attempt: int) -> dict[str, str]:
    """host -> why no rank should run on it."""
    return {node["host"]: node["unhealthy"] for node in nodes(run_dir, attempt) if "unhealthy" in node}


def _on_node(run_dir: RunDir, attempt: int, rank: int) -> str:
    """ " on n7", where there is more than one node."""
    known = nodes(run_dir, attempt)
    hosts = [node["host"] for node in known if node["ranks"][0] <= rank <= node["ranks"][1]]
    return f" on {hosts[0]}" if hosts and len(known) > 1 else ""


def _goes_on(run_dir: RunDir, attempt: int) -> bool:
    note = read_stop(run_dir.files.signalled(attempt))
    return note is not None and note.again


def last_steps(run_dir: RunDir, count: int) -> list[dict[str, Any]]:
    """Lines of the last steps that were written, without reading the others."""
    lines = (line for line in _backwards(run_dir.files.metrics) if "step" in line)
    return [*itertools.islice(lines, count)][::-1]


def _last_step(run_dir: RunDir, attempt: int) -> int | None:
    start = _start(run_dir, attempt)
    if start is None or not start[1]:
        return None
    for line in _backwards(run_dir.files.metrics):
        if line.get("attempt") == attempt:
            return int(line["step"])
        if line.get("attempt", attempt) < attempt:
            break
    return start[0]


def _start(run_dir: RunDir, attempt: int) -> tuple[int, bool] | None:
    """The step an attempt went on from, and whether it began a stage; None if it did not get that far."""
    stage = False
    for event in _backwards(run_dir.files.events):
        if event.get("event") == "StageStarted":
            stage = True
        if event.get("event") == "AttemptStarted":
            if event["attempt"] <= attempt:
                return (int(event["step"]), stage) if event["attempt"] == attempt else None
            stage = False
    return None


def _backwards(path: Path, block: int = 1 << 16) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, last one first; a torn line is passed over. Reads what is asked for."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position, rest = file.seek(0, 2), b""
        while position > 0:
            first = max(0, position - block)
            file.seek(first)
            lines = (file.read(position - first) + rest).split(b"\n")
            rest = lines[0]
            yield from _objects(reversed(lines[1:]))
            position = first
        yield from _objects([rest])


def _objects(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def _write(run_dir: RunDir, end: AttemptEnd) -> None:
    path = run_dir.files.end(end.attempt)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(end), ensure_ascii=False, indent=1), encoding="utf-8")
    aside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}

"""One rank of one attempt: `python -m ernie_dist RUN_DIR ATTEMPT`, started by torchrun on every node.

Whatever a rank prints goes to its own log; rank 0 keeps the terminal for the console sink. How the attempt ended is a
file, because torchrun reports any exit but 0 as 1: outcome.json if it ended by itself, error.json if a rank failed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import IO

from ernie_dist.garbage import importing
from ernie_dist.heartbeat import Watched
from ernie_dist.spec.errors import ErnieError
from ernie_dist.spec.orphan import die_with_parent
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.stop_file import listen

STOPPED = 75
"""exit code of an attempt that stopped on request and can go on"""


def main() -> int:
    files, attempt, rank = RunFiles(Path(sys.argv[1])), int(sys.argv[2]), int(os.environ.get("RANK", 0))
    die_with_parent()
    listen(files.signalled(attempt))  # before what takes long to import
    console = _take_over_output(files.rank_log(attempt, rank))
    try:
        watched = Watched(files, attempt)
        with importing():
            from ernie_dist.train import train  # torch and the rest: their messages belong in the rank's log
            from ernie_dist.world import World

        world = World.from_environment()
        finished = train(files.root, attempt, world, console, watched.heartbeat)
        if world.is_main:
            outcome = {"exit_code": 0 if finished else STOPPED}
            files.outcome(attempt).write_text(json.dumps(outcome), encoding="utf-8")
        world.close()
        watched.close()
        return 0
    except BaseException as error:
        _leave_error(files, attempt, rank, error)
        raise


def _take_over_output(path: Path) -> IO[str]:
    """Points this process's output, C libraries' included, at its log. Returns the stdout it had before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    console = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return console


def _leave_error(files: RunFiles, attempt: int, rank: int, error: BaseException) -> None:
    """error.json of the first rank that failed; the others fail because of it."""
    code = error.exit_code if isinstance(error, ErnieError) else 1
    message = str(error) or type(error).__name__
    content = {
        "rank": rank,
        "kind": type(error).__name__,
        "message": message,
        "exit_code": code,
        "final": isinstance(error, ErnieError) and error.final,
        "traceback": traceback.format_exc(),
    }
    try:
        with files.error(attempt).open("x", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
    except FileExistsError:
        return
    from ernie_dist.events.event import Failed
    from ernie_dist.events.history import read_metrics
    from ernie_dist.events.jsonl import JsonlSink

    steps = read_metrics(files.metrics)
    JsonlSink(files).handle(Failed(steps[-1]["step"] if steps else 0, rank, type(error).__name__, message))


if __name__ == "__main__":
    sys.exit(main())

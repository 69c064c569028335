"""The launcher for this machine: one node, torchrun, and a person at the terminal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ernie_dist.spec.orphan import die_with_parent
from launcher.base import CRASHED, Attempt
from launcher.node import Nodes, node_command, node_environment
from launcher.run_dir import RunDir

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class LocalLauncher:
    """Runs the node command in a session of its own, so that Ctrl-C reaches us and not the ranks."""

    def render(self, attempt: Attempt) -> str:
        ranks = attempt.resources.gpus_per_node
        variables = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in node_environment(ranks).items())
        command = shlex.join(node_command(attempt.run_dir, attempt.number, Nodes(1, ranks)))
        return f"#!/usr/bin/env bash\nset -euo pipefail\n{variables}\nexec {command}\n"

    def run(self, attempt: Attempt) -> int:
        run_dir = RunDir(attempt.run_dir)
        folder = run_dir.files.attempt(attempt.number)
        (folder / "launch.sh").write_text(self.render(attempt), encoding="utf-8")
        ranks = attempt.resources.gpus_per_node
        with (folder / "node_0000.log").open("wb") as log:
            process = subprocess.Popen(
                node_command(attempt.run_dir, attempt.number, Nodes(1, ranks)),
                env={**os.environ, **node_environment(ranks)},
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            run_dir.files.process(attempt.number).write_text(f"{process.pid}\n", encoding="utf-8")
            with _signals(_Interrupt(run_dir, process).on_signal):
                process.wait()
        ending = run_dir.ending(attempt.number)
        if ending is not None:
            return int(ending["exit_code"]) if "message" not in ending else _explain(run_dir, attempt.number, ending)
        return _explain_silence(run_dir, attempt.number, process.returncode)


class _Interrupt:
    """The first signal asks for a stop with a checkpoint; a second one ends the attempt at once."""

    def __init__(self, run_dir: RunDir, process: subprocess.Popen[bytes]) -> None:
        self._run_dir, self._process, self._asked = run_dir, process, False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            print("\nending at once; the last checkpoint stays", file=sys.stderr, flush=True)
            os.killpg(self._process.pid, signal.SIGKILL)
            return
        self._asked = True
        self._run_dir.files.stop.write_text(f"{signal.Signals(number).name}\n", encoding="utf-8")
        again = "; press Ctrl-C again to end without one" if number == signal.SIGINT else ""
        print(f"\nstopping after this step, with a checkpoint{again}", file=sys.stderr, flush=True)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _explain(run_dir: RunDir, attempt: int, ending: dict[str, object]) -> int:
    """The first error of the rank that failed first, and where to read more."""
    code = int(str(ending["exit_code"]))
    print(f"\nernie: {ending['message']}", file=sys.stderr)
    if code == CRASHED:
        log = run_dir.files.rank_log(attempt, int(str(ending["rank"])))
        print(f"({ending['kind']} in rank {ending['rank']}; its log: {log}; launch again to go on)", file=sys.stderr)
    return code


def _explain_silence(run_dir: RunDir, attempt: int, code: int) -> int:
    """No rank could say what happened: it was killed, or never came up."""
    log = run_dir.files.attempt(attempt) / "node_0000.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    causes = [line.strip() for line in lines if "exitcode" in line or "Signal" in line]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    print(f"\nernie: the attempt ended with {how} before a rank could say why", file=sys.stderr)
    for line in (causes or lines)[-3:]:
        print(f"  {line}", file=sys.stderr)
    print(f"(log: {log}; launch again to go on from the last checkpoint)", file=sys.stderr)
    return CRASHED

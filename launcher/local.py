"""The launcher for this machine: one node, torchrun, and a person at the terminal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ernie_dist.spec.orphan import die_with_parent
from launcher.base import Attempt, Launcher
from launcher.node import Nodes, node_command
from launcher.run_dir import RunDir


class LocalLauncher(Launcher):
    """Runs the node command in a session of its own, so that Ctrl-C reaches us and not the ranks."""

    name = "local"

    def render(self, attempt: Attempt) -> str:
        return f"#!/usr/bin/env bash\nexec {shlex.join(_command(attempt))}\n"

    def run(self, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        run_dir = RunDir(attempt.run_dir)
        folder = run_dir.files.attempt(attempt.number)
        (folder / "launch.sh").write_text(self.render(attempt), encoding="utf-8")
        with open(folder / "node_0000.log", "wb", opener=partial(os.open, mode=0o600)) as log:
            process = subprocess.Popen(
                _command(attempt),
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            run_dir.files.process(attempt.number).write_text(f"{process.pid}\n", encoding="utf-8")
            while not end_now():
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.3)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks go with their parent
                process.wait()
        return process.returncode


def _command(attempt: Attempt) -> list[str]:
    resources = attempt.resources
    return node_command(
        attempt.run_dir,
        attempt.number,
        Nodes(1, resources.gpus_per_node),
        node_rank=0,
        deadline=attempt.deadline,
        health_check=resources.health_check,
    )

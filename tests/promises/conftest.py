"""One small job for all promises, and the means to start it, kill it and read what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ernie_dist.events.history import read_all_attempts, read_metrics
from ernie_dist.spec.run_files import RunFiles
from launcher.quickstart_data import write_data


@dataclass
class Runs:
    """Starts one job in a folder of its own, through the command a person would use."""

    folder: Path

    def command(self, run: str, *overrides: str, ranks: int = 2, restart: bool = False) -> list[str]:
        sets = [part for override in overrides for part in ("--set", override)]
        return [
            *(sys.executable, "-m", "launcher", "launch", "job.yaml"),
            *("--run-dir", run, "--ranks", str(ranks), *sets, *([] if restart else ["--no-restart"])),
        ]

    def start(
        self, run: str, *overrides: str, ranks: int = 2, restart: bool = False, **environment: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(run, *overrides, ranks=ranks, restart=restart),
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, run: str, *overrides: str, ranks: int = 2) -> str:
        """Runs to the end; the output."""
        process = self.start(run, *overrides, ranks=ranks)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        return output

    def files(self, run: str) -> RunFiles:
        return RunFiles(self.folder / run)

    def curve(self, run: str) -> dict[int, tuple[float, float, str]]:
        """step -> loss, grad_norm, batch_hash; of a step written twice the later attempt counts."""
        return {
            line["step"]: (line["loss"], line["grad_norm"], line["batch_hash"])
            for line in read_metrics(self.files(run).metrics)
        }

    def kill_when(self, run: str, process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        """kill -9 to every process of the newest attempt as soon as something has happened."""
        deadline = time.monotonic() + 240
        while not happened():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.002)
        attempt = max(int(path.name) for path in self.files(run).attempts.iterdir())
        os.killpg(int(self.files(run).process(attempt).read_text()), signal.SIGKILL)
        process.communicate(timeout=60)

    def last_attempt(self, run: str) -> int:
        return max((int(path.name) for path in self.files(run).attempts.glob("[0-9]*")), default=0)

    def steps_of(self, run: str, attempt: int) -> list[int]:
        return [line["step"] for line in read_all_attempts(self.files(run).metrics) if line["attempt"] == attempt]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A four-stage job of 44 steps over generated data: the last 8 learn from pairs of answers."""
    folder = tmp_path_factory.mktemp("promises")
    write_data(folder / "data")
    job = yaml.safe_load(Path(__file__).with_name("job.yaml").read_text(encoding="utf-8"))
    (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
    return Runs(folder)


@pytest.fixture(scope="session")
def uninterrupted(runs: Runs) -> dict[int, tuple[float, float, str]]:
    """The curve of the job on two ranks when nothing happens to it."""
    runs.finish("uninterrupted")
    return runs.curve("uninterrupted")

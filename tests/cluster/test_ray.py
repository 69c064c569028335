"""On a real Ray cluster of three nodes: to the end, through lost and leaving nodes, stopped and submitted again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_cluster import RayCluster

from ernie_dist.events.history import read_all_attempts, read_metrics
from ernie_dist.spec.run_files import RunFiles
from launcher import history
from launcher.quickstart_data import write_data
from launcher.run_dir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.distributed]

SECRET = "a-value-that-nobody-may-see"


@dataclass
class Jobs:
    """One job in a folder that all nodes see, and the means to run it and to read what it left."""

    folder: Path
    cluster: RayCluster

    def ernie(self, *words: str, seconds: float = 280, **more: str) -> subprocess.CompletedProcess[str]:
        """On this machine, as a person who has the token but is not in a Ray job."""
        return subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=self.folder,
            env={**self.cluster.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def submit(self, run: str, *sets: str, **variables: str) -> str:
        """With `ray job submit`, from the job's folder; the submission's id."""
        done = self.cluster.ray(
            *("job", "submit", f"--address={self.cluster.dashboard}", "--no-wait", f"--working-dir={self.folder}"),
            *("--runtime-env-json", json.dumps({"env_vars": variables, "excludes": ["runs", "prepared"]})),
            *("--", "python", "-m", "launcher", "launch", "job.yaml", "--on", "ray"),
            *("--run-dir", str(self.folder / run), *sets),
        )
        assert done.returncode == 0, done.stdout
        return re.findall(r"Job '(\S+)' submitted", done.stdout)[0]

    def state(self, submission: str) -> str:
        done = self.cluster.ray("job", "status", f"--address={self.cluster.dashboard}", submission)
        return re.findall(r"PENDING|RUNNING|STOPPED|SUCCEEDED|FAILED", done.stdout.upper())[-1]

    def log(self, submission: str) -> str:
        return self.cluster.ray("job", "logs", f"--address={self.cluster.dashboard}", submission).stdout

    def stop(self, submission: str) -> None:
        self.cluster.ray("job", "stop", f"--address={self.cluster.dashboard}", "--no-wait", submission)

    def wait(self, submission: str, seconds: float = 200) -> str:
        """Until it is over; how it ended."""
        until = time.monotonic() + seconds
        while (state := self.state(submission)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < until, self.log(submission)
        return state

    def files(self, run: str) -> RunFiles:
        return RunFiles(self.folder / run)

    def until(self, submission: str, happened: Callable[[], Any], seconds: float = 150) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, f"it never happened:\n{self.log(submission)}"
            time.sleep(0.02)

    def steps(self, run: str, attempt: int) -> list[int]:
        return [line["step"] for line in read_all_attempts(self.files(run).metrics) if line["attempt"] == attempt]

    def nodes(self, run: str, attempt: int) -> list[str]:
        """Names of the nodes of an attempt, in the order of their ranks."""
        return [node["host"] for node in history.nodes(RunDir(self.folder / run), attempt)]

    def curve(self, run: str) -> dict[int, tuple[float, float, str]]:
        return {
            line["step"]: (line["loss"], line["grad_norm"], line["batch_hash"])
            for line in read_metrics(self.files(run).metrics)
        }


@pytest.fixture(scope="module")
def jobs(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The job of the promises, three times as long, on two nodes of one rank."""
    folder = tmp_path_factory.mktemp("ray")
    write_data(folder / "data")
    promises = Path(__file__).parents[1] / "promises" / "job.yaml"
    job = yaml.safe_load(promises.read_text(encoding="utf-8"))
    for stage in job["curriculum"]:
        stage["duration"] = "40 steps"
    job["sources"]["stories"]["repeat"] = True
    job["resources"] = {"nodes": 2, "gpus_per_node": 1, "environment": ["WANDB_API_KEY"]}
    job["restarts"] = {"wait": "0s"}
    job["data_dir"] = str(folder / "prepared")
    (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
    return Jobs(folder, ray_cluster)


@pytest.fixture(scope="module")
def uninterrupted(jobs: Jobs) -> dict[int, tuple[float, float, str]]:
    """The curve of the job on two ranks of one machine."""
    done = jobs.ernie("launch", "job.yaml", "--run-dir", "uninterrupted", "--ranks", "2")
    assert done.returncode == 0, done.stdout
    return jobs.curve("uninterrupted")


def test_the_cluster_listens_on_loopback_alone_and_refuses_who_has_no_token(jobs: Jobs):
    listening = {
        connection.laddr.ip
        for process in jobs.cluster.processes()
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert listening <= {"127.0.0.1", "::1"}, listening
    without = {"RAY_AUTH_TOKEN_PATH": os.devnull}
    refused = jobs.ernie("launch", "job.yaml", "--on", "ray", "--address", jobs.cluster.dashboard, **without)
    assert refused.returncode == 2 and "token" in refused.stdout and "Traceback" not in refused.stdout, refused.stdout
    assert SECRET not in refused.stdout

"""On a real Ray cluster of three nodes: to the end, through lost and leaving nodes, stopped and submitted again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from ray_cluster import ROOT, RayCluster
from slurm_cluster import SlurmCluster

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
            *("--runtime-env-json", json.dumps({"env_vars": variables, "excludes": ["data", "prepared*", "lost"]})),
            *("--", "python", "-m", "launcher", "launch", "job.yaml", "--on", "ray"),
            *("--run-dir", str(self.folder / run), *sets),
        )
        assert done.returncode == 0, done.stdout
        return re.findall(r"Job '(\S+)' submitted", done.stdout)[0]

    def state(self, submission: str) -> str:
        return self.cluster.ask(f"/api/jobs/{submission}")["status"]

    def log(self, submission: str) -> str:
        return self.cluster.ask(f"/api/jobs/{submission}/logs")["logs"]

    def wait(self, submission: str, seconds: float = 300) -> str:
        """Until it is over; how it ended."""
        until = time.monotonic() + seconds
        while (state := self.state(submission)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < until, self.log(submission)
            time.sleep(0.5)
        return state

    def files(self, run: str) -> RunFiles:
        return RunFiles(self.folder / run)

    def until_step(self, run: str, attempt: int, step: int, log: Callable[[], str]) -> None:
        until = time.monotonic() + 300
        while max(self.steps(run, attempt), default=0) < step:
            assert time.monotonic() < until, f"no step {step} in attempt {attempt}:\n{log()}"
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
    """The job of the promises, twice as long, on two nodes of one rank."""
    folder = tmp_path_factory.mktemp("ray")
    write_data(folder / "data")
    promises = Path(__file__).parents[1] / "promises" / "job.yaml"
    job = yaml.safe_load(promises.read_text(encoding="utf-8"))
    job["curriculum"].pop()  # that compares answers: nothing in it is the cluster's
    del job["sources"]["pairs"]
    for stage in job["curriculum"]:
        stage["duration"] = "25 steps"
    for source in job["sources"].values():
        source.update(path=str(folder / source["path"]), repeat=True)
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


def test_the_job_server_is_on_loopback_and_nobody_without_the_token_gets_in(jobs: Jobs):
    port = int(jobs.cluster.dashboard.rpartition(":")[2])
    connections = [one for process in jobs.cluster.processes() for one in process.net_connections("tcp")]
    listening = {one.laddr.ip for one in connections if one.status == "LISTEN" and one.laddr.port == port}
    assert listening == {"127.0.0.1"}
    wrong = jobs.folder / "wrong"
    wrong.write_text("an older token", encoding="utf-8")
    words = ("launch", "job.yaml", "--on", "ray", "--run-dir", "refused")
    for where, token in (("--address", jobs.cluster.dashboard), wrong), ((), Path(os.devnull)):
        done = jobs.ernie(*words, *where, RAY_AUTH_TOKEN_PATH=str(token), RAY_ADDRESS=jobs.cluster.address)
        assert done.returncode == 2 and "token" in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_data_is_prepared_over_the_cluster_byte_for_byte_as_on_one_machine(jobs: Jobs):
    rows = [json.dumps({"text": f"第{number}段：" + "山中有药，其味甘。" * (number % 97)}) for number in range(4_000)]
    (jobs.folder / "data" / "large.jsonl").write_text("\n".join(rows), encoding="utf-8")
    mixture = "curriculum.general.mixture={stories: 0.5, large: 0.5}"
    more = ("sources.large.path=data/large.jsonl", "sources.large.text=text", mixture)
    sets = [word for field in more for word in ("--set", field)]
    made, refused = {}, {}
    for place in ("local", "ray"):
        words = ("prepare", "job.yaml", "--on", place, *sets)
        done = jobs.ernie(*words, "--set", f"data_dir=prepared-{place}", RAY_ADDRESS=jobs.cluster.address)
        assert done.returncode == 0, done.stdout
        folder = jobs.folder / f"prepared-{place}"
        made[place] = {
            path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }
        done = jobs.ernie(*words, "--set", "sources.large.text=missing", RAY_ADDRESS=jobs.cluster.address)
        refused[place] = done.stdout
        assert done.returncode == 2 and "the first 20 bad rows" in done.stdout, done.stdout
    assert made["ray"] == made["local"] and len(made["local"]) > 40
    assert refused["ray"] == refused["local"]


def test_a_lost_node_a_stop_and_a_second_submission_leave_no_trace_in_the_curve(jobs: Jobs, uninterrupted, tmp_path):
    run, files = "lost", jobs.files("lost")
    jobs.cluster.have(3)
    secrets = tmp_path / "secrets.env"
    secrets.touch(mode=0o600)
    secrets.write_text(f"WANDB_API_KEY={SECRET}\n")
    sets = ("--set", f"resources.ray.environment_file={secrets}")
    first = jobs.submit(run, *sets, RAY_JOB_STOP_WAIT_TIME_S="60")
    jobs.until_step(run, 1, 8, lambda: jobs.log(first))
    ranks = [process for process in jobs.cluster.processes() if process.cmdline()[1:3] == ["-m", "ernie_dist"]]
    assert len(ranks) == 2 and all(rank.environ()["WANDB_API_KEY"] == SECRET for rank in ranks)
    victim = next(name for name in jobs.nodes(run, 1) if name != "n1")
    jobs.cluster.kill(victim)
    jobs.until_step(run, 2, 35, lambda: jobs.log(first))
    assert len(jobs.nodes(run, 2)) == 2 and victim not in jobs.nodes(run, 2)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    jobs.cluster.ask(f"/api/jobs/{first}/stop", method="POST")
    assert jobs.wait(first) == "STOPPED"

    log = jobs.log(first)
    assert f"{victim} was lost" in log and "starts again" in log and "loss" in log, log
    lost, stopped = history.ends(RunDir(files.root))
    assert (lost.kind, lost.exit_code, stopped.exit_code) == ("NodeLost", 1, 75)
    assert stopped.checkpoint == stopped.after_step, "60 s are enough for a save"

    done = jobs.ernie(
        *("launch", "job.yaml", "--on", "ray", "--address", jobs.cluster.dashboard, "--run-dir", run, "--follow", *sets)
    )
    assert done.returncode == 0 and "submitted" in done.stdout and "report: " in done.stdout, done.stdout
    assert jobs.curve(run) == uninterrupted
    assert "SUCCEEDED" in jobs.ernie("status", run).stdout
    shown = [done.stdout, log, jobs.cluster.ray("job", "list", f"--address={jobs.cluster.dashboard}").stdout]
    shown += [path.read_text(errors="replace") for path in jobs.cluster.folder.rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


def test_a_node_that_is_not_fit_is_left_out_and_what_cannot_be_had_is_said(jobs: Jobs):
    jobs.cluster.have(2)
    labels = "resources.ray.labels={site: loopback}"
    sets = ("resources.health_check=test $ERNIE_NODE != n1", "resources.ray.wait_for_nodes=2s", labels)
    done = jobs.ernie(
        *("launch", "job.yaml", "--on", "ray", "--run-dir", "unfit"),
        *(word for field in sets for word in ("--set", field)),
        RAY_ADDRESS=jobs.cluster.address,
    )
    assert done.returncode == 75, done.stdout
    unfit, missing = history.ends(RunDir(jobs.folder / "unfit"))
    assert (unfit.kind, missing.kind) == ("UnfitNode", "NodesMissing") and "n1" in unfit.message
    assert "n1 left out as not fit; 1 missing" in done.stdout, done.stdout


def test_a_node_to_be_taken_away_costs_no_step_and_the_run_goes_on_with_those_that_stay(jobs: Jobs, uninterrupted):
    run = "elastic"
    jobs.cluster.have(2)
    submission = jobs.submit(
        *(run, "--set", "resources.min_nodes=1", "--set", "resources.ray.wait_for_nodes=2s"),
    )
    jobs.until_step(run, 1, 8, lambda: jobs.log(submission))
    leaving = next(name for name in jobs.nodes(run, 1) if name != "n1")
    drained = jobs.cluster.ray(
        *("drain-node", f"--address={jobs.cluster.address}", f"--node-id={jobs.cluster.node_id(leaving)}"),
        *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=300"),
    )
    assert drained.returncode == 0, drained.stdout
    assert jobs.wait(submission) == "SUCCEEDED", jobs.log(submission)

    assert jobs.nodes(run, 2) == ["n1"] and f"{leaving} is to be taken away" in jobs.log(submission)
    first, _ = history.ends(RunDir(jobs.files(run).root))
    assert first.exit_code == 75 and first.checkpoint == first.after_step
    curve = jobs.curve(run)
    assert [point[2] for point in curve.values()] == [point[2] for point in uninterrupted.values()]
    losses = [point[0] for point in uninterrupted.values()]
    assert [point[0] for point in curve.values()] == pytest.approx(losses, rel=1e-4), "sums in another order"


def test_a_ray_cluster_in_a_slurm_allocation_goes_back_into_the_queue_and_to_the_end(
    jobs: Jobs, uninterrupted, slurm_cluster: SlurmCluster
):
    run = "allocated"
    job = slurm_cluster.submit(
        *("--nodes=2", "--exclusive", "--time=20", f"--export=PATH,HOME,PYTHONPATH={ROOT},OMP_WAIT_POLICY=PASSIVE"),
        *(str(ROOT / "slurm" / "ray.sbatch"), "job.yaml", "--run-dir", run),
        cwd=jobs.folder,
    )
    log = jobs.folder / f"ernie-ray-{job}.log"
    jobs.until_step(run, 1, 8, lambda: log.read_text(errors="replace"))
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm_cluster.finish(job, 400) == "COMPLETED", log.read_text(errors="replace")
    assert "back into the queue (restart 1)" in log.read_text(errors="replace")
    assert jobs.curve(run) == uninterrupted
    assert not list(jobs.folder.glob(".ray-token*")) and not Path(f"/tmp/ray-{job}").exists()

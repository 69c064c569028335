"""On a real Slurm cluster of four nodes: preempted, requeued, robbed of nodes, cancelled; always the same curve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from slurm_cluster import SlurmCluster

from ernie_dist.events.history import read_all_attempts, read_metrics, replayed_steps
from ernie_dist.spec.run_files import RunFiles
from launcher import history
from launcher.quickstart_data import write_data
from launcher.restart import AttemptEnd
from launcher.run_dir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 90, 20
"""of the job; between two of its checkpoints"""
ALONE = ("resources.nodes=1", "engine.kind=plain", "tokens_per_batch=512")
ENDLESS = ("curriculum.general.duration=1000000 steps", "checkpoint.every=100000 steps")


@dataclass
class Jobs:
    """One job in a folder that all nodes see, and the means to run it and to read what it left."""

    folder: Path
    cluster: SlurmCluster

    def ernie(self, *words: str, check: bool = True) -> str:
        """At a login node; the output."""
        command = (sys.executable, "-m", "launcher", *words)
        return self.cluster.run(*command, cwd=self.folder, check=check, timeout=120)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The same, without waiting for its end."""
        command = (sys.executable, "-m", "launcher", *words)
        return subprocess.Popen(
            command, cwd=self.folder, env=self.cluster.environment, stdout=subprocess.PIPE, text=True
        )

    def submit(self, run: str, *overrides: str) -> int:
        """Through the command a person would use; the job's number."""
        sets = [part for override in overrides for part in ("--set", override)]
        said = self.ernie("launch", "job.yaml", "--on", "slurm", "--run-dir", run, *sets)
        return int(said.split("slurm job ")[1].split()[0])

    def files(self, run: str) -> RunFiles:
        return RunFiles(self.folder / run)

    def log(self, run: str, job: int) -> str:
        return (self.files(run).submission / f"slurm-{job}.log").read_text(encoding="utf-8")

    def steps(self, run: str, attempt: int) -> list[int]:
        return [line["step"] for line in read_all_attempts(self.files(run).metrics) if line["attempt"] == attempt]

    def ends(self, run: str) -> dict[int, AttemptEnd]:
        return {end.attempt: end for end in history.ends(RunDir(self.folder / run))}

    def nodes(self, run: str, attempt: int) -> list[str]:
        """Names of the nodes of an attempt, in the order of their ranks."""
        return [node["host"] for node in history.nodes(RunDir(self.folder / run), attempt)]

    def curve(self, run: str) -> dict[int, tuple[float, float, str]]:
        """step -> loss, grad_norm, batch_hash; of a step written twice the later attempt counts."""
        lines = read_metrics(self.files(run).metrics)
        return {line["step"]: (line["loss"], line["grad_norm"], line["batch_hash"]) for line in lines}

    def wandb_runs(self, run: str) -> set[str]:
        """Ids of the W&B runs that the attempts wrote to."""
        return {path.name.rpartition("-")[2] for path in self.files(run).wandb.glob("offline-run-*")}

    def until(self, run: str, job: int, happened: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"it never happened: {self.cluster.show(job)}\n{self.log(run, job)}"
            time.sleep(0.1)

    def between_saves(self, run: str, job: int, attempt: int) -> None:
        """Waits for a moment at which this attempt has something to lose, and the next save is some time away."""
        self.until(run, job, lambda: 3 <= (self.steps(run, attempt) or [0])[-1] % EVERY <= EVERY // 2)

    def restarts(self, job: int) -> int:
        """How often Slurm has put the job back into the queue."""
        return int(self.cluster.show(job)["Restarts"])

    def back_in_queue(self, run: str, job: int, times: int) -> None:
        self.until(run, job, lambda: self.restarts(job) == times)

    def ranks(self, run: str) -> dict[str, int]:
        """node -> process id of its rank"""
        wanted = [os.fsencode(word) for word in ("-m", "ernie_dist", str(self.folder / run))]
        found = {}
        for node in ("n1", "n2", "n3", "n4"):
            for pid in self.cluster.processes(node):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[1:4] == wanted:
                    found[node] = pid
        return found

    @contextmanager
    def paused(self, run: str) -> Iterator[None]:
        """Its steps wait, while something gets under way that takes Slurm up to half a minute."""
        _, pid = self.ranks(run).popitem()
        os.kill(pid, signal.SIGSTOP)
        yield
        os.kill(pid, signal.SIGCONT)

    def stall(self, run: str) -> None:
        """As on a node that is too busy to end its step, until it is killed: Slurm wakes whatever it ends."""
        _, pid = self.ranks(run).popitem()
        with suppress(ProcessLookupError):
            for _ in range(3000):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.02)


@pytest.fixture(autouse=True)
def four_idle_nodes(slurm_cluster: SlurmCluster) -> Iterator[None]:
    yield
    slurm_cluster.clear()


@pytest.fixture(scope="module")
def jobs(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The job of the promises, longer and with larger batches, on two nodes of one rank."""
    folder = tmp_path_factory.mktemp("slurm")
    write_data(folder / "data")
    promises = (ROOT / "tests" / "promises" / "job.yaml").read_text(encoding="utf-8")
    job = yaml.safe_load(promises)
    job["curriculum"].pop()  # that compares answers: nothing in it is the cluster's
    del job["sources"]["pairs"]
    for stage in job["curriculum"]:
        stage["duration"] = f"{STEPS // 3} steps"
        stage.pop("tokens_per_batch", None)
    for source in job["sources"].values():
        source["repeat"] = True
    job["tokens_per_batch"] = "4K"
    job["checkpoint"]["every"] = f"{EVERY} steps"
    job["track"] = {"wandb": {"project": "promises", "mode": "offline"}}
    job["restarts"] = {"wait": "0s"}
    slurm = {"partition": "low", "exclusive": True, "gpus": False}
    job["resources"] = {"nodes": 2, "gpus_per_node": 1, "environment": ["PYTHONPATH"], "slurm": slurm}
    (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
    return Jobs(folder, slurm_cluster)


@pytest.fixture(scope="module")
def uninterrupted(jobs: Jobs) -> dict[int, tuple[float, float, str]]:
    """The curve of the job when nothing happens to it."""
    job = jobs.submit("uninterrupted")
    assert jobs.cluster.finish(job) == "COMPLETED", jobs.log("uninterrupted", job)
    curve = jobs.curve("uninterrupted")
    assert sorted(curve) == list(range(1, STEPS + 1)) and jobs.ends("uninterrupted").keys() == {1}
    return curve


def test_a_job_goes_on_through_preemptions_a_requeue_its_time_limit_and_a_lost_node(jobs: Jobs, uninterrupted):
    run, cluster, files = "taken-away", jobs.cluster, jobs.files("taken-away")
    job = jobs.submit(run)
    follower = jobs.start("logs", run, "-f")

    for attempt in (1, 2):
        jobs.between_saves(run, job, attempt)
        with jobs.paused(run):
            cluster.preempt(grace=15)
            jobs.until(run, job, files.stop.exists)
        jobs.back_in_queue(run, job, attempt)
    jobs.between_saves(run, job, 3)
    cluster.preempt(grace=1)
    jobs.stall(run)  # too short for a checkpoint
    jobs.back_in_queue(run, job, 3)
    jobs.between_saves(run, job, 4)
    said = jobs.ernie("status", run)
    assert f"slurm job {job}: RUNNING" in said and f"on {cluster.show(job)['NodeList']}" in said, said
    cluster.run("scontrol", "requeue", str(job))
    jobs.back_in_queue(run, job, 4)
    jobs.until(run, job, lambda: "in the queue, to go on from there" in jobs.ernie("status", run))

    jobs.between_saves(run, job, 5)
    with jobs.paused(run):
        end = datetime.now() + timedelta(seconds=50)  # Slurm looks every 30 s: a warning comes before the end
        cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={end.isoformat(timespec='seconds')}")
        jobs.until(run, job, files.stop.exists)
    jobs.back_in_queue(run, job, 5)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")  # it was rounded up to a minute

    jobs.between_saves(run, job, 6)
    lost = cluster.nodes(job)[1]
    cluster.kill_node(lost)
    jobs.back_in_queue(run, job, 6)
    assert cluster.finish(job) == "COMPLETED", jobs.log(run, job)

    assert jobs.curve(run) == uninterrupted and jobs.restarts(job) == 6
    ends, said = jobs.ends(run), jobs.log(run, job)
    assert sorted(ends) == [1, 2, 3, 4, 5, 6, 7] and lost not in jobs.nodes(run, 7)
    for attempt in (1, 2, 5):
        assert (ends[attempt].exit_code, ends[attempt].checkpoint) == (75, ends[attempt].after_step), said
    for attempt in (3, 6):
        assert ends[attempt].checkpoint < ends[attempt].after_step, said
    replayed = replayed_steps(files.metrics)
    assert {3, 6} <= {replay.first_attempt for replay in replayed} and all(replay.identical for replay in replayed)
    assert len(jobs.wandb_runs(run)) == 1
    followed, _ = follower.communicate(timeout=60)
    assert all(f"attempt {attempt} on 2 CPU ranks" in followed for attempt in ends), followed
    assert f"finished: {STEPS} steps" in followed


def test_a_job_goes_on_after_a_killed_rank_a_lost_batch_host_and_scancel(jobs: Jobs, uninterrupted):
    run, cluster, files = "killed", jobs.cluster, jobs.files("killed")
    job = jobs.submit(run)
    watcher = jobs.start("status", run, "--watch")
    jobs.between_saves(run, job, 1)
    node = cluster.nodes(job)[1]
    os.kill(jobs.ranks(run)[node], signal.SIGKILL)
    jobs.between_saves(run, job, 2)
    assert jobs.restarts(job) == 0 and jobs.nodes(run, 1) == jobs.nodes(run, 2), "in the same allocation"
    assert f"rank 1 on {node} was killed by signal 9" in jobs.ends(run)[1].message

    host = cluster.nodes(job)[0]
    cluster.kill_node(host)
    jobs.back_in_queue(run, job, 1)
    jobs.between_saves(run, job, 3)
    assert host not in jobs.nodes(run, 3)

    cluster.run("scancel", str(job))
    assert cluster.finish(job, 60) == "CANCELLED", jobs.log(run, job)
    seen, _ = watcher.communicate(timeout=60)
    assert f"slurm job {job}: RUNNING" in seen and "attempt    3 (2 restarts)" in seen, seen
    assert f"slurm job {job}: CANCELLED" in seen.rpartition("run   ")[2], seen
    jobs.until(run, job, lambda: not jobs.ranks(run), 30)
    assert "attempt 3 on 2 CPU ranks" in jobs.ernie("logs", run)
    assert jobs.ernie("stop", run) == "nothing is running here\n"

    again = jobs.submit(run)
    assert cluster.finish(again) == "COMPLETED", jobs.log(run, again)
    assert jobs.curve(run) == uninterrupted and (jobs.restarts(job), jobs.restarts(again)) == (1, 0)
    assert sorted(jobs.ends(run)) == [1, 2, 3, 4]
    assert all(replay.identical for replay in replayed_steps(files.metrics)) and len(jobs.wandb_runs(run)) == 1


def test_a_wrong_job_handed_in_by_hand_ends_for_good_with_the_reason_in_its_last_line(jobs: Jobs):
    options = ("--partition=low", "--nodes=1", "--exclusive", "--export=PATH,HOME,PYTHONPATH")
    sets = [part for field in (*ALONE, "sources.qa.path=data/nowhere.jsonl") for part in ("--set", field)]
    script = str(ROOT / "slurm" / "train.sbatch")
    job = jobs.cluster.submit(*options, script, "job.yaml", "--run-dir", "wrong", *sets, cwd=jobs.folder)
    assert jobs.cluster.finish(job, 120) == "FAILED"
    shown, said = jobs.cluster.show(job), (jobs.folder / f"ernie-{job}.log").read_text()
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0"), shown
    assert "nowhere.jsonl" in said.splitlines()[-1] and "Traceback" not in said, said


def test_a_job_that_is_always_taken_away_too_early_is_given_up(jobs: Jobs):
    run, cluster, files = "nowhere", jobs.cluster, jobs.files("nowhere")
    job = jobs.submit(run, *ALONE, "restarts.max=1")
    for attempt in (1, 2):
        jobs.until(run, job, files.node(attempt, 0).exists)
        cluster.run("scontrol", "requeue", str(job))
        jobs.back_in_queue(run, job, attempt)
    assert cluster.finish(job, 120) == "FAILED", jobs.log(run, job)
    assert cluster.show(job)["ExitCode"] == "1:0" and jobs.restarts(job) == 2
    assert sorted(jobs.ends(run)) == [1, 2] and jobs.ends(run)[2].given_up
    assert "given up: 2 starts in a row reached no new checkpoint" in jobs.log(run, job)


def test_a_node_that_fails_its_check_is_left_out_of_the_job_that_follows(jobs: Jobs):
    run, cluster = "unfit", jobs.cluster
    job = jobs.submit(run, "resources.health_check=test $ERNIE_NODE != n1")
    jobs.until(run, job, lambda: len(jobs.nodes(run, 2)) == 2)
    assert (jobs.restarts(job), cluster.show(job)["ExcNodeList"]) == (1, "n1"), jobs.log(run, job)
    assert jobs.ends(run)[1].kind == "UnfitNode" and "n1" in jobs.nodes(run, 1) and "n1" not in jobs.nodes(run, 2)
    assert "goes back into the queue, without n1\n" in jobs.log(run, job)
    jobs.ernie("stop", run, "--now")
    assert cluster.finish(job, 60) == "FAILED" and cluster.show(job)["ExitCode"] == "75:0"


def test_a_run_that_is_submitted_again_never_runs_twice(jobs: Jobs):
    run, cluster, files = "twice", jobs.cluster, jobs.files("twice")
    first = jobs.submit(run, *ALONE, *ENDLESS)
    refused = jobs.ernie("launch", "job.yaml", "--on", "slurm", "--run-dir", run, check=False)
    assert f"slurm job {first}" in refused and "ernie stop" in refused, refused
    script = str(files.submission / "launch.sbatch")
    jobs.until(run, first, lambda: jobs.steps(run, 1))
    elsewhere = cluster.submit("--job-name=other", script)  # by hand, and not even of the same name
    second = cluster.submit(script)
    assert cluster.finish(elsewhere, 120) == "FAILED", jobs.log(run, elsewhere)
    assert "another launch is running in it" in jobs.log(run, elsewhere)
    assert cluster.show(second)["Reason"] == "Dependency" and cluster.state(first) == "RUNNING"

    jobs.ernie("stop", run, "--wait")
    assert cluster.finish(first, 60) == "FAILED" and cluster.show(first)["ExitCode"] == "75:0"
    jobs.until(run, second, lambda: jobs.steps(run, 2))
    assert jobs.steps(run, 2)[0] == jobs.steps(run, 1)[-1] + 1 == jobs.ends(run)[1].checkpoint + 1
    jobs.ernie("stop", run, "--now")
    assert cluster.finish(second, 60) == "FAILED" and cluster.show(second)["ExitCode"] == "75:0"
    assert (jobs.restarts(first), jobs.restarts(second)) == (0, 0), "what a person stopped stays stopped"

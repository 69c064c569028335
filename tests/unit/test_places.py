"""What is started where: one node command under every launcher, and scripts that are read before they run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ernie_dist.spec.assets import asset_folder, find_asset
from ernie_dist.spec.job import JobSpec, load_job
from ernie_dist.spec.resources import ResourcesSpec
from launcher.base import Attempt
from launcher.cli import main
from launcher.local import LocalLauncher
from launcher.node import Nodes, node_command, torchrun
from launcher.run_dir import RunDir
from launcher.sbatch import render_sbatch
from launcher.slurm import Allocation, SlurmLauncher
from launcher.slurm_queue import QueuedJob
from launcher.submission import slurm_script

GOLDEN = Path(__file__).with_name("golden")
RECIPES = sorted(path.stem for path in asset_folder("recipes").glob("*.yaml"))
RUN = Path("/runs/law")
TWO_NODES = Allocation("1234", ("a7", "a9"), "10.0.0.7", cpus_per_task="32")


def golden(name: str, text: str) -> str:
    """What the file that is kept says; ERNIE_WRITE_GOLDEN=1 writes `text` there first."""
    path = GOLDEN / name
    if os.environ.get("ERNIE_WRITE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def test_golden_node_commands() -> None:
    assert node_command(RUN, 3, Nodes(1, 2), node_rank=0, python="python") == shlex.split(
        "python -m launcher.node /runs/law 3 --nodes 1 --ranks-per-node 2 --node-rank 0"
    )
    several = node_command(RUN, 12, Nodes(4, 8, "n1:29500"), deadline=1e9, health_check="dcgmi diag", python="python")
    assert several == shlex.split(
        "python -m launcher.node /runs/law 12 --nodes 4 --ranks-per-node 8 --rendezvous n1:29500 "
        "--deadline 1000000000 --health-check 'dcgmi diag'"
    )
    python = torchrun(RUN, 12, Nodes(1, 8), 0)[0]
    ranks = ["--no-python", python, "-m", "ernie_dist", "/runs/law", "12"]
    start = [python, "-m", "torch.distributed.run", "--nnodes"]
    assert torchrun(RUN, 12, Nodes(1, 8), 0) == [*start, "1", "--nproc-per-node", "8", "--standalone", *ranks]
    meeting = ["--node-rank", "3", "--master-addr", "n1", "--master-port", "29500"]
    assert torchrun(RUN, 12, Nodes(4, 8, "n1:29500"), 3) == [*start, "4", "--nproc-per-node", "8", *meeting, *ranks]


def test_every_launcher_starts_the_same_node_command() -> None:
    attempt = Attempt(Path("/runs/a run; with $trange name"), 2, ResourcesSpec(nodes=2, gpus_per_node=3))
    here, slurm = (shlex.split(one.render(attempt).splitlines()[-1]) for one in (LocalLauncher(), _slurm()))
    assert here[0] == slurm[0] == "exec"
    at = here.index("launcher.node"), slurm.index("launcher.node")
    same = ["launcher.node", str(attempt.run_dir), "2", "--nodes"]
    assert here[at[0] :] == [*same, "1", "--ranks-per-node", "3", "--node-rank", "0"]
    port = TWO_NODES.port(2)
    assert slurm[at[1] :] == [*same, "2", "--ranks-per-node", "3", "--rendezvous", f"10.0.0.7:{port}"]
    assert 10_000 <= port < 30_000 and port != TWO_NODES.port(3) != replace(TWO_NODES, job="1235").port(3)


@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer"])
def test_golden_steps(kind: str) -> None:
    image = {"image": "/images/ernie.sqsh", "kind": kind, "mounts": ["/runs:/runs", "/data:/data:ro"]}
    slurm = {} if kind == "none" else {"container": {**image, "python": "python3"}}
    attempt = Attempt(RUN, 7, ResourcesSpec.model_validate({"nodes": 2, "gpus_per_node": 8, "slurm": slurm}))
    text = _slurm().render(attempt).replace(sys.executable, "/opt/ernie/bin/python")
    assert text == golden(f"step-{kind}.sh", text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_batch_scripts_of_the_recipes(recipe: str) -> None:
    text = _script(load_job(find_asset("recipes", recipe, ".yaml")))
    assert text == golden(f"{recipe}.sbatch", text)


def test_golden_batch_script_with_every_setting() -> None:
    raw = {
        "nodes": 4,
        "gpus_per_node": 8,
        "time_limit": "1d12h",
        "environment": ["WANDB_API_KEY", "HOME"],
        "slurm": {
            **{"partition": "a100", "account": "law", "qos": "high", "reservation": "res 1", "constraint": "ib&80g"},
            **{"exclude": "n[3,7]", "exclusive": True, "gpus": "a100", "cpus_per_node": 96, "memory": "0"},
            **{
                "notice": "5m",
                "modules": ["cuda/13.0", "gcc"],
                "setup": ["export NCCL_DEBUG=WARN"],
            },
            "options": ["--mail-type=FAIL"],
        },
    }
    text = _render(ResourcesSpec.model_validate(raw))
    assert text == golden("every-setting.sbatch", text)
    without_gpus = _render(ResourcesSpec.model_validate({"slurm": {"gpus": False}}))
    assert "gpus" not in without_gpus and "--nodes=1" in without_gpus


def test_scripts_are_sound_shell() -> None:
    scripts = [*GOLDEN.glob("*.s*"), *asset_folder("slurm").glob("*.sbatch")]
    assert len(scripts) > len(RECIPES)
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_submission_says_what_the_job_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that waits in the queue is read again as a job."""
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES:
        job = load_job(find_asset("recipes", recipe, ".yaml"), ["restarts.wait=90s", "resources.nodes=1"])
        copy = tmp_path / "job.json"
        copy.write_text(job.model_dump_json(), encoding="utf-8")
        assert load_job(copy) == job
        script = slurm_script(job, RunDir(tmp_path / "a run"))
        assert f"'{tmp_path}/a run/submission/job.json' --run-dir '{tmp_path}/a run'" in script


def test_a_dry_run_on_slurm_prints_the_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "three-stage-0.3b", "--on", "slurm", "--dry-run", "--run-dir", "runs/law"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --nodes=1" in shown and f"--run-dir {tmp_path}/runs/law" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"JobState": "PENDING", "Reason": "Priority", "StartTime": "2026-11-22T17:04:38", "NodeList": "(null)"},
            "PENDING (Priority), expected to start 2026-11-22 17:04:38",
        ),
        (
            {"JobState": "RUNNING", "Reason": "None", "NodeList": "n[1-2]", "EndTime": "2026-11-23T00:00:00"},
            "RUNNING, until 2026-11-23 00:00:00, on n[1-2]",
        ),
    ],
)
def test_what_slurm_says_of_a_job_in_one_line(
    fields: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert str(QueuedJob("7", fields)) == said


def _slurm() -> SlurmLauncher:
    return SlurmLauncher(TWO_NODES)


def _script(job: JobSpec) -> str:
    return _render(job.resources)


def _render(resources: ResourcesSpec) -> str:
    return render_sbatch(
        resources,
        ["/home/ann/law/runs/law/submission/job.json", "--run-dir", "/home/ann/law/runs/law"],
        job_name="law-1a2b3c",
        folder=Path("/home/ann/law"),
        log=Path("/home/ann/law/runs/law/submission/slurm-%j.log"),
        python="/opt/ernie/bin/python",
    )


def test_a_job_without_a_time_limit_has_no_end_until_it_is_preempted() -> None:
    fields = {"JobState": "RUNNING", "TimeLimit": "UNLIMITED", "EndTime": "2027-11-22T17:04:38", "PreemptTime": "None"}
    assert QueuedJob("7", fields).end is None
    preempted = {**fields, "EndTime": "2026-11-22T17:04:55", "PreemptTime": "2026-11-22T17:04:40"}
    assert QueuedJob("7", preempted).end == 1795367095.0

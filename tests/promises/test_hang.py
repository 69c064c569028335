"""An attempt that makes no progress is ended in time, the rank that held it up is named, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.heartbeat import node_folder, rank_file, read_pulse
from ernie_dist.spec.job import load_job
from ernie_dist.spec.run_files import RunFiles
from launcher.node import rank_environment
from launcher.run_dir import RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
LIMIT, REACTION = 6.0, 30.0
WATCHED = (f"watchdog.step={LIMIT:.0f}s", "watchdog.start=3m", "watchdog.save=1m", "restarts.max=0")


def pids(files: RunFiles, nodes: int = 1) -> list[int]:
    """Processes of both ranks, from their heartbeats."""
    folders = [node_folder(files.root, 1, {"GROUP_RANK": str(rank * (nodes - 1))}) for rank in (0, 1)]
    pulses = [read_pulse(rank_file(folder, rank)) for rank, folder in enumerate(folders)]
    assert all(pulses), f"no heartbeats in {folders}"
    return [pulse.pid for pulse in pulses]


def wait_for(happened, process: subprocess.Popen[str], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def check(files: RunFiles, ranks: list[int], culprit: int, why: str) -> str:
    """What every hang leaves behind; the culprit's stacks."""
    error = json.loads(files.error(1).read_text(encoding="utf-8"))
    assert (error["kind"], error["rank"], error["exit_code"]) == ("Hang", culprit, 1), error["message"]
    assert error["message"].startswith(f"rank {culprit} hangs: ")
    assert f"rank {1 - culprit} hangs" not in error["message"]
    assert why in error["message"]
    (event,) = [event for event in read_events(files.events) if event["event"] == "HangDetected"]
    assert event["ranks"] == [culprit]
    assert LIMIT < event["seconds"] < LIMIT + REACTION
    assert str(files.stacks(1, culprit).relative_to(files.root)) in event["stacks"]
    waiting = files.stacks(1, 1 - culprit).read_text(encoding="utf-8")
    assert "world.py" in waiting or "torch/distributed/" in waiting, waiting
    time.sleep(0.5)
    assert all(gone(pid) for pid in ranks)
    return files.stacks(1, culprit).read_text(encoding="utf-8")


def test_a_slow_rank_is_named_and_a_stopped_one_ends_the_attempt_even_rank_0(runs):
    files = runs.files("slow")
    process = runs.start("slow", *WATCHED, "curriculum.2.duration=2000 steps", "evaluate.max_tokens=128")
    wait_for(lambda: read_metrics(files.metrics), process)
    ranks = pids(files)

    def named() -> list[dict]:
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(0.06)
        os.kill(ranks[1], signal.SIGCONT)
        return [event for event in read_events(files.events) if event["event"] == "Straggler"]

    wait_for(named, process)
    assert named()[0]["rank"] == 1
    assert named()[0]["imbalance"] > 1.5
    measured = [line for line in read_metrics(files.metrics) if line["rank_imbalance"]]
    assert [line["step"] % 16 for line in measured] == [1] * len(measured)
    assert measured[-1]["slowest_rank"] == 1

    os.kill(ranks[0], signal.SIGSTOP)
    output, _ = process.communicate(timeout=LIMIT + REACTION)
    assert process.returncode == 1
    assert "rank 1 is slow" in output
    assert "rank 0 hangs: its process is stopped (state T)" in output
    stacks = check(files, ranks, 0, "state T")
    assert "state T" in stacks
    assert "could not answer" in stacks


@pytest.mark.parametrize(
    ("how", "nodes", "why", "frame"),
    [
        ("never comes", 2, "it is not in a collective; it is at", "read_or_hang"),
        ("holds the lock", 1, "native code keeps the interpreter lock", "threading.py"),
    ],
)
def test_a_rank_that_never_comes_or_holds_the_interpreter_lock_is_named(runs, monkeypatch, how, nodes, why, frame):
    """Also where the two are on different nodes, each with a watchdog that sees only its own."""
    monkeypatch.chdir(runs.folder)
    job = load_job(Path("job.yaml"), WATCHED, ranks=2)
    run_dir = RunDir(runs.folder / how)
    run_dir.freeze(resolve_prepared(job, prepare(job, show_progress=False)))
    run_dir.new_attempt()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    worker = Path(__file__).with_name("hang_worker.py")
    process, *others = [
        subprocess.Popen(
            [*command, "--nproc-per-node", str(2 // nodes), str(worker), str(run_dir.root), "1", how],
            env={**os.environ, **rank_environment(2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]
    files = run_dir.files
    wait_for(lambda: read_metrics(files.metrics), process)
    ranks = pids(files, nodes)
    process.communicate(timeout=LIMIT + REACTION + 30)
    for other in others:
        other.communicate(timeout=REACTION)
    assert all(each.returncode != 0 for each in (process, *others))
    assert frame in check(files, ranks, 1, why)
    assert read_metrics(files.metrics)[-1]["step"] == 8

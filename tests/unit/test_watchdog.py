"""Who is to blame, what may take how long, who is slow, and where the time went: from numbers, without ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from ernie_dist.events.goodput import PARTS, described, goodput, time_spent
from ernie_dist.events.history import read_events
from ernie_dist.hang import Evidence, Process, blame, main_thread
from ernie_dist.heartbeat import Phase
from ernie_dist.spec.resilience import WatchdogSpec
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.straggler import slowest
from ernie_dist.watchdog import Watchdog, limit

COLLECTIVE = """Thread 0x00007f6f (most recent call first):
  File "/env/python3.11/threading.py", line 331 in wait

Current thread 0x00007f70 (most recent call first):
  File "/env/site-packages/torch/distributed/distributed_c10d.py", line 3152 in all_reduce
  File "/code/ernie_dist/world.py", line 57 in sum
  File "/code/ernie_dist/train.py", line 78 in train
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
FORWARD = COLLECTIVE.replace("torch/distributed/distributed_c10d.py", "torch/nn/modules/module.py").replace(
    "/code/ernie_dist/world.py", "/code/ernie_dist/model/attention.py"
)


def rank(number: int, phase: Phase = Phase.STEP, step: int = 9, state: str = "S", stacks=COLLECTIVE, silent=0.5):
    return Evidence(number, phase, step, 301.0, 300.0, silent, Process(state, "nfs_wait"), main_thread(stacks))


@pytest.mark.parametrize(
    ("ranks", "culprits", "why"),
    [
        ([rank(0), rank(1, state="T", stacks=""), rank(2)], [1], "stopped (state T)"),
        ([rank(0, state="D", stacks=""), rank(1)], [0], "disk or network file system (state D in nfs_wait)"),
        ([rank(0), rank(1, state="")], [1], "has ended"),
        ([rank(0), rank(1, silent=290.0)], [1], "for 290 s: native code keeps the interpreter lock"),
        ([rank(0), rank(1, Phase.READ, 9), rank(2, Phase.READ, 9)], [1, 2], "ahead of it, in step 9; it is at"),
        ([rank(0, Phase.SAVE), rank(1, Phase.READ, 10)], [0], "reading the batch of step 10"),
        ([rank(0), rank(1, stacks=FORWARD)], [1], "not in a collective, the others wait for it"),
        ([rank(0), rank(1)], [], ""),
    ],
)
def test_the_rank_that_is_waited_for_is_to_blame_and_never_the_one_that_waits(ranks, culprits, why):
    found = blame(ranks)
    assert [one.rank for one in found] == culprits
    assert all(why in one.why for one in found)


def test_blame_points_at_the_line_of_the_main_thread():
    (one,) = blame([rank(0), rank(1, stacks=FORWARD)])
    assert "/code/ernie_dist/model/attention.py:57 in sum" in one.why
    assert main_thread("") == main_thread("torn (most recent") == ()


def test_a_phase_may_take_its_floor_or_a_multiple_of_the_longest_seen():
    spec = WatchdogSpec(step=timedelta(minutes=5), factor=4.0)
    assert limit(Phase.STEP, spec, {}) == 300
    assert limit(Phase.STEP, spec, {Phase.STEP: 60.0, Phase.SAVE: 9000.0}) == 300
    assert limit(Phase.STEP, spec, {Phase.STEP: 100.0}) == 400
    assert limit(Phase.FIRST_STEP, spec, {Phase.STEP: 100.0}) == limit(Phase.SAVE, spec, {}) == 1800
    assert limit(Phase.PREFLIGHT, spec, {Phase.START: 400.0}) == 600, "a network that is silent is not waited for long"


def test_a_rank_that_never_came_up_is_named(tmp_path):
    files = RunFiles(tmp_path)
    files.attempt(1).mkdir(parents=True)
    spec = WatchdogSpec(start=timedelta(milliseconds=1))
    watchdog = Watchdog(files, 1, tmp_path / "node", range(4, 6), more_nodes=False, spec=spec, longest={})
    time.sleep(0.01)
    assert not watchdog.look(), "what is seen once may be half written"
    assert watchdog.look()
    error = json.loads(files.error(1).read_text())
    assert error["rank"] == 4
    assert "rank 4 hangs: its process never came up; rank 5 hangs: its process never came up" in error["message"]
    assert [event["ranks"] for event in read_events(files.events)] == [[4, 5]]


def test_slowest_is_measured_against_the_others():
    assert (slowest([0.2, 0.6]).rank, slowest([0.2, 0.6]).imbalance) == (1, pytest.approx(3.0))
    many = slowest([1.0, 1.1, 2.0, 0.9, 1.0])
    assert (many.rank, many.imbalance, many.busy_seconds) == (2, pytest.approx(2.0), 2.0)
    assert math.isfinite(slowest([0.0, 0.0]).imbalance)


def test_the_watchdog_is_a_light_process():
    code = "import sys, ernie_dist.watchdog; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def event(time: float, kind: str, **values) -> dict:
    return {"time": time, "event": kind, **values}


def test_every_second_of_a_history_is_accounted_for():
    """100 tokens at 10 tokens/s: steps of 10 s. A hang after step 4 loses steps 3 and 4; a third start is under way."""
    lines, events = [], []

    def steps(attempt: int, numbers: range, begin: float) -> None:
        for place, number in enumerate(numbers):
            lines.append(
                {"step": number, "stage": "s", "tokens_per_second": 10.0, "attempt": attempt}
                | {"time": begin + 10 * (place + 1)}
            )

    events += [event(1030, "AttemptStarted"), event(1031, "PhaseEnded", phase="start", seconds=25.0)]
    events += [event(1034, "Evaluated"), event(1035, "PhaseEnded", phase="evaluate", seconds=4.0)]
    steps(1, range(1, 3), 1035)
    events += [event(1058, "PhaseEnded", phase="save", seconds=3.0)]
    steps(1, range(3, 5), 1058)
    events += [event(1138, "HangDetected")]
    events += [event(1160, "Restored", seconds=7.0), event(1161, "AttemptStarted")]
    events += [event(1162, "PhaseEnded", phase="start", seconds=10.0)]
    steps(2, range(3, 6), 1162)
    events += [event(1194, "PhaseEnded", phase="save", seconds=2.0), event(1199, "Finished")]
    events += [event(1199, "PhaseEnded", phase="export", seconds=5.0), event(1199, "TimeSpent")]

    spent = time_spent([1000.0, 1148.0], lines, events, {"s": 100})
    assert spent == {
        "steps": 50.0,  # 1, 2 of the first attempt; 3, 4, 5 of the second
        "start-up": 31.0 + 7.0,  # 14 s from launch to the second's first step, 7 of them reading the checkpoint
        "restore": 7.0,
        "evaluation": 4.0,
        "save": 5.0,
        "export": 5.0,
        "lost": 20.0 + 60.0,  # steps 3 and 4 of the first attempt, and the hang itself
        "waiting": 10.0,
        "other": 0.0,
    }
    assert goodput(spent) == pytest.approx(50 / 199)
    assert [part for part, _, _ in described(spent)] == [part for part in PARTS if part != "other"]
    assert math.fsum(share for _, _, share in described(spent, least=0)) == pytest.approx(1.0)

    killed = time_spent([1000.0, 1148.0, 1210.0], lines, events, {"s": 100})
    assert killed == {**spent, "waiting": 21.0}
    assert goodput(time_spent([], [], [], {})) == 0.0

"""Promise 1: killed anywhere and started again, the run gives what an uninterrupted one gives, to the last bit."""

from __future__ import annotations

import math
import random
import signal

import pytest

from ernie_dist.events.history import read_events, replayed_steps
from ernie_dist.spec.run_files import complete_checkpoints
from launcher.cli import main

pytestmark = pytest.mark.distributed


def test_killed_at_random_steps_and_in_the_middle_of_a_save_the_curve_is_the_same(runs, uninterrupted):
    chance = random.Random(20)
    run, files = "killed", runs.files("killed")
    first, second = chance.randint(6, 23), chance.randint(41, 43)
    runs.kill_when(run, runs.start(run), lambda: (runs.steps_of(run, 1) or [0])[-1] >= first)
    for step in (25, 30, 35):  # a save takes a tenth of a second: the kill may come too late
        process = runs.start(run)
        runs.kill_when(run, process, (files.checkpoints / f"step_{step:08d}.tmp" / "engine").exists)
        if list(files.checkpoints.glob("*.tmp")):
            break
    assert list(files.checkpoints.glob("*.tmp")), "no kill came in the middle of a save"
    before = f"step_{step - 5:08d}"
    assert complete_checkpoints(files.checkpoints)[0].name == before
    attempt = runs.last_attempt(run) + 1  # into the stage that compares the model with what it was
    runs.kill_when(run, runs.start(run), lambda: (runs.steps_of(run, attempt) or [0])[-1] >= second)
    runs.finish(run)

    assert runs.curve(run) == uninterrupted
    assert uninterrupted[37][0] == pytest.approx(math.log(2)), "a model compared with itself"
    replays = replayed_steps(files.metrics)
    assert len(replays) >= 4
    assert all(replay.identical for replay in replays)
    restored = [event["checkpoint"] for event in read_events(files.events) if event["event"] == "Restored"]
    assert len(restored) >= 3
    assert restored[-2:] == [before, "step_00000040"]
    held = [event["peaks"] for event in read_events(files.events) if event["event"] == "MemoryPeaks"]
    assert {f"step/{stage}" for stage in ("general", "domain", "sft")} <= {phase for peaks in held for phase in peaks}
    assert {"start", "step/prefer", "evaluate", "save", "export"} <= held[-1].keys(), (
        "of the attempt that ended the run"
    )
    assert not list(files.checkpoints.glob("*.tmp"))


def test_a_stop_by_signal_or_command_saves_and_gives_75_and_the_next_launch_goes_on(runs, uninterrupted):
    run = "stopped"
    plain = ("engine.kind=plain", "engine.memory=auto", "resources.device=A100-40G")
    files, last = runs.files(run), 0
    for attempt, how in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, "ernie stop"), start=1):
        process = runs.start(run, *plain, "checkpoint.every=100 steps", ranks=1)
        while len(runs.steps_of(run, attempt)) < 2:
            assert process.poll() is None, process.communicate()[0]
        if how == "ernie stop":
            assert main(["stop", str(files.root), "--wait"]) == 0
        else:
            process.send_signal(how)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 75, output
        assert "Traceback" not in output
        steps = runs.steps_of(run, attempt)
        assert steps[0] == last + 1, "nothing lost, nothing repeated"
        last = steps[-1]
        assert complete_checkpoints(files.checkpoints)[0].name == f"step_{last:08d}"
    runs.finish(run, *plain, "checkpoint.every=100 steps", ranks=1)
    ours = runs.curve(run)
    assert [ours[step][2] for step in ours] == [uninterrupted[step][2] for step in uninterrupted]
    assert all(abs(ours[step][0] - uninterrupted[step][0]) < 1e-3 for step in ours)

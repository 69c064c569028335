"""What dies is started again and gives the same curve; what cannot go on is given up; a stop is never lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ernie_dist.checkpoint import verify
from ernie_dist.data.shard import PreparedSource
from ernie_dist.events.history import read_events, replayed_steps
from ernie_dist.spec.lease import Holder
from ernie_dist.spec.run_files import RunFiles, complete_checkpoints
from launcher import history
from launcher.cli import main
from launcher.run_dir import RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ALONE = ("engine.kind=plain", "restarts.wait=0s")
ENDLESS = (*ALONE, "sources.stories.repeat=true", "curriculum.general.duration=1000000 steps")


def until(process: Any, happened: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def ranks(files: RunFiles, attempt: int) -> list[int]:
    """Process ids of an attempt's ranks: torchrun's children, as they were started."""
    if not files.process(attempt).is_file() or not files.process(attempt).read_text():
        return []
    parent = int(files.process(attempt).read_text())
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [int(pid) for pid in children if b"ernie_dist" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def events(files: RunFiles, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(files.events) if event["event"] == kind]


def test_a_killed_rank_and_a_killed_attempt_are_started_again_and_the_curve_is_the_same(runs, uninterrupted):
    run, files = "restarted", runs.files("restarted")
    process = runs.start(run, "restarts.wait=1s", restart=True)
    until(process, lambda: (runs.steps_of(run, 1) or [0])[-1] >= 8 and bool(complete_checkpoints(files.checkpoints)))
    os.kill(ranks(files, 1)[1], signal.SIGKILL)
    until(process, lambda: (runs.steps_of(run, 2) or [0])[-1] >= 17)
    os.killpg(int(files.process(2).read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 0, output
    assert runs.curve(run) == uninterrupted
    assert replayed_steps(files.metrics) and all(replay.identical for replay in replayed_steps(files.metrics))
    first, second, third = history.ends(RunDir(files.root))
    assert "rank 1 was killed by signal 9" in first.message and "signal 9" in second.message
    assert (third.exit_code, third.after_step) == (0, 44)
    lines = [line for line in output.splitlines() if line.startswith("attempt") and "starts again" in line]
    lost = first.after_step - first.checkpoint
    assert lines[0] == (
        f"attempt 1 ended after step {first.after_step}; step_{first.checkpoint:08d} stays, {lost} steps "
        f"({lost * 1024:,} tokens) are done again; starts again in 1 s "
        "(restart 1 of at most 10 without a new checkpoint)"
    )
    assert len(lines) == 2 and "restart 1 of" in lines[1], "attempt 2 had reached a new checkpoint"


def test_a_full_disk_costs_attempts_but_no_checkpoint_and_the_run_goes_on_once_there_is_room(runs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here; `ernie drill` fills the disk by a limit on file sizes")
    try:
        run, filler = str(disk / "run"), disk / "filler"
        files = RunFiles(disk / "run")
        process = runs.start(run, *ALONE, "checkpoint.every=2 steps", ranks=1, restart=True)
        until(process, lambda: complete_checkpoints(files.checkpoints))
        with suppress(OSError):  # the run writes meanwhile
            filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        os.truncate(filler, filler.stat().st_size - (1 << 19))  # room for records, not for a checkpoint
        until(process, lambda: runs.last_attempt(run) >= 3)
        filler.unlink()
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        assert "No space left on device" in output and "untouched" in output and "Traceback" not in output
        assert all(replay.identical for replay in replayed_steps(files.metrics))
        assert sorted(runs.curve(run)) == list(range(1, 45)), "no step is missing from the record"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_dies_at_one_step_again_and_again_is_given_up_with_the_batch(runs):
    """The tokens of a source are damaged: no such rows exist in the embedding."""
    run, files = "hopeless", runs.files("hopeless")
    overrides = (*ALONE, "split.train=1.0", "split.validation=0.0", "data_dir=damaged")
    process = runs.start(run, *overrides, ranks=1, restart=True)
    until(process, lambda: files.job.is_file() and "herbs" in files.job.read_text())
    folder = Path(json.loads(files.job.read_text())["sources"]["herbs"]["folder"])
    tokens = folder / PreparedSource.open(folder).manifest.tokens_folder / "00000" / "tokens.bin"
    with tokens.open("r+b") as file:  # in place: the ranks may have it mapped
        file.write(b"\x7f" * tokens.stat().st_size)
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1, output
    found = history.ends(RunDir(files.root))
    assert [end.after_step for end in found] == [12] * 3 and found[-1].checkpoint in (5, 10)  # or it was being written
    assert "given up: it died 3 times in a row after step 12" in output
    assert "Perhaps it is the data of step 13: batch 12, stage domain, packed sequences of herbs " in output
    assert [end.given_up for end in found] == [False, False, True]


def test_a_stop_during_start_up_or_between_attempts_is_honoured_within_seconds(runs):
    run, files = "early", runs.files("early")
    process = runs.start(run, *ENDLESS, ranks=1, restart=True)
    until(process, files.process(1).exists)
    asked = time.monotonic()
    assert main(["stop", str(files.root), "--wait"]) == 0
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and time.monotonic() - asked < 5, output
    assert "ended while it was starting up (ernie stop)" in output and not files.metrics.exists()

    process = runs.start(run, *ENDLESS, "restarts.wait=10m", ranks=1, restart=True)
    until(process, lambda: ranks(files, 2))
    os.kill(ranks(files, 2)[0], signal.SIGKILL)
    until(process, files.end(2).exists)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and time.monotonic() - asked < 5, output
    assert "before its first step; there is no checkpoint yet" in output and "starts again in 600 s" in output
    assert not files.attempt(3).exists()


def test_stops_under_way_leave_in_time_and_never_harm_a_checkpoint(runs):
    run, files = "leaving", runs.files("leaving")

    def steps(attempt: int, least: int) -> Callable[[], bool]:
        return lambda: len(runs.steps_of(run, attempt)) >= least

    rarely = (*ENDLESS, "checkpoint.every=100000 steps")
    begun = time.monotonic()
    process = runs.start(run, *rarely, ranks=1, restart=True)  # a rank is told, twice
    until(process, steps(1, 3))
    start = time.monotonic() - begun
    for _ in range(2):
        os.kill(ranks(files, 1)[0], signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "(SIGTERM)" in output, output
    last = runs.steps_of(run, 1)[-1]
    assert complete_checkpoints(files.checkpoints)[0].name == f"step_{last:08d}"

    limit, began = int(1.5 * start) + 8, time.time()  # by itself, before its time is over
    process = runs.start(run, *rarely, f"resources.time_limit={limit}s", ranks=1, restart=True)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "(time limit)" in output, output
    assert events(files, "Stopped")[-1]["time"] < began + limit
    last = runs.steps_of(run, 2)[-1]
    assert complete_checkpoints(files.checkpoints)[0].name == f"step_{last:08d}"

    process = runs.start(run, *rarely, ranks=1, restart=True)  # no time for a save
    until(process, steps(3, 3))
    assert main(["stop", str(files.root), "--notice", "0s"]) == 0
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = runs.steps_of(run, 3)
    stopped = events(files, "Stopped")[-1]
    assert (stopped["repeated_steps"], stopped["repeated_tokens"]) == (len(done), 1024 * len(done))
    assert f"with no time left for a checkpoint; {len(done)} steps" in output
    assert complete_checkpoints(files.checkpoints)[0].name == f"step_{last:08d}"

    process = runs.start(run, *ENDLESS, "checkpoint.every=1 steps", ranks=1, restart=True)  # in the midst of saves
    until(process, lambda: steps(4, 3)() and list(files.checkpoints.glob("*.tmp")))
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert verify(complete_checkpoints(files.checkpoints)[0]) is None
    assert int(complete_checkpoints(files.checkpoints)[0].name[5:]) > last


def test_a_launch_that_was_taken_over_ends_its_ranks_and_says_who_did(runs):
    run, files = "taken", runs.files("taken")
    process = runs.start(run, *ENDLESS, ranks=1, restart=True)
    until(process, lambda: runs.steps_of(run, 1))
    pids = ranks(files, 1)
    other = Holder(2, "token", "n7", "another kernel", 1, "1", attempt=2)
    (files.lease / "00000002.json").write_text(json.dumps(asdict(other)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "n7 (process 1) has taken over this run" in output, output
    deadline = time.monotonic() + 20
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not files.attempt(2).exists() and json.loads((files.lease / "00000002.json").read_text()) == asdict(other)

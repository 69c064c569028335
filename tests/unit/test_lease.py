"""A run directory has one holder, also between hosts; who was taken over can publish nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ernie_dist.spec.errors import LeaseLost, RunDirError
from ernie_dist.spec.lease import Holder, Lease, current, holds, refuse_if_lost
from launcher.run_dir import RunDir

RACER = """
import os, sys
from pathlib import Path
from ernie_dist.spec.lease import Lease

root, dies = Path(sys.argv[1]), int(sys.argv[2])
for turn in range(30):
    lease = Lease.acquire(root, attempt=1, wait=True, say=lambda text: None, beat=0.02)
    inside = root / "inside"
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # raises if another one is in here
    with open(root / "order", "a") as file:
        file.write(f"{lease._holder.number}\\n")
    lease.refuse_if_lost()
    inside.unlink()
    if turn == dies:
        os._exit(9)  # without letting go
    lease.release()
"""


def elsewhere(run: Path, number: int = 1, attempt: int = 3, **more: object) -> Holder:
    """A lease as a launch on another host would have left it: its process cannot be looked at from here."""
    holder = Holder(number, f"token {number}", "n7", "another kernel", 4711, "1", attempt=attempt, **more)  # type: ignore[arg-type]
    (run / "lease").mkdir(exist_ok=True)
    (run / "lease" / f"{number:08d}.json").write_text(json.dumps(asdict(holder)))
    return holder


def test_processes_that_race_hold_it_one_at_a_time_also_after_some_died_with_it(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(dies)], stderr=subprocess.PIPE, text=True)
        for dies in (10, 20, 99, 99)
    ]
    said = [(racer.communicate(timeout=120)[1], racer.returncode) for racer in racers]
    assert [code for _, code in said] == [9, 9, 0, 0], said
    numbers = [int(line) for line in (tmp_path / "order").read_text().split()]
    assert numbers == sorted(set(numbers)) and len(numbers) == 11 + 21 + 30 + 30, "a number is given once, and in order"
    assert len(list((tmp_path / "lease").glob("*.json"))) == 1


def test_a_holder_elsewhere_is_dead_once_its_heart_stands_still_and_can_publish_nothing_then(tmp_path: Path) -> None:
    old = Lease(tmp_path / "lease", elsewhere(tmp_path), taken_over=False, beat=0.05)
    refuse_if_lost(tmp_path, 3)
    heard: list[str] = []
    begun = time.monotonic()
    with pytest.raises(RunDirError, match=r"another launch is running in it, on n7 \(process 4711\).*--wait"):
        Lease.acquire(tmp_path, attempt=2, say=heard.append, beat=0.05, patience=20)
    assert time.monotonic() - begun < 5 and "watching for up to 20 s" in heard[0]

    old._over.set()  # its host stands still
    old._thread.join()
    new = Lease.acquire(tmp_path, attempt=2, say=heard.append, beat=0.05, patience=0.3)
    assert new.taken_over and not holds(tmp_path, 3) and holds(tmp_path, 4)
    with pytest.raises(LeaseLost, match="attempt 3 may not publish any more: attempt 4 owns the run") as error:
        refuse_if_lost(tmp_path, 3)
    assert (error.value.exit_code, error.value.final) == (1, True)
    with pytest.raises(LeaseLost, match="has taken over"):  # and it wakes up
        old.begin(5)
    old.release()
    new.begin(6)
    assert holds(tmp_path, 6) and not holds(tmp_path, 5)
    new.release()
    assert not Lease.acquire(tmp_path, attempt=7).taken_over, "what was let go needs no watching"


def test_who_claims_a_number_that_has_come_and_gone_does_not_hold_anything(tmp_path: Path) -> None:
    from ernie_dist.spec.lease import _claim

    seen = elsewhere(tmp_path, 3)
    elsewhere(tmp_path, 5)
    assert _claim(tmp_path / "lease", seen, 1) is None
    assert current(tmp_path / "lease") == replace(seen, number=5, token="token 5")


def test_taking_over_takes_unfinished_checkpoints_away_from_one_that_is_about_to_rename_them(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("step_00000005", "step_00000010.tmp"):
        (run.files.checkpoints / name).mkdir(parents=True)
        (run.files.checkpoints / name / "COMPLETE").touch()
    dead = subprocess.Popen([sys.executable, "-c", f"""
from pathlib import Path
from ernie_dist.spec.lease import Lease
import os
Lease.acquire(Path({str(tmp_path)!r}), attempt=1)
os._exit(9)
"""])  # fmt: skip
    assert dead.wait(timeout=60) == 9
    assert run.holder() is not None and not run.is_running()
    with run.owned() as lease:
        assert lease.taken_over and run.is_running()
        assert [path.name for path in run.files.checkpoints.iterdir()] == ["step_00000005"]
    assert not run.is_running()

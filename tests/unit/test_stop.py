"""A request to stop is seen at once, never lost to another one, and leaves time for a save where a save fits."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from ernie_dist.spec.stop_file import DEADLINE, StopNote, ask, ask_once, read
from ernie_dist.stop import StopRequest
from ernie_dist.world import World
from launcher.launch import _signals_become
from launcher.run_dir import RunDir


def test_any_file_is_a_request_and_a_signal_does_not_overwrite_a_notice(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    assert read(file) is None
    for text, reason in (("", "stop file"), ("maintenance\n", "maintenance"), ("[1]", "[1]"), ('{"a": 1}', '{"a": 1}')):
        file.write_text(text)
        assert read(file) == StopNote(reason)
    ask(file, StopNote("ernie stop", notice=30))
    ask_once(file, StopNote("SIGTERM"))
    assert read(file) == StopNote("ernie stop", notice=30)
    assert list(tmp_path.iterdir()) == [file]


def test_a_save_is_made_if_it_fits_into_the_notice(tmp_path: Path) -> None:
    ours, attempts = tmp_path / "stop", tmp_path / "attempt_stop"
    stop = StopRequest((ours, attempts), World())
    assert not stop.requested() and stop.seconds_left() is None and stop.save_fits()
    ask(attempts, StopNote("SIGUSR1"))
    assert stop.pending() and stop.reason() == "SIGUSR1" and stop.save_fits(), "no notice: there is time"
    ask(ours, StopNote("ernie stop", notice=100))
    time.sleep(1.2)  # nobody asks, as in a long step: the notice runs all the same
    left = stop.seconds_left()
    assert left is not None and 95 < left < 99.6
    assert stop.save_fits(), "what a save takes is not known yet"
    stop.saved(60)
    assert stop.requested() and stop.save_fits()
    stop.saved(70)
    assert not stop.save_fits(), "70 s and half as much again do not fit into 98 s"
    ask(ours, StopNote("later", notice=1000))
    assert stop.requested() and stop.reason() == "later" and stop.seconds_left() <= left  # type: ignore[operator]


def test_the_time_limit_stops_a_run_early_enough_for_a_step_and_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEADLINE, str(time.time() + 3))
    begun = time.monotonic()
    stop = StopRequest((tmp_path / "stop",), World(), saves=[0.4])
    while not stop.requested():
        time.sleep(0.3)  # a step
    assert 0.8 < time.monotonic() - begun < 2.4, "3 s, less a step of 0.3 s, a save of 0.6 s and 0.3 s to end"
    assert stop.reason() == "time limit" and stop.save_fits()
    monkeypatch.setenv(DEADLINE, str(time.time() + 100))
    first = StopRequest((tmp_path / "stop",), World())
    assert not first.pending() and first.save_fits()


def test_a_signal_adds_to_what_a_person_asked_and_never_takes_its_place(tmp_path: Path) -> None:
    stop, left = tmp_path / "stop", iter([None, 12.0, 9.0])
    for before, reason, notice in (
        (None, "SIGUSR1", None),
        (StopNote("SIGUSR1"), "SIGTERM", 12.0),
        (StopNote("ernie stop", notice=30), "ernie stop", 9.0),
    ):
        stop.unlink(missing_ok=True)
        if before:
            ask(stop, before)
        with _signals_become(stop, lambda: next(left)):
            signal.raise_signal(signal.SIGTERM if reason == "SIGTERM" else signal.SIGUSR1)
        note = read(stop)
        assert note == StopNote(reason, notice)
        assert note.by_scheduler == (reason != "ernie stop")


def test_a_stop_that_is_asked_for_while_a_launch_waits_is_not_forgotten(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    ask(first.files.stop, StopNote("of the last launch"))
    with first.owned():
        assert not first.files.stop.exists()
        ask(first.files.stop, StopNote("ernie stop"))
        thread = threading.Thread(target=lambda: asked.append(_stop_seen_by(second)))
        asked: list[StopNote | None] = []
        thread.start()
        time.sleep(0.3)
        ask(first.files.stop, StopNote("for the next one too"))
    thread.join(timeout=60)
    assert asked == [StopNote("for the next one too")]


def _stop_seen_by(run: RunDir) -> StopNote | None:
    with run.owned(wait=True):
        return read(run.files.stop)

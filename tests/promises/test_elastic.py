"""A run goes on with other ranks and another ZeRO stage: the same data in the same order, the same curve."""

from __future__ import annotations

import signal
import time

import pytest

from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.trusted_files import entry

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

LEGS = ((2, "zero2", 4), (1, "zero2", 8), (4, "zero2_offload", 12), (2, "zero3", 39), (2, "zero1", 44))
"""ranks, policy, and the step after which they change: under ZeRO-3 the last stage begins, which compares answers"""


def test_ranks_zero_stage_and_offload_may_change_at_every_restart(runs, uninterrupted):
    run, files = "elastic", runs.files("elastic")
    for attempt, (ranks, policy, end) in enumerate(LEGS, start=1):
        process = runs.start(run, f"engine.ds_config={policy}", ranks=ranks)
        while attempt < len(LEGS) and (runs.steps_of(run, attempt) or [0])[-1] < end:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        if attempt < len(LEGS):
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == (75 if attempt < len(LEGS) else 0), output
        if attempt > 1:
            assert "saved with" in output and "goes on with" in output, "a person is told what changed"

    curve = runs.curve(run)
    assert [curve[step][2] for step in curve] == [uninterrupted[step][2] for step in uninterrupted]
    assert [line["learning_rate"] for line in read_metrics(files.metrics)] == [
        line["learning_rate"] for line in read_metrics(runs.files("uninterrupted").metrics)
    ]
    for step, (loss, norm, _) in curve.items():
        expected_loss, expected_norm, _ = uninterrupted[step]
        assert loss == pytest.approx(expected_loss, rel=1e-5), f"step {step}"
        assert norm == pytest.approx(expected_norm, rel=1e-4), f"step {step}"
    restored = [event for event in read_events(files.events) if event["event"] == "Restored"]
    assert [bool(event["converted"]) for event in restored] == [True] * (len(LEGS) - 1)


def test_a_conversion_is_made_once_and_kept_and_what_is_impossible_says_what_is_possible(runs):
    run, files = "converted", runs.files("converted")
    process = runs.start(run)
    while len(runs.steps_of(run, 1)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) and process.returncode == 75

    for ranks, override, said in (
        (3, "engine.ds_config=zero2", "use 1, 2, 4, 8 ranks"),
        (2, "engine.ds_config=zero0", "zero0 can neither be converted"),
        (1, "engine.kind=plain", "the engine of a run cannot change"),
    ):
        refused = runs.start(run, override, ranks=ranks)
        output, _ = refused.communicate(timeout=60)
        assert refused.returncode == 2 and said in output and "Traceback" not in output, output

    kept = {}
    for attempt in (2, 3):  # killed before its first checkpoint, and again
        process = runs.start(run, "checkpoint.every=100 steps", ranks=1)
        runs.kill_when(run, process, lambda a=attempt: len(runs.steps_of(run, a)) > 0)
        [folder] = files.checkpoints.glob("step_*.universal")
        kept[attempt] = {path: (path.stat().st_mtime_ns, entry(path)) for path in folder.rglob("*.pt")}
    assert kept[2] == kept[3] and len(kept[2]) > 20

"""Whether a run is started again, from how its attempts ended; and how they ended, from the files they left."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ernie_dist.spec.resilience import RestartSpec
from launcher import history
from launcher.base import CRASHED, FINISHED, STOPPED, WRONG
from launcher.restart import AttemptEnd, GiveUp, Over, Restart, decide, without_progress
from launcher.run_dir import RunDir

SPEC = RestartSpec(max=4, same_step=3, wait=timedelta(seconds=5))


def crash(after: int | None, checkpoint: int = 10, before: int = 10, **more: Any) -> AttemptEnd:
    return AttemptEnd(
        1, more.pop("code", CRASHED), after_step=after, checkpoint_before=before, checkpoint=checkpoint, **more
    )


forward = crash(17, checkpoint=15)
TABLE: dict[str, tuple[list[AttemptEnd], Over | Restart | str]] = {
    "finished": ([crash(36, code=FINISHED)], Over(FINISHED)),
    "a wrong job is not tried again": ([crash(3, code=WRONG)], Over(WRONG)),
    "a stop is the caller's": ([crash(3, code=STOPPED)], Over(STOPPED)),
    "the first crash": ([crash(12)], Restart(5, 1)),
    "a crash without any checkpoint": ([crash(3, checkpoint=0, before=0)], Restart(5, 1)),
    "waits double": ([crash(11), crash(12), crash(13)], Restart(20, 3)),
    "an unknown exit code is a crash": ([crash(11, code=-9)], Restart(5, 1)),
    "what says it is final is final": ([crash(12, final=True)], "end in the same way"),
    "too many": ([crash(11 + number) for number in range(5)], "4 restarts in a row reached no new checkpoint"),
    "a start-up that fails counts": ([crash(None)] * 5, "4 restarts in a row"),
    "a start-up that fails is no step": ([crash(None)] * 3, Restart(20, 3)),
    "progress begins anew": ([crash(11), crash(12), crash(13), forward], Restart(5, 1)),
    "and counts from there": ([crash(11), crash(12), forward, crash(18)], Restart(10, 2)),
    "one that moves is never given up": ([crash(5 * n + 2, 5 * n, 5 * n - 5) for n in range(1, 99)], Restart(5, 1)),
    "the same step": ([crash(12)] * 3, "died 3 times in a row after step 12"),
    "the same step, after progress once": ([forward, crash(17), crash(17)], "died 3 times in a row after step 17"),
    "the same step, failed starts between": ([crash(12), crash(None), crash(12), crash(12)], "3 times in a row"),
    "a full disk is no death at a step": ([crash(12, kind="CheckpointWriteError")] * 3, Restart(20, 3)),
    "another step between": ([crash(12), crash(12), crash(13), crash(12)], Restart(40, 4)),
    "a stop begins a new row": ([crash(12), crash(12), crash(14, code=STOPPED), crash(12)], Restart(5, 1)),
    "nodes that are taken away": ([crash(12, code=STOPPED, again=True)], Restart(0, 1)),
    "nodes that are taken away, with a checkpoint": ([crash(17, 15, code=STOPPED, again=True)], Restart(0, 0)),
    "a cluster that leaves no time": ([crash(12, code=STOPPED, again=True)] * 5, "5 restarts in a row reached no new"),
    "so does launching what was given up": ([crash(12), crash(12), crash(12, given_up=True), crash(12)], Restart(5, 1)),
}  # fmt: skip


def test_attempts_without_progress_are_counted_however_they_ended() -> None:
    stopped, killed = crash(12, code=STOPPED), crash(None)
    assert [without_progress(ends) for ends in ([], [forward], [stopped], [forward, killed, stopped])] == [0, 0, 1, 2]
    given_up = crash(12, given_up=True)
    assert without_progress([stopped, given_up]) == 0 and without_progress([stopped, given_up, killed]) == 1


@pytest.mark.parametrize("name", TABLE)
def test_policy(name: str) -> None:
    ends, expected = TABLE[name]
    decision = decide(SPEC, ends)
    if isinstance(expected, str):
        assert isinstance(decision, GiveUp) and expected in decision.reason
    else:
        assert decision == expected


def test_the_longest_wait_is_ten_minutes_and_no_restarts_are_none() -> None:
    many = SPEC.model_copy(update={"max": 1000})
    assert decide(many, [crash(number) for number in range(500)]) == Restart(600, 500)
    assert isinstance(decide(SPEC.model_copy(update={"max": 0}), [forward]), GiveUp)
    assert decide(SPEC, [crash(12)] * 3).suspect == 13  # type: ignore[union-attr]


def test_ends_are_facts_of_the_run_directory_and_survive_the_launcher(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.files.job.write_text("{}")
    lines = [json.dumps({"step": step, "attempt": 1}) for step in range(1, 13)]
    events: list[dict[str, Any]] = [{"event": "AttemptStarted", "attempt": 1, "step": 0}, {"event": "StageStarted"}]
    (run.files.checkpoints / "step_00000010").mkdir(parents=True)
    (run.files.checkpoints / "step_00000010" / "COMPLETE").touch()
    for attempt in (1, 2, 3):
        assert run.new_attempt() == attempt
        if attempt == 1:  # died in its twelfth step, and a line with it; nobody was left to write end.json
            (run.files.attempt(1) / "launch.json").write_text(json.dumps({"checkpoint": 0}))
            run.files.metrics.write_text("\n".join(lines) + '\n{"step": 13, "att')
        if attempt == 2:  # died in its first step
            events += [{"event": "AttemptStarted", "attempt": 2, "step": 10}, {"event": "StageStarted"}]
        run.files.events.write_text("".join(json.dumps(event) + "\n" for event in events))
        history.ends(run)
    facts = [(end.after_step, end.checkpoint_before, end.checkpoint) for end in history.ends(run)]
    assert facts == [(12, 0, 10), (10, 10, 10), (None, 10, 10)]
    assert {end.exit_code for end in history.ends(run)} == {CRASHED}


def test_a_rank_that_was_killed_is_the_cause_whatever_the_others_say(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.files.attempt(1).mkdir(parents=True)
    error = {"rank": 0, "kind": "CheckpointError", "message": "connection closed by peer", "exit_code": 2}
    run.files.error(1).write_text(json.dumps(error))
    assert history.cause(run, 1, 1).exit_code == WRONG
    summary = "  rank      : {} (local_rank: {})\n  exitcode  : {} (pid: 77)\n  error_file: <N/A>\n"
    log = run.files.attempt(1) / "node_0000.log"
    log.write_text(summary.format(0, 0, 1) + summary.format(1, 1, -9))
    found = history.cause(run, 1, 1)
    assert found.exit_code == CRASHED and "rank 1 was killed by signal 9" in found.message
    for victim in (-15, -6):  # torchrun ends the others so, and NCCL those that lost a neighbour
        log.write_text(summary.format(1, 1, victim))
        assert history.cause(run, 1, 1).exit_code == WRONG
    run.files.error(1).unlink()
    assert "signal 6" in history.cause(run, 1, 1).message
    for number, host in enumerate(("n1", "n2")):
        run.files.node(1, number).parent.mkdir(exist_ok=True)
        content = {"host": host, "ranks": [number, number], **({"unhealthy": "a full disk"} if number else {})}
        run.files.node(1, number).write_text(json.dumps(content))
    found = history.cause(run, 1, 1)
    assert (found.kind, found.message) == ("UnfitNode", "a node is not fit: n2: a full disk")

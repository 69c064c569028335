"""Steps whose numbers cannot be right leave no trace in the model, and a run gets past data that keeps making them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ernie_dist.data.curriculum import Curriculum
from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.events.history import read_events, read_metrics, replayed_steps
from ernie_dist.progress import Progress
from ernie_dist.report import build_report
from ernie_dist.report.data import collect
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.run_files import RunFiles, complete_checkpoints
from launcher.quickstart_data import write_data
from launcher.run_dir import RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
HERE = Path(__file__).parent
LONE_NAN, LONE_SPIKE = 5, 16
BORDER, END = range(9, 11), range(20, 22)
"""NaN twice in a row: over the border of two stages, and at the end of the job"""
FAULTS = {"nan": [LONE_NAN, *BORDER, *END], "spike": [LONE_SPIKE]}


class Faulty:
    """A job of two stages, 10 and 12 batches; runs of it with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = yaml.safe_load((HERE.parent / "promises" / "job.yaml").read_text(encoding="utf-8"))
        raw["sources"] = {"stories": raw["sources"]["stories"]}
        stage = {"sequence_length": 64, "mixture": {"stories": 1.0}}
        raw["curriculum"] = [
            {"name": "one", "duration": "10 steps", **stage},
            {"name": "two", "duration": "12 steps", **stage},
        ]
        raw["tokens_per_batch"] = 768
        raw["schedule"]["peak"] = 1e-3
        raw["bad_numbers"] = {"window": 8, "patience": 2, "rewinds": 2, "compare_ranks": "1 steps"}
        self.raw, self.prepared = raw, prepare(parse_job(raw, "job.yaml"), show_progress=False)

    def freeze(self, name: str, *, every: int = 4, ranks: int = 1, **changes: object) -> RunDir:
        """On one rank without DeepSpeed, which starts sooner; on several with it."""
        engine = {"kind": "plain"} if ranks == 1 else self.raw["engine"]
        ours = {"engine": engine, "checkpoint": {"every": f"{every} steps"}, "resources": {"gpus_per_node": ranks}}
        raw = {**self.raw, **ours, **changes}
        run_dir = RunDir(self.folder / name)
        run_dir.freeze(resolve_prepared(parse_job(raw, "job.yaml"), self.prepared))
        return run_dir

    def attempt(self, run_dir: RunDir, faults: dict) -> dict:
        """One attempt; how it ended."""
        run_dir.files.stop.unlink(missing_ok=True)  # as whoever takes over the run does
        number, ranks = run_dir.new_attempt(), run_dir.job().spec.resources.gpus_per_node
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        arguments = [str(HERE / "fault_worker.py"), str(run_dir.root), str(number), json.dumps({"spike": [], **faults})]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, check=False)
        ending = run_dir.ending(number)
        assert ending is not None, done.stderr[-3000:]
        return ending


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    folder = tmp_path_factory.mktemp("faulty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(folder / "data")
        yield Faulty(folder)


def of_kind(files: RunFiles, kind: str) -> list[dict]:
    return [event for event in read_events(files.events) if event["event"] == kind]


def curve(files: RunFiles) -> list[tuple]:
    keys = ("step", "stage", "batch_hash", "consumed_tokens", "learning_rate", "applied")
    return [
        (*(line[key] for key in keys), repr(line["loss"]), repr(line["grad_norm"]))
        for line in read_metrics(files.metrics)
    ]


def rows(files: RunFiles) -> list[tuple[str, int]]:
    """When held-out losses were measured, as the report tells it."""
    return [(row.stage, row.step) for row in collect(files.root).matrix]


def test_refused_updates_change_nothing_and_bad_stretches_are_skipped_however_often_the_run_is_interrupted(faulty):
    run_dir = faulty.freeze("often", every=4)
    files, job = run_dir.files, run_dir.job()
    for last in (BORDER, END):
        ending = faulty.attempt(run_dir, FAULTS)
        assert (ending["kind"], ending["exit_code"], ending["final"]) == ("BadNumbersError", 1, False)
        assert f"skips batches {last[0]} to {last[-1]}" in ending["message"] and "nan" in ending["message"]
    assert faulty.attempt(run_dir, FAULTS) == {"exit_code": 0}

    places = Curriculum(job)
    ids = {index: places.locate(index)[2].tolist() for index in range(22)}
    refused = of_kind(files, "UpdateRefused")
    assert {event["batch_index"] for event in refused} == {LONE_NAN, LONE_SPIKE, *BORDER, *END}
    assert all(event["sequence_ids"] == ids[event["batch_index"]] for event in refused)
    reasons = {event["batch_index"]: event["reason"] for event in refused}
    assert "nan" in reasons[LONE_NAN] and "standard deviations" in reasons[LONE_SPIKE]
    for attempt in (1, 2):  # the third has no batch left
        for index, changed in json.loads((files.attempt(attempt) / "touched.json").read_text()).items():
            assert changed == (int(index) not in reasons), f"batch {index} in attempt {attempt}"

    said = files.rank_log(1, 0).read_text(encoding="utf-8")
    assert said.count(f"the update is refused (batch {LONE_NAN}): the loss is nan") == 1
    assert "the engine skipped" not in said and "batches 9 to 10 are skipped from now on" in said

    skipped = json.loads(files.skipped_batches.read_text())
    assert [(window["first"], window["end"], window["step"], window["attempt"]) for window in skipped] == [
        (9, 11, 10, 1),
        (20, 22, 19, 2),
    ]
    assert [window["sequence_ids"] for window in skipped] == [ids[9] + ids[10], ids[20] + ids[21]]
    told = [{key: event[key] for key in skipped[0]} for event in of_kind(files, "BatchesSkipped")]
    assert told == skipped

    consumed = [index for index in range(22) if index not in BORDER and index not in END]
    progress, hashes = Progress.start(), []
    for index in consumed:
        progress = progress.after(places.locate(index)[2])
        hashes.append(progress.batch_hash)
    lines = read_metrics(files.metrics)
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert [line["batch_hash"] for line in lines] == hashes
    assert [line["consumed_tokens"] for line in lines] == [768 * (index + 1) for index in consumed]
    assert [index for index, line in zip(consumed, lines, strict=True) if not line["applied"]] == [LONE_NAN, LONE_SPIKE]
    assert all(replay.identical for replay in replayed_steps(files.metrics))
    assert rows(files) == [("start", 0), ("one", 9), ("two", 18)]
    assert [event["step"] for event in of_kind(files, "CheckpointSaved")] == [4, 8, 10, 14, 18]

    page = build_report(run_dir.root).read_text(encoding="utf-8")
    assert "batches 9 to 10 were never trained on" in page and "batches 20 to 21 were never" in page
    assert reasons[LONE_SPIKE] in page

    # Saved elsewhere, stopped on request in between, and restored right where a skipped stretch begins.
    other = faulty.freeze("seldom", every=9)
    for ending in (1, 75, 1, 0):
        assert faulty.attempt(other, {**FAULTS, "stop": 13 if ending == 75 else -1})["exit_code"] == ending
    assert curve(other.files) == curve(files)
    restored = [event["checkpoint"] for event in of_kind(other.files, "Restored")]
    assert restored == ["step_00000009", "step_00000012", "step_00000016"]
    assert rows(other.files) == rows(files)


def test_with_nothing_to_go_back_to_or_once_too_often_the_run_fails_for_good(faulty):
    early = faulty.freeze("early")
    ending = faulty.attempt(early, {"nan": [1, 2]})
    assert (ending["exit_code"], ending["final"]) == (1, True)
    assert "no checkpoint to go back to" in ending["message"] and "batches 1 to 2" in ending["message"]
    assert not early.files.skipped_batches.exists()

    again = faulty.freeze("again", bad_numbers={"patience": 1, "rewinds": 1})
    faults = {"nan": [6, 8]}
    assert not faulty.attempt(again, faults)["final"]
    ending = faulty.attempt(again, faults)
    assert (ending["exit_code"], ending["final"]) == (1, True)
    assert "gone back 1 time(s) already" in ending["message"]


def test_ranks_skip_together_and_one_whose_parameters_differ_is_named_and_nothing_is_saved_from_them(faulty):
    run_dir = faulty.freeze("ranks", ranks=3, every=3)
    files = run_dir.files
    assert faulty.attempt(run_dir, {"nan": [3, 6, 7]})["kind"] == "BadNumbersError"
    assert complete_checkpoints(files.checkpoints)[0].name == "step_00000006"
    touched = json.loads((files.attempt(1) / "touched.json").read_text())
    assert [int(index) for index, changed in touched.items() if not changed] == [3, 6, 7]

    ending = faulty.attempt(run_dir, {"flip": [1, 10]})
    assert (ending["kind"], ending["exit_code"], ending["final"]) == ("RanksDiffer", 1, False)
    assert ending["message"].startswith("after step 9 rank 1 differ(s) from the 2 others")
    assert complete_checkpoints(files.checkpoints)[0].name == "step_00000007", "of batch 9, and none of batch 10"

    assert faulty.attempt(run_dir, {}) == {"exit_code": 0}
    assert [line["step"] for line in read_metrics(files.metrics)] == list(range(1, 21))
    assert all(replay.identical for replay in replayed_steps(files.metrics))

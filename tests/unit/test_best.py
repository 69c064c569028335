"""The checkpoint with the lowest held-out loss is kept, and a run ends when that ceases to fall: killed or not."""

import io
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch

from ernie_dist.best import Best
from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.events.history import read_events
from ernie_dist.heartbeat import Heartbeat, Phase
from ernie_dist.report import build_report, collect
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.run_files import best_checkpoint, complete_checkpoints
from ernie_dist.spec.stop_file import StopNote, ask
from ernie_dist.spec.training import EarlyStopSpec
from ernie_dist.train import train
from ernie_dist.world import World
from launcher.cli import main
from launcher.run_dir import RunDir

torch.set_num_threads(1)

JOB = {
    "name": "best",
    "model": {"preset": "ernie-4.5-tiny", "override": {"num_hidden_layers": 1, "hidden_size": 32}},
    "tokenizer": {"train": {"vocab_size": 400}},
    "tokens_per_batch": 256,
    "sources": {"poems": {"path": "poems.jsonl", "text": "text", "repeat": True}},
    "split": {"train": 0.5, "validation": 0.5, "test": 0.0},
    "curriculum": [{"name": "only", "duration": "90 steps", "sequence_length": 64, "mixture": {"poems": 1.0}}],
    "schedule": {"kind": "constant", "peak": 8e-3},
    "engine": {"kind": "plain", "precision": "fp32", "micro_batch_size": 4},
    "checkpoint": {"every": "4 steps", "keep_last": 1},
    "evaluate": {"every": "3 steps", "best": "poems", "early_stop": {"patience": 4}},
}


class Fatal(Heartbeat):
    """Ends the attempt in its own way at one moment of it."""

    def __init__(self, run_dir: RunDir, phase: Phase | None, step: int, how: str) -> None:
        super().__init__()
        self._run_dir, self._moment, self._how = run_dir, (phase, step), how

    def enter(self, phase: Phase, step: int) -> None:
        super().enter(phase, step)
        if (phase, step) == self._moment:
            if self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            ask(self._run_dir.files.stop, StopNote("a test"))


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepared = prepare(parse_job(JOB, "job.yaml"), show_progress=False)

    def freeze(self, name: str, **changes: object) -> RunDir:
        run_dir = RunDir(self.folder / name)
        run_dir.freeze(resolve_prepared(parse_job({**JOB, **changes}, "job.yaml"), self.prepared))
        return run_dir

    def attempt(self, run_dir: RunDir, phase: Phase | None = None, step: int = 0, how: str = "") -> int:
        """In a process of its own; its exit code, negative if it was killed."""
        run_dir.files.stop.unlink(missing_ok=True)
        number, beat = run_dir.new_attempt(), Fatal(run_dir, phase, step, how)

        def run() -> None:
            os._exit(0 if train(run_dir.root, number, World(), io.StringIO(), beat) else 75)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(120)
        return process.exitcode


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, chance = tmp_path_factory.mktemp("best"), random.Random(5)
    words = ["".join(chance.choice("春江花月夜白日依山尽黄河入海流") for _ in range(2)) for _ in range(40)]
    lines = [json.dumps({"text": "".join(chance.choices(words, k=12))}) for _ in range(60)]
    (folder / "poems.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Runs(folder)


def of_kind(run_dir: RunDir, kind: str) -> dict[int, dict]:
    return {event["step"]: event for event in read_events(run_dir.files.events) if event["event"] == kind}


def told(run_dir: RunDir) -> list[tuple]:
    """What was decided, step by step."""
    best, stopped = of_kind(run_dir, "BestCheckpoint"), of_kind(run_dir, "EarlyStopped")
    return [
        *((step, event["checkpoint"], event["loss"]) for step, event in best.items()),
        *((step, event["reason"], event["best_step"]) for step, event in stopped.items()),
    ]


def test_killed_or_stopped_anywhere_the_same_checkpoint_is_best_and_the_run_ends_at_the_same_step(runs: Runs) -> None:
    whole = runs.freeze("whole")
    assert runs.attempt(whole) == 0
    losses = {step: event["loss"] for step, event in of_kind(whole, "Evaluated").items() if step}
    lowest = min(losses, key=lambda step: losses[step])
    ends = lowest + 4 * 3
    assert lowest > 3 and max(losses) == ends < 90, "the job has to overfit in the middle"
    assert told(whole)[-2:] == [
        (lowest, f"step_{lowest:08d}", losses[lowest]),
        (ends, "no lower held-out loss (poems) in 4 evaluations", lowest),
    ]
    kept = complete_checkpoints(whole.files.checkpoints)
    assert [path.name for path in kept] == [f"step_{ends:08d}", f"step_{lowest:08d}"], "beyond keep_last, and no other"
    exported = json.loads((whole.files.export / "ernie_dist.json").read_text())
    assert exported["checkpoint"] == f"step_{lowest:08d}"

    broken = runs.freeze("broken")
    faults = [
        (Phase.EVALUATE, 6, "stop"),  # cuts the evaluation short: the next attempt makes up for it
        (Phase.SAVE, lowest, "kill"),
        (Phase.EVALUATE, lowest, "stop"),
        (Phase.READ, lowest + 1, "kill"),  # after the evaluation made up for, which no checkpoint knows of
        (Phase.STEP, lowest + 2, "kill"),
        (Phase.STEP, lowest + 4, "stop"),
        (Phase.EVALUATE, ends, "stop"),
        (Phase.EXPORT, ends, "kill"),
    ]
    for fault in faults:
        assert runs.attempt(broken, *fault) == (75 if fault[2] == "stop" else -signal.SIGKILL), fault
    assert runs.attempt(broken) == 0
    assert sorted(told(broken)) == sorted(told(whole))
    assert best_checkpoint(broken.files.checkpoints).name == f"step_{lowest:08d}"
    assert (broken.files.export / "model.safetensors").read_bytes() == (
        whole.files.export / "model.safetensors"
    ).read_bytes()
    assert runs.attempt(broken) == 0, "a run that has ended early has nothing left to do"
    assert max(of_kind(broken, "Evaluated")) == ends

    (best_checkpoint(broken.files.checkpoints) / "engine" / "state.pt").write_bytes(b"")
    assert runs.attempt(broken) == 0, "a best one that went bad keeps no run from its end"
    [refused] = [event for event in read_events(broken.files.events) if event["event"] == "CheckpointRefused"]
    assert refused["checkpoint"] == f"step_{lowest:08d}" and "the newest is exported" in refused["reason"]
    assert json.loads((broken.files.export / "ernie_dist.json").read_text())["checkpoint"] == f"step_{ends:08d}"


def test_the_best_one_is_exported_and_shown(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = runs.folder / "whole"
    assert main(["export", str(run_dir), "--to", str(runs.folder / "best"), "--best"]) == 0
    best = best_checkpoint(run_dir / "checkpoints")
    assert json.loads((runs.folder / "best" / "ernie_dist.json").read_text())["checkpoint"] == best.name
    page = build_report(run_dir).read_text()
    assert collect(run_dir).ended_early.startswith("no lower held-out loss (poems) in 4 evaluations")
    assert "The run ended early: no lower held-out loss" in page and f"<code>{best.name}</code>, held-out loss" in page

    plain = runs.freeze("plain", evaluate={"every": "3 steps"}, checkpoint={"every": "4 steps"})
    assert runs.attempt(plain, Phase.STEP, 5, "stop") == 75
    assert main(["export", str(plain.root), "--to", str(runs.folder / "none"), "--best"]) == 2
    assert "no best checkpoint is known; set evaluate.best" in capsys.readouterr().err


def test_what_counts_as_lower() -> None:
    stop = EarlyStopSpec(patience=2, min_delta=0.1)
    best = Best("mean")
    seen = []
    for number, losses in enumerate(([3.0, 1.0], [2.8, 1.1], [2.6, 1.1], [2.6, 1.0], [nan, 1.0], [inf, 0.0]), start=1):
        best = best.after(10 * number, dict(zip("ab", losses, strict=True)), stop)
        seen.append((best.step, best.waited))
    assert seen == [(10, 0), (20, 1), (30, 0), (40, 1), (40, 2), (40, 3)]
    assert best.after(60, {"a": 0.0, "b": 0.0}, stop) is best, "an evaluation made twice counts once"
    assert Best.from_json("mean", json.loads(json.dumps(best.to_json()))) == best
    assert Best.from_json("a", best.to_json()) == Best("a"), "another measure begins anew"
    assert replace(best, source="b").after(70, {"a": 9.0, "b": 0.5}, None).loss == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate": {"best": "poem"}}, 'did you mean "poems"? known: mean, poems'),
        ({"evaluate": {"every": "3 steps", "early_stop": {"patience": 2}}}, "give best (a source, or mean) and every"),
        ({"evaluate": {"best": "mean", "early_stop": {"patience": 2}}}, "give best (a source, or mean) and every"),
        (
            {"curriculum": [*JOB["curriculum"], {**JOB["curriculum"][0], "name": "two"}]},
            "a job of 2 stages cannot end early",
        ),
    ],
)
def test_a_best_that_cannot_be_is_refused(change: dict, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job({**JOB, **change}, "job.yaml")
    assert said in str(caught.value)


def test_a_best_without_held_out_documents_is_refused(runs: Runs) -> None:
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    spec = parse_job({**JOB, "split": split}, "job.yaml")
    with pytest.raises(SpecError, match=r"no held-out documents to measure; give split\.validation a share"):
        resolve_prepared(spec, prepare(spec, show_progress=False))

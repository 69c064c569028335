"""The report of a run: true to its record, whole in one file, and there for a run in any state."""

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ernie_dist.events.event import (
    AttemptStarted,
    CheckpointRefused,
    CheckpointSaved,
    Evaluated,
    EventBus,
    Finished,
    HangDetected,
    MemoryPeaks,
    Preflight,
    Restored,
    StageStarted,
    StepFinished,
    Stopped,
)
from ernie_dist.events.jsonl import JsonlSink
from ernie_dist.progress import Progress
from ernie_dist.report import build_report, collect
from ernie_dist.schedule import learning_rate
from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve
from ernie_dist.spec.run_files import RunFiles

JOB = {
    "name": "ernie-law-medical",
    "model": {"preset": "ernie-4.5-tiny"},
    "tokenizer": {"train": {"vocab_size": 2000}},
    "tokens_per_batch": 4096,
    "sources": {
        "web": {"path": "data/网页.jsonl", "text": "text"},
        "law": {"path": "data/law.jsonl", "text": "text"},
        "medical": {"path": "data/medical.csv", "encoding": "gb18030", "text": "{ask}\n{answer}"},
        "qa": {"path": "data/qa.jsonl", "prompt": "input", "response": "output", "on_bad_row": "quarantine"},
    },
    "curriculum": [
        {"name": "general", "duration": "60 steps", "sequence_length": 256, "mixture": {"web": 1.0}},
        {
            "name": "domain",
            "duration": "40 steps",
            "sequence_length": 512,
            "mixture": {"law": 0.4, "medical": 0.4, "web": 0.2},
        },
        {"name": "sft", "duration": "20 steps", "sequence_length": 256, "mixture": {"qa": 1.0}},
    ],
    "schedule": {"kind": "wsd", "peak": 3e-3, "warmup": "10 steps", "decay": "30 steps", "minimum": 3e-5},
    "evaluate": {"every": "25 steps"},
    "track": {"wandb": {"project": "ernie"}, "tensorboard": True},
}
LEARNT = {"web": {"general": 3.1, "domain": 3.4, "sft": 4.2}, "law": {"general": 5.9, "domain": 2.6, "sft": 3.3}}
LEARNT |= {"medical": {"general": 6.3, "domain": 2.9, "sft": 3.0}, "qa": {"general": 6.8, "domain": 4.9, "sft": 0.4}}


def make_job(folder: Path) -> ResolvedJob:
    """A resolved job over four prepared sources, of which only the manifests exist."""
    spec = parse_job(JOB, "job.yaml")
    sources = {}
    for number, (name, source) in enumerate(spec.sources.items()):
        lengths = {
            length: PackedLength(sequences=4000, tokens=int(4000 * length * (0.999 - 0.01 * number)))
            for length in spec.sequence_lengths(name)
        }
        home = folder / "prepared" / name / "0123456789abcdef"
        home.mkdir(parents=True)
        manifest = {
            "name": name,
            "rows": 12345 + number,
            "documents": 12300 + number,
            "quarantined": 7 if name == "qa" else 0,
            "duplicates": 31 * number,
            "splits": {
                "train": {"documents": 12000, "tokens": 1_000_000},
                "validation": {"documents": 300, "tokens": 25_000},
                "test": {"documents": 0, "tokens": 0},
            },
        }
        (home / "manifest.json").write_text(json.dumps(manifest))
        sources[name] = ResolvedSource(
            folder=str(home), fingerprint="f" * 16, kind=source.kind, packed=lengths, held_out=True
        )
    return resolve(spec, ResolvedTokenizer(folder="tokenizer", fingerprint="t" * 16, vocab_size=2000), sources)


def loss_at(job: ResolvedJob, step: int) -> float:
    stage = job.stage_at(step - 1)
    inside = step - stage.first_batch
    level = {"general": 3.1, "domain": 2.8, "sft": 0.4}[stage.name]
    height = {"general": 4.6, "domain": 3.2, "sft": 4.5}[stage.name]
    noise = 0.12 * math.sin(step * 12.9898) * math.sin(step * 78.2)
    return level + height * math.exp(-inside / (stage.batches / 5)) + noise


def ends_stage(job: ResolvedJob, step: int) -> bool:
    return any(step == stage.end_batch for stage in job.stages)


def evaluate(bus: EventBus, job: ResolvedJob, step: int) -> None:
    stage = "start" if step == 0 else job.stage_at(step - 1).name
    ends = step == 0 or ends_stage(job, step)
    for source, learnt in LEARNT.items():
        loss = 7.6 if step == 0 else learnt[stage] if ends else learnt[stage] + 0.6
        bus.emit(Evaluated(step, stage, source, loss, 20_000, job.consumed_tokens(step), ends))


def run_attempt(
    job: ResolvedJob, files: RunFiles, number: int, first: int, last: int, *, evaluated: bool = True
) -> None:
    """What a real attempt emits that restores after step `first` and is killed after `last`, unless that is the end."""
    bus = EventBus([JsonlSink(files)])
    bus.emit(Preflight(number, (f"n{number}", "n9"), 0.4, 0.00021, 1.3e9))
    if first:
        bus.emit(Restored(number, first, job.consumed_tokens(first), f"step_{first:08d}", 0.8))
    versions = {"ernie_dist": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
    total = (job.total_batches, job.total_tokens)
    bus.emit(AttemptStarted(number, first, *total, 2, "cpu", "deepspeed zero2", 1_234_567, versions))
    if first == 0 and evaluated:
        evaluate(bus, job, 0)
    for step in range(first + 1, last + 1):
        stage = job.stage_at(step - 1)
        if step - 1 == stage.first_batch:
            bus.emit(StageStarted(step - 1, stage.name, 0, stage.batches, stage.first_token))
        bus.emit(
            StepFinished(
                step=step,
                stage=stage.name,
                loss=loss_at(job, step),
                learning_rate=learning_rate(job, Progress(step - 1, step - 1, "")),
                grad_norm=1.0 + 1.0 / step,
                consumed_tokens=job.consumed_tokens(step),
                loss_tokens=4000,
                tokens_per_second=5000.0 + 300 * math.sin(step),
                mfu=None,
                attempt=number,
                batch_hash=f"{step * 0x9E3779B97F4A7C15 % (1 << 64):016x}",
                applied=True,
            )
        )
        if evaluated and (ends_stage(job, step) or step % 25 == 0):
            evaluate(bus, job, step)
        if step % 30 == 0:
            bus.emit(CheckpointSaved(step, f"step_{step:08d}", 123_456_789, 0.7, 0.1))
    if last > first:
        size = 30_000_000_000 + number
        bus.emit(MemoryPeaks(last, number, {"read": (9, 0), "step/general": (size, 1), "start": (7, 0)}, 80 << 30))
    if last == job.total_batches:
        bus.emit(Finished(last, job.total_tokens, str(files.export)))
    bus.close()


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


@pytest.fixture
def job(tmp_path: Path, files: RunFiles) -> ResolvedJob:
    files.root.mkdir()
    job = make_job(tmp_path)
    job.write(files.job)
    return job


@pytest.fixture
def interrupted(job: ResolvedJob, files: RunFiles) -> RunFiles:
    """A finished run whose first attempt was killed seven steps after its last checkpoint."""
    run_attempt(job, files, 1, 0, 67)
    run_attempt(job, files, 2, 60, job.total_batches)
    (files.checkpoints / "step_00000120").mkdir(parents=True)
    (files.checkpoints / "step_00000120" / "COMPLETE").touch()
    return files


class Loads(HTMLParser):
    """Everything a page would fetch, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        loading = ("src", "href", "srcset", "data", "poster", "action", "xlink:href")
        for name, value in attributes:
            if name in loading and not value.startswith("#"):
                self.loads.append(value)
            if name == "style" and "url(" in value.replace("url(#", ""):
                self.loads.append(value)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" in self.open:
            self.loads += re.findall(r"@import|url\([^#].*?\)", data)
        else:
            self.text += data


def test_page_is_whole_and_says_everything(interrupted, job):
    page = build_report(interrupted.root)
    assert page == interrupted.report
    parsed = Loads(page)
    assert parsed.loads == []
    raw = page.read_text(encoding="utf-8")
    assert "http://" not in raw and "https://" not in raw and "<script" not in raw
    for name in [*LEARNT, "general", "domain", "sft", "deepspeed zero2", "data/网页.jsonl", "2.13.0"]:
        assert name in parsed.text, name
    assert "All 7 are identical." in parsed.text
    assert interrupted.loss_curve.read_bytes().startswith(b"\x89PNG")


def test_summary_agrees_with_the_record(interrupted, job):
    run = collect(interrupted.root)
    assert (run.steps, run.tokens, run.outcome) == (120, job.total_tokens, "finished")
    assert [(stage.name, stage.steps, stage.finished) for stage in run.stages] == [
        ("general", 60, True),
        ("domain", 40, True),
        ("sft", 20, True),
    ]
    assert run.stages[0].loss_first == pytest.approx(sum(loss_at(job, step) for step in range(1, 7)) / 6)
    assert run.stages[2].loss_last == pytest.approx(sum(loss_at(job, step) for step in (119, 120)) / 2)
    assert run.stages[2].perplexity_before == pytest.approx(math.exp(4.9))
    assert run.stages[2].perplexity_after == pytest.approx(math.exp(0.4))
    domain = run.stages[1]
    assert domain.perplexity_after == pytest.approx(math.exp(0.4 * 2.6 + 0.4 * 2.9 + 0.2 * 3.4))
    assert [row.stage for row in run.matrix] == ["start", "general", "domain", "sft"]
    forgotten = run.matrix[3].cells["web"]
    assert (forgotten.loss, forgotten.trained) == (4.2, False) and forgotten.change == pytest.approx(0.8)
    assert [(a.number, a.outcome, a.restored_from, a.steps) for a in run.attempts] == [
        (1, "killed", None, 67),
        (2, "finished", "step_00000060", 60),
    ]
    assert [attempt.nodes for attempt in run.attempts] == [("n1", "n9"), ("n2", "n9")]
    assert run.attempts[1].network == "all-reduce in 0.21 ms, bus bandwidth 1.3 GB/s"
    assert [(one.what, one.bytes, one.rank, one.attempt) for one in run.memory] == [
        ("building model and engine, reading a checkpoint", 7, 0, 1),
        ("steps of general", 30_000_000_002, 1, 2),
    ]
    assert run.memory[1].share == pytest.approx(0.349, abs=1e-3)
    assert len(run.replays) == run.identical_replays == 7
    assert [(c.step, c.kept) for c in run.checkpoints] == [(30, False), (60, False), (90, False), (120, True)]
    qa = run.sources[3]
    assert (qa.rows, qa.tokens, qa.quarantined, qa.splits["validation"]) == (12348, 1_025_000, 7, 300)
    assert qa.padding == {"sft": pytest.approx(0.031, abs=1e-3)}
    assert run.stages[0].padding == pytest.approx(0.001, abs=1e-3)


def test_one_bit_of_difference_is_shown(interrupted, job):
    lines = interrupted.metrics.read_text().splitlines()
    last = json.loads(lines[-60 + 2])
    assert (last["step"], last["attempt"]) == (63, 2)
    last["loss"] = math.nextafter(last["loss"], 9)
    lines[-60 + 2] = json.dumps(last)
    interrupted.metrics.write_text("\n".join(lines) + "\n")
    assert collect(interrupted.root).identical_replays == 6
    assert "1 of 7 differ." in Loads(build_report(interrupted.root)).text


@pytest.mark.parametrize(("steps", "evaluated"), [(0, False), (1, False), (1, True), (77, True)])
def test_unfinished_runs_have_a_report(job, files, steps, evaluated):
    run_attempt(job, files, 1, 0, steps, evaluated=evaluated)
    run = collect(files.root)
    assert (run.steps, run.outcome) == (steps, "running or killed")
    assert ("No evaluation yet" in Loads(build_report(files.root)).text) is not evaluated


def test_a_job_that_never_started_has_a_report(job, files):
    assert "not started" in Loads(build_report(files.root)).text


def test_stopped_refused_not_finite_and_without_data(job, files, tmp_path):
    """What goes wrong in a run must not keep its report from being written."""
    run_attempt(job, files, 1, 0, 40)
    bus = EventBus([JsonlSink(files)])
    broken = {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.0, "tokens_per_second": 1.0, "mfu": 0.41}
    data = {"stage": "general", "consumed_tokens": 41 * 4096, "loss_tokens": 1, "batch_hash": ""}
    bus.emit(StepFinished(step=41, attempt=1, applied=False, **data, **broken))
    bus.emit(CheckpointRefused("step_00000030", "engine/shard <0> does not verify"))
    bus.emit(Stopped(41, "SIGTERM"))
    bus.close()
    for manifest in (tmp_path / "prepared").rglob("manifest.json"):
        manifest.unlink()
    text = Loads(build_report(files.root)).text
    for words in ["stopped", "SIGTERM", "engine/shard <0> does not verify", "1 without an update"]:
        assert words in text, words


def test_a_hang_slow_ranks_and_lost_time_are_told(job, files):
    run_attempt(job, files, 1, 0, 3)
    bus = EventBus([JsonlSink(files)])
    same = {"stage": "general", "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.0, "tokens_per_second": 4096.0}
    same |= {"loss_tokens": 1, "batch_hash": "", "mfu": None, "applied": True, "attempt": 1}
    begun = time.time()
    for step, rank, imbalance in ((4, 5, 1.2), (5, 7, 2.5), (6, 7, 3.5)):
        found = {"slowest_rank": rank, "rank_imbalance": imbalance, "consumed_tokens": step * 4096}
        bus.emit(StepFinished(step=step, time=begun + step, **found, **same))
    bus.emit(HangDetected(1, 6, (7,), "step", 60.0, 50.0, "rank 7 hangs", (), time=begun + 66))
    bus.close()
    run = collect(files.root)
    assert (run.outcome, run.attempts[0].detail) == ("hung", "rank 7 hangs")
    assert [(one.rank, one.windows, one.measured, one.worst, one.worst_step) for one in run.slow] == [(7, 2, 3, 3.5, 6)]
    assert run.time["lost"] == pytest.approx(60.0)
    text = Loads(build_report(files.root)).text
    for words in ["Where the time went", "steps executed again", "Rank 7 was too slow in 2 of 3", "rank 7 hangs"]:
        assert words in text, words


def test_no_run_directory_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="is this a run directory"):
        build_report(tmp_path)


def test_report_needs_no_torch():
    code = "import sys, ernie_dist.report; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

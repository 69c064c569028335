"""From outside the job: one clear message for whatever is wrong, one node command, one owner of a run directory."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.spec.assets import asset_folder
from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.job import load_job, parse_job
from ernie_dist.spec.lease import Holder
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve
from launcher.cli import main
from launcher.node import Nodes, node_command
from launcher.run_dir import RunDir

JOB = """\
name: small
model: {preset: ernie-4.5-tiny}
tokenizer: {train: {vocab_size: 400}}
tokens_per_batch: 512
sources:
  web: {path: web.jsonl, text: text}
  qa:  {path: qa.jsonl, prompt: q, response: a}
split: {train: 1.0, validation: 0.0}
curriculum:
  - {name: general, duration: 2 steps,  sequence_length: 64, mixture: {web: 1.0}}
  - {name: sft,     duration: 2 epochs, sequence_length: 64, mixture: {qa: 1.0}}
schedule: {kind: cosine, peak: 1e-3}
engine: {kind: plain}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job that works, and its data."""
    monkeypatch.chdir(tmp_path)
    web = [{"text": f"line {number} of a small text about rivers and cranes"} for number in range(60)]
    qa = [{"q": f"what is {number}?", "a": f"a number, {number}"} for number in range(20)]
    for name, rows in (("web", web), ("qa", qa)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which has to refuse: exit code 2, and one message on stderr."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert said.startswith("ernie: ") and said.count("ernie: ") == 1 and "Traceback" not in said
        return said

    return run


def edit(old: str, new: str) -> None:
    assert JOB.count(old) == 1
    Path("job.yaml").write_text(JOB.replace(old, new))


# --- bad input ---------------------------------------------------------------------------------------------------

BAD_JOBS = {
    "broken YAML": ("{web: 1.0}}", "{web: 1.0}", ["job.yaml, line 11, column 3", "not valid YAML"]),
    "not a job": (JOB, "- a\n- b\n", ["job.yaml: a job is a YAML mapping", "got list"]),
    "unknown source": ("{web: 1.0}", "{wed: 1.0}", ["curriculum.0.mixture.wed", 'did you mean "web"? known: qa']),
    "weights": ("{web: 1.0}", "{web: 0.9, qa: 0.6}", ["curriculum.0.mixture", "add up to 1.5", "{web: 0.6, qa: 0.4}"]),
    "does not divide": ("tokens_per_batch: 512", "tokens_per_batch: 500", ["tokens_per_batch 500", "448 or 512"]),
    "misspelt field": ("peak: 1e-3", "paek: 1e-3", ["schedule.paek", 'did you mean "peak"?', "schedule.peak"]),
    "two ranks": ("kind: plain}", "kind: plain}\nresources: {nodes: 2}", ["engine.kind", "--ranks 1"]),
    "braces without quotes": ("text: text", "text: {{text}}", ["job.yaml, line 6", "not valid YAML"]),
    "no time at all": ("2 steps", "0 steps", ["curriculum.0.duration", "greater than zero"]),
    "unknown preset": ("4.5-tiny", "4.5-tinny", ["model.preset", 'did you mean "ernie-4.5-tiny"?']),
    "unknown engine file": ("kind: plain", "ds_config: zero7", ["zero7", 'did you mean "zero', "packaged: zero0"]),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["plan", "launch"])
@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_bad_job_is_refused_before_anything_starts(
    here: Path, refusal: Callable[..., str], name: str, verb: str
) -> None:
    old, new, expected = BAD_JOBS[name]
    edit(old, new)
    before = sorted(here.rglob("*"))
    said = refusal(verb, "job.yaml")
    assert [words for words in expected if words not in said] == [], said
    assert sorted(here.rglob("*")) == before, "nothing was written"


def test_ranks_for_a_job_whose_resources_are_no_mapping(here: Path, refusal: Callable[..., str]) -> None:
    edit("engine: {kind: plain}", "resources: 4")
    assert "resources = 4" in refusal("plan", "job.yaml", "--ranks", "2")


def empty(path: Path) -> None:
    path.write_text("\n")


BAD_DATA: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing file": (lambda here: (here / "web.jsonl").unlink(), ["sources.web", "web.jsonl"]),
    "empty source": (lambda here: empty(here / "qa.jsonl"), ["sources.qa", "no documents to train on"]),
    "broken row": (lambda here: (here / "qa.jsonl").write_text('{"q": "?"\n'), ["qa.jsonl:1", "on_bad_row"]),
    "too few tokens": (
        lambda here: edit("2 steps", "2000 steps"),
        [
            "curriculum.0.mixture.web",
            "stage general",
            "epochs",
            "sources.web.repeat: true",
            "count the stage in epochs",
        ],
    ),
    "no tokenizer": (lambda here: edit("{train: {vocab_size: 400}}", "nowhere/at/all"), ["tokenizer: nowhere/at/all"]),
}


@pytest.mark.parametrize("verb", ["prepare", "launch"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_a_run_begins(here: Path, refusal: Callable[..., str], name: str, verb: str) -> None:
    spoil, expected = BAD_DATA[name]
    spoil(here)
    said = refusal(verb, "job.yaml", "--workers", "1")
    assert [words for words in expected if words not in said] == [], said
    assert not (here / "runs").exists()


def test_too_few_tokens_can_be_allowed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit("2 steps", "40 epochs")
    counted = Path("job.yaml").read_text()
    repeated = JOB.replace("2 steps", "80 steps").replace("web.jsonl,", "web.jsonl, repeat: true,")
    for text in (counted, repeated):
        Path("job.yaml").write_text(text)
        assert main(["prepare", "job.yaml", "--workers", "1"]) == 0
        epochs = re.search(r"general: web ([0-9.]+)", capsys.readouterr().out)
        assert epochs and float(epochs[1]) > 30


def test_no_room_for_prepared_data_is_said_in_bytes(
    here: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(here)._replace(free=123)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    said = refusal("prepare", "job.yaml")
    assert "needs about" in said and "123" in said and "data_dir" in said


def test_a_name_that_is_neither_file_nor_recipe_is_refused_with_the_recipes(
    here: Path, refusal: Callable[..., str]
) -> None:
    said = refusal("plan", "quikstart")
    assert 'did you mean "quickstart"?' in said and "law-medical-small" in said


@pytest.mark.parametrize("gpus", ["4xB9000", "A100-80G", "0xA100-80G"])
def test_devices_that_are_not_known_are_refused_with_those_that_are(
    here: Path, refusal: Callable[..., str], gpus: str
) -> None:
    said = refusal("plan", "job.yaml", "--gpus", gpus)
    assert gpus in said and "H200-141G" in said and "4xA100-80G" in said


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "report", "export"])
def test_a_folder_that_is_no_run_is_refused(here: Path, refusal: Callable[..., str], verb: str) -> None:
    more = ["--to", "model"] if verb == "export" else []
    for folder in ("nowhere", "."):
        assert f"{folder}: is not a run directory" in refusal(verb, folder, *more)
    assert sorted(path.name for path in here.iterdir()) == ["job.yaml", "qa.jsonl", "web.jsonl"]


def test_the_command_itself_ends_with_2_and_no_traceback(here: Path) -> None:
    edit("{web: 1.0}", "{wed: 1.0}")
    done = subprocess.run([sys.executable, "-m", "launcher", "plan", "job.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ernie: 2 mistakes in job.yaml:") and "Traceback" not in done.stderr


# --- run directories ---------------------------------------------------------------------------------------------


def resolved(name: str = "t", **more: Any) -> ResolvedJob:
    """A job of two stages over data that is never looked at."""
    durations = more.pop("durations", ("6 steps", "6 steps"))
    raw = {
        "name": name,
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": "folder",
        "tokens_per_batch": 64,
        "sources": {"web": {"path": "web.jsonl", "text": "text"}},
        "curriculum": [
            {"name": stage, "duration": duration, "sequence_length": 32, "mixture": {"web": 1.0}}
            for stage, duration in zip(("first", "second"), durations, strict=True)
        ],
        "schedule": {"kind": "constant", "peak": 1e-3},
        **more,
    }
    facts = {"fingerprint": "f", "kind": "text", "packed": {32: PackedLength(sequences=99, tokens=3000)}}
    return resolve(
        parse_job(raw, "test"),
        ResolvedTokenizer(folder="t", fingerprint="t", vocab_size=64),
        {"web": ResolvedSource(folder="web", held_out=False, **facts)},
    )


def begin(run: RunDir, stages: int) -> None:
    """As if a run had saved a checkpoint in its stage number `stages`."""
    folder = run.files.checkpoints / f"step_{stages:08d}"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()
    begun = [[stage.name, stage.fingerprint] for stage in run.job().stages[:stages]]
    (folder / "progress.json").write_text(json.dumps({"stages": begun}))


def test_a_future_may_be_rewritten_and_the_change_is_said(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.freeze(resolved()) == [] and run.freeze(resolved()) == []
    assert run.job() == resolved()
    begin(run, 1)
    changed = resolved(durations=("6 steps", "50 steps"), engine={"micro_batch_size": 2})
    assert sorted(run.freeze(changed)) == [
        'curriculum.1.duration: "6 steps" -> "50 steps"',
        "engine.micro_batch_size: 1 -> 2",
    ]
    assert run.job() == changed and run.freeze(changed) == []


def test_a_past_may_not_be_rewritten_and_nothing_is_lost(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.freeze(resolved())
    run.freeze(resolved(seed=3))  # nothing has begun
    begin(run, 1)
    frozen = run.files.job.read_bytes()
    for other, change in (
        (resolved(seed=4), "seed: 3 -> 4"),
        (resolved(seed=3, durations=("7 steps", "6 steps")), 'curriculum.0.duration: "6 steps" -> "7 steps"'),
        (resolved(seed=3, schedule={"kind": "constant", "peak": 2e-3}), "schedule.peak: 0.001 -> 0.002"),
        (resolved("other", seed=3), 'name: "t" -> "other"'),
    ):
        with pytest.raises(RunDirError) as error:
            run.freeze(other)
        said = str(error.value)
        assert change in said and "belongs to another job (stages begun: first)" in said and "--run-dir" in said
        assert run.files.job.read_bytes() == frozen
    begin(run, 2)
    with pytest.raises(RunDirError, match="stages begun: first, second"):
        run.freeze(resolved(seed=3, durations=("6 steps", "50 steps")))


def test_steps_without_a_checkpoint_are_a_past_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.freeze(resolved())
    run.files.metrics.write_text('{"step": 1}\n')
    assert run.freeze(resolved(durations=("6 steps", "9 steps")))
    with pytest.raises(RunDirError, match="another job"):
        run.freeze(resolved(durations=("9 steps", "9 steps")))


def test_a_damaged_newest_checkpoint_is_no_reason_to_fail_outside_the_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.freeze(resolved())
    begin(run, 1)
    begin(run, 2)
    for content in ("", "[]", "\0" * 20):
        (run.files.checkpoints / "step_00000002" / "progress.json").write_text(content)
        assert run.freeze(run.job()) == []


@pytest.mark.parametrize("name", ["error.json", "outcome.json"])
def test_a_torn_ending_is_as_good_as_none(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "run")
    run.freeze(resolved())
    number = run.new_attempt()
    (run.files.attempt(number) / name).write_text('{"exit_co')
    assert main(["status", str(run.root)]) == 0
    assert "not running" in capsys.readouterr().out


def test_a_run_dir_that_is_a_file_is_refused(here: Path, refusal: Callable[..., str]) -> None:
    assert "job.yaml" in refusal("launch", "job.yaml", "--run-dir", "job.yaml", "--workers", "1")
    assert (here / "job.yaml").read_text() == JOB


def test_launch_refuses_a_directory_of_another_job_of_other_data_or_of_something_else(
    here: Path, refusal: Callable[..., str]
) -> None:
    spec = load_job(here / "job.yaml")
    run = RunDir(here / "runs" / "small")
    run.freeze(resolve_prepared(spec, prepare(spec, workers=1, show_progress=False)))
    run.files.metrics.write_text('{"step": 1}\n')
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}

    said = refusal("launch", "job.yaml", "--set", "schedule.peak=0.5")
    assert "belongs to another job" in said and "schedule.peak: 0.001 -> 0.5" in said
    web = (here / "web.jsonl").read_text()
    (here / "web.jsonl").write_text(web.replace("cranes", "stones"))
    said = refusal("launch", "job.yaml")
    assert "not what the run began with" in said and "web.jsonl" in said and "--run-dir" in said
    (here / "web.jsonl").write_text(web)
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("years of work")
    said = refusal("launch", "job.yaml", "--run-dir", "thesis")
    assert "thesis: is not empty and no run directory (it holds chapter.txt)" in said

    assert (here / "thesis" / "chapter.txt").read_text() == "years of work"
    assert {path: path.read_bytes() for path in before} == before
    assert run.last_attempt() == 0, "no attempt was begun"


def test_a_run_has_one_owner(tmp_path: Path, refusal: Callable[..., str]) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.freeze(resolved())
    assert not second.is_running()
    with first.owned():
        assert second.is_running()
        with (
            pytest.raises(RunDirError, match=r"another launch is running in it; .*ernie status.*ernie stop"),
            second.owned(),
        ):
            pass
    assert not second.is_running()
    with second.owned():
        pass


def test_attempts_are_numbered_and_a_request_to_stop_is_forgotten_by_a_new_launch_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.freeze(resolved())
    assert run.last_attempt() == 0 and run.new_attempt(launcher="local", ranks=2) == 1
    shutil.rmtree(run.files.attempt(1))
    run.files.attempt(9).mkdir()
    run.files.stop.write_text("from before")
    with run.owned():
        assert not run.files.stop.exists()
        run.files.stop.write_text("from between two attempts")
        assert run.new_attempt() == 10 == run.last_attempt()
        assert run.files.stop.exists()
    assert ResolvedJob.read(run.files.attempt(10) / "job.json") == resolved()
    assert json.loads((run.files.attempt(10) / "launch.json").read_text())["pid"]


def test_status_and_stop_of_a_run_that_never_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    run.freeze(resolved())
    assert main(["status", str(tmp_path)]) == 0 and "never started" in capsys.readouterr().out
    assert main(["stop", str(tmp_path)]) == 0 and "nothing is running" in capsys.readouterr().out
    assert not run.files.stop.exists(), "it would stop the next attempt"


def test_a_launch_on_another_host_can_be_seen_and_stopped_from_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.freeze(resolved())
    run.files.lease.mkdir()
    holder = Holder(1, "token", "n7", "another kernel", 4711, "1", job="slurm 12", attempt=1)
    (run.files.lease / "00000001.json").write_text(json.dumps(asdict(holder)))
    assert main(["status", str(tmp_path)]) == 0
    assert "running on n7 (process 4711, slurm 12), as far as can be seen from here" in capsys.readouterr().out
    assert main(["stop", str(tmp_path), "--notice", "1m30s"]) == 0
    assert json.loads(run.files.stop.read_text()) == {
        "reason": "ernie stop",
        "notice": 90.0,
        "now": False,
        "again": False,
    }


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_the_command_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    assert main(["launch", "job.yaml", "--dry-run", "--run-dir", "runs/x y"]) == 0
    out = capsys.readouterr().out
    assert shlex.join(node_command(here.resolve() / "runs" / "x y", 1, Nodes(1, 1), node_rank=0)) in out
    assert all(words in out for words in ("general", "sft", "1,024", "2 epochs", "after prepare"))
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("recipe", sorted(path.stem for path in asset_folder("recipes").glob("*.yaml")))
def test_every_recipe_plans(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe]) == 0
    assert "memory     about" in capsys.readouterr().out


def test_a_plan_says_what_an_adapter_trains_and_saves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lora-0.3b"]) == 0
    adapted = capsys.readouterr().out
    assert "adapter    LoRA, rank 32, alpha 64, on q_proj v_proj" in adapted
    assert "2,506,752 trainable parameters, 0.69% of all" in adapted
    assert "gradients 9.6 MiB, optimizer 28.7 MiB" in adapted
    assert main(["plan", "lora-0.3b", "--set", "model.adapter.targets=all-linear"]) == 0
    assert "12,091,392 trainable parameters, 3.24% of all" in capsys.readouterr().out

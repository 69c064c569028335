"""`ernie quickstart`: the whole road on generated data, with a kill -9 in the middle, and figures at the end.

Everything it shows it reads from what the run left behind: two attempts that executed the same steps must agree.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.run_files import RunFiles
from launcher.base import CRASHED, FINISHED
from launcher.plan import table
from launcher.quickstart_data import write_data
from launcher.run_dir import RunDir

_MARK = ".ernie_quickstart"
_KILL_AFTER = 95
"""steps: inside the second stage, and 15 past a checkpoint, which are then executed twice"""
_ENOUGH = 0.9


def run(folder: Path) -> int:
    """Returns 0 if the run went on exactly and the model learned its answers, 1 otherwise."""
    begun = time.monotonic()
    folder = folder.resolve()
    _make_room(folder)
    write_data(folder / "data")
    files = RunFiles(folder / "run")
    _say(f"data in {folder / 'data'}; the job: three stages, two ranks, DeepSpeed ZeRO-2")
    first = _launch(folder)
    _kill_when(files, first, _KILL_AFTER)
    _say("launching the same command again")
    code = _launch(folder).wait()
    if code != FINISHED:
        return code
    _say("asking the model its questions, before and after training")
    rows = _ask(files)
    print(flush=True)
    exact = _show(files, rows)
    print(f"\n{time.monotonic() - begun:.0f} seconds in all")
    return FINISHED if exact else CRASHED


def _make_room(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            raise RunDirError(f"{folder}: is not empty and no earlier quickstart; give another folder with --dir")
        if (folder / "run").is_dir() and RunDir(folder / "run").is_running():
            raise RunDirError(f"{folder}: a quickstart is running there; wait for it or give another --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _launch(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher", "launch", "quickstart", "--run-dir", "run", "--no-restart"]
    # On the CPU everywhere: two ranks want two GPUs, and what is promised to the bit was measured here.
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def _kill_when(files: RunFiles, launch: subprocess.Popen[bytes], step: int) -> None:
    """kill -9 to every process of the attempt once `step` is on record."""
    from ernie_dist.events.history import read_metrics

    while launch.poll() is None:
        steps = read_metrics(files.metrics)
        if steps and steps[-1]["step"] >= step:
            _say(f"kill -9 at step {steps[-1]['step']}, in the middle of stage {steps[-1]['stage']}")
            os.killpg(int(files.process(1).read_text()), signal.SIGKILL)
            break
        time.sleep(0.05)
    launch.wait()


def _ask(files: RunFiles) -> list[dict[str, str]]:
    answers = files.root / "answers.json"
    module = "ernie_dist.evaluate.generation"
    command = [sys.executable, "-m", module, str(files.root), "--source", "qa", "--to", str(answers)]
    subprocess.run([*command, "--max-new-tokens", "24"], check=True, stderr=subprocess.DEVNULL)
    return json.loads(answers.read_text(encoding="utf-8"))


def _show(files: RunFiles, rows: list[dict[str, str]]) -> bool:
    """Prints the figures. True if the resume was exact and the questions are answered."""
    from ernie_dist.report.data import collect

    summary = collect(files.root)
    heads = ("stage", "steps", "tokens", "loss first -> last", "held-out perplexity before -> after")
    print("\n".join(table([heads, *(_stage_row(stage) for stage in summary.stages)])))
    replays = summary.replays
    same = bool(replays) and all(replay.identical for replay in replays)
    if replays:
        verdict = "equal to the last bit" if same else "NOT EQUAL"
        print(
            f"\nresume: steps {replays[0].step} to {replays[-1].step} were executed before and again after the kill; "
            f"loss and batch_hash are {verdict}"
        )
    for row in rows[:: max(1, len(rows) // 5)][:5]:
        question = row["question"].removeprefix("User: ").removesuffix("Assistant:").strip()
        print(f"\n  {question}\n    before: {row['before'][:40]}\n    after:  {row['after']}")
    right = {when: sum(row[when] == row["reference"] for row in rows) / len(rows) for when in ("before", "after")}
    print(f"\n{len(rows)} questions it was trained on, answered right: ", end="")
    print(f"{right['before']:.1%} before training, {right['after']:.1%} after")
    print(f"\nmodel   {files.export}\nreport  {files.report}\nW&B     {files.wandb}")
    return same and right["after"] >= _ENOUGH


def _stage_row(stage: Any) -> tuple[str, ...]:
    return (
        stage.name,
        str(stage.steps),
        f"{stage.tokens:,}",
        f"{stage.loss_first:.3f} -> {stage.loss_last:.3f}",
        f"{stage.perplexity_before:.1f} -> {stage.perplexity_after:.1f}",
    )


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)

"""How long one waits: `ernie --help`, `ernie plan`, and `ernie launch` up to its first step, beside bare imports.

    python -m benchmarks startup [--quick]

Fresh processes, in turns, files in the page cache. An import is the whole process `python -c "import ..."`; that of
deepspeed imports torch too. The launch is of a small model on 2 CPU ranks under ZeRO-2, its data prepared before; its
phases are read off the files it writes. The last phase ends as the first step is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import in_turns, keep, parser, say, show, spread

GOALS = {"ernie --help": 0.3, "ernie plan": 1.5}
"""seconds"""
RANKS = 2
_PYTHON = (sys.executable, "-c")
_TORCH = "import torch"
_TRANSFORMERS = "import torch; from transformers import AutoModelForCausalLM"
_DEEPSPEED = f"{_TRANSFORMERS}; import deepspeed"
_MODEL = f"{_DEEPSPEED}; from transformers import Ernie4_5ForCausalLM"
"""transformers imports what all its models need, and torch's for it, only with the first of them"""
COMMANDS = {
    "python": (*_PYTHON, "pass"),
    "import torch": (*_PYTHON, _TORCH),
    "import torch, transformers": (*_PYTHON, _TRANSFORMERS),
    "import torch, transformers, deepspeed": (*_PYTHON, _DEEPSPEED),
    "import torch, transformers, deepspeed, the ERNIE class": (*_PYTHON, _MODEL),
    "ernie --help": (sys.executable, "-m", "launcher", "--help"),
    "ernie plan": (sys.executable, "-m", "launcher", "plan", "three-stage-0.3b"),
}
PHASES = (
    "job read, data found, run directory ready",
    "torchrun and the ranks begin",
    "ranks import torch, transformers, deepspeed; they meet",
    "model and engine are built",
    "first step",
)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--rounds", type=int, default=5, help="of each command (5)")
    command.add_argument("--launches", type=int, default=3, help="(3)")
    arguments = command.parse_args()
    rounds, launches = (1, 1) if arguments.quick else (arguments.rounds, arguments.launches)
    measures = {name: _process(words) for name, words in COMMANDS.items()}
    for measure in measures.values():  # what lies in files is in the page cache then
        measure()
    seconds = {name: spread(values) for name, values in in_turns(measures, rounds).items()}
    with tempfile.TemporaryDirectory() as scratch:
        say("ernie launch")
        job = _prepared_job(Path(scratch))
        found = [_launch(job, Path(scratch) / f"run-{number}") for number in range(launches)]
    phases = {name: spread([one[name] for one in found]) for name in PHASES}
    whole = spread([sum(one.values()) for one in found])
    show(
        ("seconds", "median", "least", "most", "goal"),
        [
            (name, *(f"{value:.2f}" for value in (of["median"], *of["range"])), GOALS.get(name, ""))
            for name, of in {**seconds, **phases, "ernie launch to the first step": whole}.items()
        ],
    )
    result = {
        "what": "seconds from the start of a process to its end; of ernie launch to the end of the first step",
        "seconds": seconds,
        "goals": GOALS,
        "met": {name: seconds[name]["median"] <= goal for name, goal in GOALS.items()},
        "launch to the first step": whole,
        "launch phases": phases,
        "settings": {"ranks": RANKS, "ds_config": "zero2", "rounds": rounds, "launches": launches},
    }
    keep("startup", result, quick=arguments.quick)


def _process(words: tuple[str, ...]) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=_environment())
        return time.perf_counter() - began

    return measure


def _environment() -> dict[str, str]:
    """Bytecode is kept, as that of an installed package is, whatever is set here."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def _prepared_job(scratch: Path) -> Path:
    from launcher.quickstart_data import write_data

    write_data(scratch / "data")
    job = {
        "name": "startup",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": {"train": {"vocab_size": 1200}},
        "tokens_per_batch": "1K",
        "sources": {"stories": {"path": str(scratch / "data/stories.jsonl"), "text": "text", "repeat": True}},
        "split": {"train": 1.0, "validation": 0.0},
        "curriculum": [{"name": "only", "duration": "1 steps", "sequence_length": 128, "mixture": {"stories": 1.0}}],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "engine": {"ds_config": "zero2", "micro_batch_size": 4, "precision": "fp32"},
        "resources": {"gpus_per_node": RANKS},
        "data_dir": str(scratch / "prepared"),
    }
    path = scratch / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "launcher", "prepare", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_environment(),
    )
    return path


def _launch(job: Path, run_dir: Path) -> dict[str, float]:
    """Seconds of each phase."""
    from ernie_dist.spec.run_files import RunFiles

    files = RunFiles(run_dir)
    moments = [time.time()]
    words = [sys.executable, "-m", "launcher", "launch", str(job), "--run-dir", str(run_dir), "--no-restart"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=_environment())
    for path in (files.node(1, 0), files.rank_log(1, 0)):
        while not path.exists() and process.poll() is None:
            time.sleep(0.005)
        moments.append(time.time())
    if process.wait():
        raise SystemExit(f"startup: ernie launch failed; see {run_dir}")
    events = {one["event"]: one["time"] for one in _lines(files.events)}
    moments += [events["Preflight"], events["AttemptStarted"], _lines(files.metrics)[0]["time"]]
    return {name: later - earlier for name, earlier, later in zip(PHASES, moments, moments[1:], strict=False)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()

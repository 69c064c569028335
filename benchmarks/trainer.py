"""Useful tokens per second of packed training, against the tutorial recipe: transformers.Trainer, every pair padded.

    ERNIE_DATA=FOLDER ERNIE_TOKENIZER=FOLDER python -m benchmarks.trainer [--quick]

Useful tokens are those of the pairs, prompt and answer, that a step processes; padding is not useful. Both sides train
the same model (4 layers of 256, vocabulary 103424) on the CPU in fp32, with the same AdamW, clipping and learning rate,
in one process with the same threads, on the same pairs, tokenised once by `ernie_dist.data.prepare`; a step is 2 x 512
positions on both. The recipe pads every pair to 512. Ours packs them, and only labelled positions go through the head.
A step is timed from the end of one to the end of the next, loading its data included; the first step of each turn,
starting up and tokenising are not.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import in_turns, keep, parser, say, show, spread

if TYPE_CHECKING:
    from ernie_dist.spec.resolve import ResolvedJob

SEQUENCE_LENGTH = 512
PER_STEP = 2
"""rows of SEQUENCE_LENGTH in a step"""
RATE = 1e-4
SHAPE = {
    "vocab_size": 103424,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Case:
    """Pairs to train on, and how many times faster we want to be."""

    name: str
    source: dict[str, Any]
    goal: float


_MEDICAL = {"path": "medical_qa.gb18030.csv", "encoding": "gb18030", "response": "answer"}
CASES = (
    Case("medical", {**_MEDICAL, "prompt": "ask"}, 5),
    Case("medical, by title", {**_MEDICAL, "prompt": "title"}, 5),
    Case("riddles", {"path": "xiehouyu.json", "prompt": "riddle", "response": "answer"}, 20),
)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--engine", choices=("plain", "deepspeed"), default="plain", help="of our side (plain)")
    arguments = command.parse_args()
    data, tokenizer = _folders()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rounds, steps = (1, 1) if arguments.quick else (3, 3)
    results: dict[str, Any] = {}
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            say(f"{case.name}: preparing")
            job = _prepared_job(Path(scratch), case, data, tokenizer, arguments.engine)
            ours, recipe = _Ours(job, steps), _Recipe(job, steps, Path(scratch))
            say(f"{case.name}: {recipe.pairs:,} pairs of {recipe.tokens_per_pair:.1f} tokens; seconds per step")
            seconds = in_turns({"trainer": recipe.seconds_per_step, "ours": ours.seconds_per_step}, rounds)
            ours.close()
        tokens = {"trainer": PER_STEP * recipe.tokens_per_pair, "ours": PER_STEP * ours.tokens_per_row}
        speeds = {name: spread([tokens[name] / value for value in seconds[name]]) for name in seconds}
        ratio = spread([a * tokens["ours"] / b / tokens["trainer"] for a, b in zip(*seconds.values(), strict=True)])
        results[case.name] = {
            "ratio": ratio,
            "goal": case.goal,
            "met": ratio["median"] >= case.goal,
            "useful_tokens_per_second": speeds,
            "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
            "useful_tokens_per_step": tokens,
            "useful_share_of_positions": {name: value / PER_STEP / SEQUENCE_LENGTH for name, value in tokens.items()},
            "pairs": recipe.pairs,
            "tokens_per_pair": recipe.tokens_per_pair,
        }
        figures = [f"{speeds[name]['median']:.1f}" for name in ("trainer", "ours")]
        rows.append((case.name, *figures, f"{ratio['median']:.1f}", f"{ratio['range'][0]:.1f}", case.goal))
    show(("useful tokens/s", "trainer", "ours", "ratio", "least", "goal"), rows)
    settings = {"positions_per_step": PER_STEP * SEQUENCE_LENGTH, "our_engine": arguments.engine, "model": SHAPE}
    settings |= {"precision": "fp32", "device": "cpu", "steps_per_turn": steps, "warm_up_steps_per_turn": 1}
    what = "tokens that are not padding per second of training, over those of the padded recipe, turn by turn"
    keep("trainer", {"what": what, **results, "settings": {**settings, "threads": _threads()}}, quick=arguments.quick)


def _folders() -> tuple[Path, str]:
    missing = [name for name in ("ERNIE_DATA", "ERNIE_TOKENIZER") if not os.environ.get(name)]
    data = Path(os.environ.get("ERNIE_DATA", ""))
    missing += [str(path) for case in CASES if not missing and not (path := data / case.source["path"]).is_file()]
    if missing:
        print(
            f"benchmarks.trainer: {' and '.join(missing)} not found; set ERNIE_DATA to a folder with "
            f"{' and '.join({case.source['path']: 0 for case in CASES})}, and ERNIE_TOKENIZER to ERNIE's tokenizer",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return data, os.environ["ERNIE_TOKENIZER"]


def _prepared_job(scratch: Path, case: Case, data: Path, tokenizer: str, engine: str) -> ResolvedJob:
    """As a user would: a job, prepared and resolved."""
    from ernie_dist.data.prepare import prepare
    from ernie_dist.data.resolve import resolve_prepared
    from ernie_dist.spec.job import parse_job

    tolerant = {"on_bad_row": "quarantine", "overlong": "truncate", "repeat": True}
    stage = {"name": "sft", "duration": "1000 steps", "sequence_length": SEQUENCE_LENGTH, "mixture": {"pairs": 1.0}}
    spec = parse_job(
        {
            "name": "pairs",
            "model": {"preset": "ernie-4.5-0.3b", "override": SHAPE},
            "tokenizer": tokenizer,
            "tokens_per_batch": PER_STEP * SEQUENCE_LENGTH,
            "sources": {"pairs": {**case.source, "path": str(data / case.source["path"]), **tolerant}},
            "split": {"train": 1.0, "validation": 0.0},
            "curriculum": [stage],
            "schedule": {"kind": "constant", "peak": RATE},
            "engine": {"kind": engine, "ds_config": "zero0", "precision": "fp32", "micro_batch_size": PER_STEP},
            "data_dir": str(scratch / "prepared"),
        },
        case.name,
    )
    return resolve_prepared(spec, prepare(spec, show_progress=False))


class _Ours:
    """Packed, through BatchLoader and an engine; goes on where its last turn stopped."""

    def __init__(self, job: ResolvedJob, steps: int) -> None:
        from ernie_dist.data.loader import BatchLoader, load_batches
        from ernie_dist.engine.select import build_engine
        from ernie_dist.model.build import build_model
        from ernie_dist.model.loss import summed_loss
        from ernie_dist.world import World

        spec, self._steps = job.spec, steps
        build = partial(build_model, spec.model, job.tokenizer.vocab_size, spec.seed)
        self._engine = build_engine(spec.engine, spec.optimizer, [], build, summed_loss, World())
        self._batches = load_batches(BatchLoader(job, World()), 0, job.total_batches)
        self.tokens_per_row = job.sources["pairs"].packed[SEQUENCE_LENGTH].tokens_per_sequence

    def seconds_per_step(self) -> float:
        self._engine.step(next(self._batches), RATE)
        began = time.perf_counter()
        for _ in range(self._steps):
            self._engine.step(next(self._batches), RATE)
        return (time.perf_counter() - began) / self._steps

    def close(self) -> None:
        self._batches.close()
        self._engine.close()


class _Recipe:
    """transformers.Trainer over pairs padded to SEQUENCE_LENGTH; each turn trains the same model on."""

    def __init__(self, job: ResolvedJob, steps: int, scratch: Path) -> None:
        from ernie_dist.data.shard import PreparedSource
        from ernie_dist.model.build import build_model

        spec, self._steps, self._scratch = job.spec, steps, scratch
        self._model = build_model(spec.model, job.tokenizer.vocab_size, spec.seed, attn_implementation="sdpa")
        self._model.config.use_cache = False
        self._optimizer = spec.optimizer
        source = PreparedSource.open(Path(job.sources["pairs"].folder))
        starts, lengths = source.documents("train")
        self.pairs, whole = len(lengths), lengths.clip(max=SEQUENCE_LENGTH)
        self.tokens_per_pair = float(whole.mean())
        self._rows = [partial(_padded, source, *span) for span in zip(starts.tolist(), whole.tolist(), strict=True)]

    def seconds_per_step(self) -> float:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        arguments = TrainingArguments(
            output_dir=str(self._scratch / "trainer"),
            per_device_train_batch_size=PER_STEP,
            max_steps=1 + self._steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=self._optimizer.weight_decay,
            adam_beta1=self._optimizer.betas[0],
            adam_beta2=self._optimizer.betas[1],
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = _Padded(self._rows)
        Trainer(model=self._model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
        return (ends[-1] - ends[0]) / (len(ends) - 1)


class _Padded:
    """A map-style dataset."""

    def __init__(self, rows: list[partial[dict[str, Any]]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row() for row in self._rows)


def _padded(source: Any, start: int, length: int) -> dict[str, Any]:
    """One pair as the recipe feeds it. The labels are not shifted: the model does that."""
    import numpy as np

    tokens, mask = source.read(start, length)
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    row = {name: np.full(SEQUENCE_LENGTH, fill) for name, fill in padding.items()}
    row["input_ids"][:length], row["attention_mask"][:length] = tokens, 1
    row["labels"][:length] = np.where(mask > 0, tokens, -100)
    return row


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()

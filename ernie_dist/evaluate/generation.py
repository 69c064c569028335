"""Greedy answers of a run's model, before and after training, to the questions it was trained on.

python -m ernie_dist.evaluate.generation RUN_DIR --source qa --to answers.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ernie_dist.data.shard import PreparedSource
from ernie_dist.inference import ChatModel, Sampling, load
from ernie_dist.model.build import build_model
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles


@dataclass(frozen=True)
class Question:
    """A single-turn conversation as it was trained on: token ids up to the answer, and the answer's text."""

    prompt: tuple[int, ...]
    text: str
    reference: str


@dataclass(frozen=True)
class Answered:
    question: str
    reference: str
    before: str
    after: str


def questions(source: PreparedSource, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
    """The conversations of a split: the prompt is what precedes the first answer."""
    for start, length in zip(*(part.tolist() for part in source.documents(split)), strict=True):
        ids, mask = source.read(start, length)
        if mask is None:
            raise DataError(f"source {source.name} is plain text; questions come from conversations")
        answer = int(np.flatnonzero(mask)[0])
        prompt = ids[:answer].tolist()
        text = tokenizer.decode(prompt, skip_special_tokens=True).strip()
        reference = tokenizer.decode(ids[mask > 0].tolist(), skip_special_tokens=True).strip()
        yield Question(tuple(prompt), text, reference)


def before_and_after(
    run_dir: Path, source: str, *, limit: int | None = None, max_new_tokens: int = 64
) -> list[Answered]:
    """Answers of the exported model, loaded as any transformers user would, beside those of the model at step 0."""
    files = RunFiles(run_dir)
    job = ResolvedJob.read(files.job)
    trained = load(files.export)
    untrained = build_model(job.spec.model.base, job.tokenizer.vocab_size, job.spec.seed, attn_implementation="sdpa")
    models = [ChatModel(untrained, trained.tokenizer, "untrained"), trained]
    prepared = PreparedSource.open(Path(job.sources[source].folder))
    asked = list(questions(prepared, "train", trained.tokenizer))[:limit]
    prompts, how = [question.prompt for question in asked], Sampling(max_new_tokens)
    before, after = (model.answers(prompts, how) for model in models)
    return [
        Answered(question.text, question.reference, old.text, new.text)
        for question, old, new in zip(asked, before, after, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    rows = before_and_after(options.run_dir, options.source, limit=options.limit, max_new_tokens=options.max_new_tokens)
    options.to.write_text(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Greedy answers of a run's model, before and after training, to the questions it was trained on.

python -m ernie_dist.evaluate.generation RUN_DIR --source qa --to answers.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ernie_dist.data.shard import PreparedSource
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


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Greedy continuations, cut at the stop token. Prompts of one batch are padded on the left."""
    model.eval()
    texts: list[str] = []
    pad = tokenizer.pad_token_id or 0
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
    return texts


def before_and_after(
    run_dir: Path, source: str, *, limit: int | None = None, max_new_tokens: int = 64
) -> list[Answered]:
    """Answers of the exported model, loaded as any transformers user would, beside those of the model at step 0."""
    files = RunFiles(run_dir)
    job = ResolvedJob.read(files.job)
    tokenizer = AutoTokenizer.from_pretrained(files.export)
    asked = list(questions(PreparedSource.open(Path(job.sources[source].folder)), "train", tokenizer))[:limit]
    prompts = [question.prompt for question in asked]
    untrained = build_model(job.spec.model, job.tokenizer.vocab_size, job.spec.seed, attn_implementation="sdpa")
    trained = AutoModelForCausalLM.from_pretrained(files.export)
    before, after = (
        answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens) for model in (untrained, trained)
    )
    return [
        Answered(question.text, question.reference, old, new)
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

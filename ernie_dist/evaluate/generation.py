"""Greedy answers of a run's model, before and after training, to the questions it was trained on.

python -m ernie_dist.evaluate.generation RUN_DIR --source qa --to answers.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer

from ernie_dist.data.tokenizer import give_template
from ernie_dist.evaluate.questions import Renderer, read_prepared
from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.loading import load, placed
from ernie_dist.model.build import build_model
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles


@dataclass(frozen=True)
class Answered:
    question: str
    reference: str
    before: str
    after: str


def untrained(run_dir: Path, device: str | None = None, dtype: str | None = None) -> ChatModel:
    """A run's model before its first step: the weights it starts from, or random ones of the same seed.

    `device` and `dtype` are those of `load`, so that two models differ in what they learned alone. Raises SpecError.
    """
    job, (place, numbers) = ResolvedJob.read(RunFiles(run_dir).job), placed(device, dtype)
    spec, vocab_size = job.spec.model.base, job.tokenizer.vocab_size
    model = build_model(spec, vocab_size, job.spec.seed, attn_implementation="sdpa", dtype=numbers)
    tokenizer = give_template(AutoTokenizer.from_pretrained(job.tokenizer.folder, trust_remote_code=False))
    return ChatModel(model.to(place), tokenizer, f"{run_dir} before training")


def before_and_after(
    run_dir: Path, source: str, *, limit: int | None = None, max_new_tokens: int = 64
) -> list[Answered]:
    """Answers of the exported model, loaded as any transformers user would, beside those of the model at step 0."""
    files = RunFiles(run_dir)
    asked = read_prepared(ResolvedJob.read(files.job), [source], "train")[:limit]
    answers = []
    for model in (untrained(run_dir), load(files.export)):
        render = Renderer(model.tokenizer, model.name)
        prompts = [render(question).prompt.tolist() for question in asked]
        answers.append([answer.text for answer in model.answers(prompts, Sampling(max_new_tokens))])
    return [
        Answered(question.text, question.reference or "", before, after)
        for question, before, after in zip(asked, *answers, strict=True)
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

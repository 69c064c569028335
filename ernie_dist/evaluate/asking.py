"""Questions -> what a model makes of them, on one or several ranks, kept row by row so that it can go on.

questions --sort by length, cut--> batches --dealt--> ranks --answers, losses, label scores--> ANSWERS/KEY.rank-0.jsonl

A batch is what it is whoever works on it, with a seed of its own: one rank and four give the same answers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ernie_dist.evaluate.answer_loss import answer_losses, label_scores
from ernie_dist.evaluate.generation import untrained
from ernie_dist.evaluate.questions import Question, Rendered, Renderer
from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.loading import load
from ernie_dist.spec.errors import DataError, EnvironmentProblem, ErnieError
from ernie_dist.spec.run_files import RunFiles


@dataclass(frozen=True)
class Candidate:
    """A model to be asked: what `load` takes, or a run's model as it was before its first step."""

    model: str
    before_training: bool = False
    adapter: str | None = None

    @property
    def name(self) -> str:
        if self.adapter:
            return f"{self.model} + {self.adapter}"
        return f"{self.model} before training" if self.before_training else self.model

    def open(self, device: str | None) -> ChatModel:
        if self.before_training:
            return untrained(Path(self.model), device)
        return load(self.model, adapter=self.adapter, device=device)

    def fingerprint(self) -> str:
        """Changes with the weights: names, sizes and times of the files that are loaded; of a hub id the name."""
        folder = Path(self.model)
        if self.before_training:
            return f"before {RunFiles(folder).job.read_text(encoding='utf-8')}"
        if (folder / "job.json").is_file():
            folder = RunFiles(folder).export
        folders = [folder, *([Path(self.adapter)] if self.adapter else [])]
        files = sorted(path for one in folders if one.is_dir() for path in one.iterdir() if path.is_file())
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{self.model} {stats}"


@dataclass(frozen=True)
class How:
    """How models are asked."""

    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """answers to each question"""
    batch_size: int = 16
    labels: tuple[str, ...] = ()
    """not empty: the answer is the likeliest of these, and nothing is generated"""


@dataclass(frozen=True)
class Asked:
    """What a model made of one question."""

    number: int
    """of the question"""
    answers: tuple[str, ...]
    tokens: tuple[int, ...]
    stopped: tuple[bool, ...]
    loss: float | None
    """summed over the tokens of the reference, nats"""
    loss_tokens: int
    scores: tuple[float, ...] = ()
    """log p of each label"""


def ask(
    who: Candidate, questions: Sequence[Question], how: How, folder: Path, *, ranks: int = 1, device: str | None = None
) -> list[Asked]:
    """What `who` makes of every question, in their order. What an interrupted call has written is not asked again.

    Raises DataError or SpecError where the model cannot be asked, EnvironmentProblem where a rank dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(who, questions, how)
    task = _Task(who, tuple(questions), how, str(folder / key), device)
    done = read_answers(folder, key)
    with tqdm(total=len(questions), initial=len(done), desc=f"asking {who.name}", unit="row", leave=False) as bar:
        if len(done) < len(questions):
            if ranks == 1:
                _work(task, frozenset(done), 0, 1, lambda count: bar.update(count))
            else:
                _in_processes(task, frozenset(done), ranks, lambda count: bar.update(count))
    found = read_answers(folder, key)
    return [found[number] for number in range(len(questions))]


def read_answers(folder: Path, key: str) -> dict[int, Asked]:
    """{number of the question: what was written}; a line that was cut off by a crash does not count."""
    found: dict[int, Asked] = {}
    for path in sorted(folder.glob(f"{key}.rank-*.jsonl")):
        # Not splitlines: an answer may hold other ends of lines.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            lists = {name: tuple(value) for name, value in row.items() if isinstance(value, list)}
            found[row["number"]] = Asked(**{**row, **lists})
    return found


@dataclass(frozen=True)
class _Task:
    """All that a rank needs to know; sent to its process."""

    who: Candidate
    questions: tuple[Question, ...]
    how: How
    path: str
    device: str | None


def _key(who: Candidate, questions: Sequence[Question], how: How) -> str:
    what = [who.fingerprint(), asdict(how), [asdict(question) for question in questions]]
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]


def _work(task: _Task, done: frozenset[int], rank: int, ranks: int, progress: Callable[[int], object]) -> None:
    """The batches of one rank, each written when it is finished."""
    chat = task.who.open(task.device)
    render = Renderer(chat.tokenizer, chat.name)
    rows = [render(question) for question in task.questions]
    _check_lengths(chat, rows, task)
    by_length = sorted(range(len(rows)), key=lambda number: (-len(rows[number].prompt), number))
    size = task.how.batch_size
    batches = [by_length[first : first + size] for first in range(0, len(rows), size)]
    with open(f"{task.path}.rank-{rank}.jsonl", "a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # after a crash the last line may have no end
        for number, batch in list(enumerate(batches))[rank::ranks]:
            missing = [one for one in batch if one not in done]
            if not missing:
                continue
            for asked in _batch(chat, render, task, rows, batch, number):
                if asked.number in missing:
                    file.write(json.dumps(asdict(asked), ensure_ascii=False) + "\n")
            file.flush()
            progress(len(missing))


def _check_lengths(chat: ChatModel, rows: Sequence[Rendered], task: _Task) -> None:
    extra = 0 if task.how.labels else task.how.sampling.max_new_tokens
    for row, question in zip(rows, task.questions, strict=True):
        if len(row.prompt) + extra > chat.context or len(row.ids) > chat.context:
            raise DataError(
                f"question {question.text[:60]!r} has {len(row.prompt):,} tokens, with its reference {len(row.ids):,}, "
                f"and the answer may have {extra:,}: more than the {chat.context:,} positions of {chat.name}; leave it "
                "out or lower --max-new-tokens"
            )


def _batch(
    chat: ChatModel, render: Renderer, task: _Task, rows: Sequence[Rendered], batch: Sequence[int], number: int
) -> list[Asked]:
    asked, how = [rows[one] for one in batch], task.how
    known = [at for at, one in enumerate(batch) if task.questions[one].reference is not None]
    losses: list[tuple[float | None, int]] = [(None, 0)] * len(batch)
    if known:
        for at, total, count in zip(known, *answer_losses(chat, [asked[at] for at in known]), strict=True):
            losses[at] = (float(total), int(count))
    if how.labels:
        return [_classified(chat, render, task, one, loss) for one, loss in zip(batch, losses, strict=True)]
    prompts = [row.prompt.tolist() for row in asked]
    seeds = [how.sampling.seed + number * how.samples + sample for sample in range(how.samples)]
    tries = [
        chat.answers(prompts, replace(how.sampling, seed=seed), batch_size=len(prompts)) for seed in seeds
    ]  # [samples][rows]
    return [
        Asked(
            one,
            tuple(answers[at].text for answers in tries),
            tuple(answers[at].tokens for answers in tries),
            tuple(answers[at].stopped for answers in tries),
            *losses[at],
        )
        for at, one in enumerate(batch)
    ]


def _classified(chat: ChatModel, render: Renderer, task: _Task, number: int, loss: tuple[float | None, int]) -> Asked:
    labels = task.how.labels
    scores = label_scores(chat, [render.said(task.questions[number], label) for label in labels])
    return Asked(number, (labels[int(scores.argmax())],), (0,), (True,), *loss, tuple(scores.tolist()))


# ------------------------------------------------------------------------------------------------------- several ranks


def _in_processes(task: _Task, done: frozenset[int], ranks: int, progress: Callable[[int], object]) -> None:
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise EnvironmentProblem(f"{torch.cuda.device_count()} GPU(s) here and {ranks} ranks; lower --ranks")
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    processes = [context.Process(target=_rank, args=(task, done, rank, ranks, news)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        running = set(range(ranks))
        while running:
            try:
                rank, said = news.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank in running if not processes[rank].is_alive() and news.empty()]
                if dead:
                    code = processes[dead[0]].exitcode
                    raise EnvironmentProblem(f"rank {dead[0]} of the evaluation died with exit code {code}") from None
                continue
            if isinstance(said, BaseException):
                raise said
            if said is None:
                running.discard(rank)
            else:
                progress(said)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _rank(task: _Task, done: frozenset[int], rank: int, ranks: int, news: Any) -> None:
    if torch.cuda.is_available():
        task = replace(task, device=f"cuda:{rank}")
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        _work(task, done, rank, ranks, lambda count: news.put((rank, count)))
        news.put((rank, None))
    except ErnieError as error:  # said once, by the process that started this one
        news.put((rank, error))

"""Questions -> what a model makes of them, on one or several ranks, kept row by row so that it can go on.

questions --sort by length, cut--> batches --dealt--> ranks --answers, losses, label scores--> ANSWERS/KEY.rank-0.jsonl

A batch is what it is whoever works on it, with a seed of its own: one rank and four give the same answers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import cached_file

from ernie_dist.evaluate.answer_loss import answer_losses, label_scores
from ernie_dist.evaluate.generation import untrained
from ernie_dist.evaluate.questions import Question, Rendered, Renderer
from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.loading import load, parts, placed
from ernie_dist.spec.errors import DataError, EnvironmentProblem, ErnieError
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles

FORMAT = 1
"""of kept answers: raised when the same question would be asked or written down in another way"""


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

    def open(self, device: str | None, dtype: str | None) -> ChatModel:
        if self.before_training:
            return untrained(Path(self.model), device, dtype)
        return load(self.model, adapter=self.adapter, device=device, dtype=dtype)

    def fingerprint(self) -> list[Any]:
        """Changes with the weights, those under an adapter among them. Raises SpecError if there are none."""
        if self.before_training:
            job = RunFiles(Path(self.model)).job
            spec = ResolvedJob.read(job).spec.model
            base = _contents(spec.from_pretrained, spec.revision) if spec.from_pretrained else None
            return [job.read_text(encoding="utf-8"), base]
        name, adapter = parts(self.model, self.adapter)
        return [_contents(name), _contents(str(adapter)) if adapter else None]


def _contents(name: str, revision: str | None = None) -> list[Any]:
    """Of a folder names, sizes and times of its files; of a hub id the commit it stands for now."""
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).resolve().iterdir() if path.is_file())
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    with suppress(OSError, ValueError):  # `load` says what is wrong with it
        return [name, Path(str(cached_file(name, "config.json", revision=revision))).parent.name]
    return [name, revision]


@dataclass(frozen=True)
class How:
    """How models are asked."""

    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """answers to each question; 0: only what references cost"""
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
    prompt_tokens: int = 0


def ask(
    who: Candidate,
    questions: Sequence[Question],
    how: How,
    folder: Path,
    *,
    ranks: int = 1,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Asked]:
    """What `who` makes of every question, in their order. What an interrupted call has written is not asked again.

    Raises DataError or SpecError where the model cannot be asked, EnvironmentProblem where a rank dies or a GPU's
    memory is not enough.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, numbers = placed(device, dtype)
    key = _key(who, questions, how, place.type, str(numbers))
    task = _Task(who, tuple(questions), how, str(folder / key), str(place), dtype)
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
    device: str
    dtype: str | None


def _key(who: Candidate, questions: Sequence[Question], how: How, *place: str) -> str:
    """All that decides answers: what was kept under another key is not looked at."""
    by = versions("ernie_dist", "torch", "transformers", "tokenizers", "peft")
    what = [FORMAT, by, who.fingerprint(), *place, asdict(how), [asdict(question) for question in questions]]
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def memory_named(batch_size: int) -> Iterator[None]:
    """A GPU without memory left is a setting, not a bug: raises EnvironmentProblem."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"{str(error).splitlines()[0]} {batch_size} rows were asked at once: lower --batch-size, or choose another "
            "GPU with --device"
        ) from None


def _work(task: _Task, done: frozenset[int], rank: int, ranks: int, progress: Callable[[int], object]) -> None:
    """The batches of one rank, each written when it is finished."""
    with memory_named(task.how.batch_size):
        chat = task.who.open(task.device, task.dtype)
        _ask_batches(chat, task, done, rank, ranks, progress)


def _ask_batches(
    chat: ChatModel, task: _Task, done: frozenset[int], rank: int, ranks: int, progress: Callable[[int], object]
) -> None:
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
    extra = 0 if task.how.labels or not task.how.samples else task.how.sampling.max_new_tokens
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
            prompt_tokens=len(prompts[at]),
        )
        for at, one in enumerate(batch)
    ]


def _classified(chat: ChatModel, render: Renderer, task: _Task, number: int, loss: tuple[float | None, int]) -> Asked:
    labels = task.how.labels
    rows = [render.said(task.questions[number], label) for label in labels]
    scores = label_scores(chat, rows)
    best = labels[int(scores.argmax())]
    return Asked(number, (best,), (0,), (True,), *loss, tuple(scores.tolist()), len(rows[0].prompt))


# ------------------------------------------------------------------------------------------------------- several ranks


def _in_processes(task: _Task, done: frozenset[int], ranks: int, progress: Callable[[int], object]) -> None:
    if task.device == "cuda" and ranks > torch.cuda.device_count():
        raise EnvironmentProblem(f"{torch.cuda.device_count()} GPU(s) here and {ranks} ranks; lower --ranks")
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(task, done, rank, ranks, news), daemon=True) for rank in range(ranks)
    ]
    # Children inherit the mask: Ctrl-C reaches every process, and this one ends the others without their tracebacks.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
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
    if task.device == "cuda":
        task = replace(task, device=f"cuda:{rank}")
    elif task.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        _work(task, done, rank, ranks, lambda count: news.put((rank, count)))
        news.put((rank, None))
    except ErnieError as error:  # said once, by the process that started this one
        news.put((rank, error))

"""`ernie eval`: questions, one or two models, answers, metrics, and what is written of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from ernie_dist.evaluate.asking import Candidate, How, ask, memory_named
from ernie_dist.evaluate.execution import Limits, check_confinement, pass_table
from ernie_dist.evaluate.harness import check_tasks, run_tasks
from ernie_dist.evaluate.page import render
from ernie_dist.evaluate.questions import (
    Fields,
    Question,
    choose_split,
    drawn,
    guess_layout,
    read_file,
    read_prepared,
)
from ernie_dist.evaluate.results import METRICS, Judged, Results, compare_all, judge, refuse_impossible, table
from ernie_dist.inference import Sampling
from ernie_dist.loading import placed
from ernie_dist.pages import put
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError, SpecError
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles

_CHANGES_NO_NUMBER = ("ranks", "json", "to")
_NAMES = ("model", "against", "adapter", "data", "references")
"""options that may name a file or a folder"""


@dataclass(frozen=True)
class Wanted:
    """What `ernie eval` was asked for; a field is an option of the same name."""

    model: str
    against: str | None = None
    adapter: str | None = None
    data: str | None = None
    split: str | None = None
    source: str | None = None
    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    conversation: str | None = None
    encoding: str = "utf-8"
    label: str | None = None
    references: str | None = None
    metrics: str | None = None
    samples: int = 1
    k: str = "1"
    exec_unconfined: bool = False
    exec_timeout: float = 10.0
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    ranks: int = 1
    device: str | None = None
    dtype: str | None = None
    tasks: str | None = None
    json: str | None = None
    to: str | None = None


def evaluate(wanted: Wanted) -> Path:
    """Asks, measures, writes and prints; returns the page. Raises SpecError or DataError."""
    names, ks, tasks = _metric_names(wanted), _ks(wanted), _parts(wanted.tasks)
    _check_numbers(wanted)
    place, numbers = placed(wanted.device, wanted.dtype)
    if names and "exec" in names and not wanted.exec_unconfined:
        check_confinement()
    if tasks:
        check_tasks(tasks)
    run = Path(wanted.model) if (Path(wanted.model) / "job.json").is_file() else None
    root = Path(wanted.to) if wanted.to else run / "evaluation" if run else Path("evaluation")
    questions, labels = ([], ()) if tasks and wanted.data is None else _questions(wanted, run)
    if names and questions:
        refuse_impossible(names, questions)
    how = _how(wanted, names, labels)
    candidates = _candidates(wanted, run)
    judged = [_judged(who, questions, how, wanted, names, ks, root / "answers") for who in candidates]
    harness = {who.name: _benchmarks(who, tasks, wanted) for who in candidates if tasks}
    tuned, base = judged[0], judged[1] if len(judged) > 1 else None
    used = {"labels": list(labels), "device": place.type, "dtype": str(numbers).removeprefix("torch.")}
    results = Results(
        tuned, base, questions, compare_all(tuned, base, wanted.seed), {**asdict(wanted), **used}, harness
    )
    return _publish(results, root if wanted.to else root / _own_name(wanted, run), wanted)


def _own_name(wanted: Wanted, run: Path | None) -> str:
    """A folder for each way of asking, so that no result takes the place of another one; of a run as it is, none."""
    given: dict[str, Any] = {
        name: value
        for name, value in asdict(wanted).items()
        if value != getattr(Wanted, name, None) and name not in _CHANGES_NO_NUMBER
    }
    if run is not None and set(given) == {"model"}:
        return ""
    for name in set(_NAMES) & set(given):
        given[name] = str(Path(given[name]).resolve()) if Path(given[name]).exists() else given[name]
    asked = [Path(wanted.data).stem] if wanted.data else [name for name in given if name != "model"]
    code = hashlib.sha256(json.dumps(given, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:8]
    words = [*([] if run else [Path(given["model"]).name]), *asked, code]
    return re.sub(r"[^\w.-]+", "-", "-".join(words))


def _how(wanted: Wanted, names: list[str] | None, labels: tuple[str, ...]) -> How:
    """Nothing is asked for what only references cost."""
    sampling = Sampling(
        **{name: getattr(wanted, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
        repetition_penalty=wanted.repetition_penalty,
        seed=wanted.seed,
    )
    if names and all(METRICS[name] == "losses" for name in names):
        return How(sampling, 0, wanted.batch_size)
    return How(sampling, wanted.samples, wanted.batch_size, labels)


def _benchmarks(who: Candidate, tasks: Sequence[str], wanted: Wanted) -> dict[str, Any]:
    with memory_named(wanted.batch_size):
        chat = who.open(wanted.device, wanted.dtype)
        return run_tasks(chat, tasks, batch_size=wanted.batch_size, limit=wanted.limit, seed=wanted.seed)


def _candidates(wanted: Wanted, run: Path | None) -> list[Candidate]:
    tuned = Candidate(wanted.model, adapter=wanted.adapter)
    if wanted.against == "none":
        return [tuned]
    if wanted.against is not None:
        return [tuned, Candidate(wanted.against)]
    if run is not None:
        return [tuned, Candidate(wanted.model, before_training=True)]
    return [tuned, Candidate(wanted.model)] if wanted.adapter else [tuned]


def _judged(
    who: Candidate,
    questions: Sequence[Question],
    how: How,
    wanted: Wanted,
    names: list[str] | None,
    ks: Sequence[int],
    answers: Path,
) -> Judged:
    if not questions:
        return Judged(who.name, (), ())
    asked = ask(who, questions, how, answers, ranks=wanted.ranks, device=wanted.device, dtype=wanted.dtype)
    passed: list[list[bool]] = []
    if names and "exec" in names:
        limits = Limits(seconds=wanted.exec_timeout, confined=not wanted.exec_unconfined)
        with tqdm(total=len(questions) * how.samples, desc="running answers", unit="answer", leave=False) as bar:
            passed = pass_table(questions, asked, limits, progress=bar.update)
    return judge(who.name, questions, asked, names, passed, ks)


def _publish(results: Results, folder: Path, wanted: Wanted) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = results.to_json()
    text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    for path in {folder / "results.json", *([Path(wanted.json)] if wanted.json else [])}:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, text)
    page = folder / "comparison.html"
    put(page, render(found))
    print("\n".join(table(results)))
    print(f"\npage     {page}\nresults  {wanted.json or folder / 'results.json'}")
    return page


# ----------------------------------------------------------------------------------------------------------- questions


def _questions(wanted: Wanted, run: Path | None) -> tuple[list[Question], tuple[str, ...]]:
    """What is asked, and all labels of the file, those of rows that are not asked among them: they can be given too."""
    job = ResolvedJob.read(RunFiles(run).job) if run else None
    if wanted.source is not None:
        if job is None:
            raise SpecError(f"--source {wanted.source}: {wanted.model} is not a run directory, so it has no sources")
        if wanted.source not in job.sources:
            raise SpecError(f"--source {wanted.source}: the run has {', '.join(job.sources)}")
    if wanted.data is None:
        if job is None:
            raise SpecError("nothing to ask; give --data FILE (only a run directory has data of its own)")
        return _of_run(job, wanted), ()
    source, fields = _source(wanted, job)
    chosen = known = read_file(source, fields)
    if wanted.split is not None:
        if job is None:
            raise SpecError("--split: a file is read whole, unless MODEL_OR_RUN is a run that says how to split it")
        chosen = choose_split(known, wanted.split, source.split or job.spec.split)
        if not chosen:
            raise DataError(f"{wanted.data}: none of its {len(known):,} rows is in the {wanted.split} split")
    labels = tuple(sorted({question.label for question in known if question.label is not None}))
    return [chosen[number] for number in drawn(len(chosen), wanted.limit, wanted.seed)], labels


def _of_run(job: ResolvedJob, wanted: Wanted) -> list[Question]:
    chats, pairs = ([name for name, one in job.sources.items() if one.kind == kind] for kind in ("chat", "preference"))
    names = [wanted.source] if wanted.source else chats or pairs
    if not names:
        raise DataError("the run has no conversation sources, so there is nothing to ask; give --data FILE")
    for split in [wanted.split] if wanted.split else ["test", "validation"]:
        questions = read_prepared(job, names, split, limit=wanted.limit, seed=wanted.seed)
        if questions:
            if split != (wanted.split or "test"):
                print(f"the test split is empty; asking the {split} split, which the training was watched on")
            return questions
    empty = f"the {wanted.split} split is empty" if wanted.split else "the test split is empty, and validation is too"
    raise DataError(
        f"{empty} (sources {', '.join(names)}); give --data FILE, or train a run whose job sets shares aside: "
        "split: {train: 0.8, validation: 0.1, test: 0.1}"
    )


def _source(wanted: Wanted, job: ResolvedJob | None) -> tuple[SourceSpec, Fields]:
    """How the rows of --data are read: as a source of the job, as the options say, or by the names of their fields."""
    assert wanted.data is not None
    references = Path(wanted.references) if wanted.references else None
    if wanted.source is not None and job is not None:
        copy = job.spec.sources[wanted.source].model_copy(update={"path": (wanted.data,), "dataset": None})
        return copy, Fields(references=references)
    given = {name: getattr(wanted, name) for name in ("prompt", "response", "conversation", "label")}
    layout: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "prompt" not in layout and "conversation" not in layout:
        _spec(wanted.data, wanted.encoding, text="text")  # the encoding, before anything is read in it
        label = wanted.label or "label"
        layout = {**guess_layout(wanted.data, wanted.encoding, label=label, answered=references is None), **layout}
    label = layout.pop("label", None)
    answered = "response" in layout or "conversation" in layout or label is not None
    if "prompt" in layout:
        layout["response"] = label or layout.get("response") or layout["prompt"]
    if wanted.system is not None:
        layout["system"] = wanted.system
    return _spec(wanted.data, wanted.encoding, **layout), Fields(label, references, answered)


def _spec(path: str, encoding: str, **layout: Any) -> SourceSpec:
    try:
        return SourceSpec(path=path, encoding=encoding, **layout)
    except ValidationError as error:
        raise SpecError(f"--data {path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _check_numbers(wanted: Wanted) -> None:
    if not 0 <= wanted.seed < 1 << 32:
        raise SpecError(f"--seed {wanted.seed}: expected a whole number from 0 to {(1 << 32) - 1}")
    if wanted.exec_timeout <= 0:
        raise SpecError("--exec-timeout: expected more than 0, e.g. 10s")


def _metric_names(wanted: Wanted) -> list[str] | None:
    if wanted.metrics is None:
        return None
    names = _parts(wanted.metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise SpecError(f"--metrics {wanted.metrics}: unknown: {', '.join(unknown)}; there are {', '.join(METRICS)}")
    return names


def _ks(wanted: Wanted) -> list[int]:
    ks = [int(text) if text.isdecimal() else 0 for text in _parts(wanted.k)]
    if not ks or min(ks) < 1 or max(ks) > wanted.samples:
        raise SpecError(
            f"--k {wanted.k}: expected numbers from 1 to --samples ({wanted.samples}), e.g. --samples 9 --k 1,9"
        )
    if wanted.samples > 1 and wanted.temperature == 0:
        raise SpecError(f"--samples {wanted.samples}: at temperature 0 all would be the same; give --temperature 0.8")
    return ks


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]

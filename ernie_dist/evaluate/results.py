"""What was asked and answered -> metrics with intervals -> results.json and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ernie_dist.evaluate.asking import Asked, versions
from ernie_dist.evaluate.bootstrap import Compared, Estimate, compare
from ernie_dist.evaluate.metrics import (
    Metric,
    answer_metrics,
    class_metrics,
    confusion,
    loss_metrics,
    pass_metrics,
    text_metrics,
)
from ernie_dist.evaluate.questions import Question
from ernie_dist.spec.errors import SpecError

METRICS = {
    **dict.fromkeys(("bleu", "rouge_l_chars", "rouge_l_words", "chrf", "exact_match", "token_f1"), "texts"),
    **dict.fromkeys(("accuracy", "macro_f1"), "labels"),
    "exec": "tests",
    **dict.fromkeys(("loss", "perplexity"), "losses"),
    **dict.fromkeys(("distinct_1", "distinct_2", "length", "stop_rate"), "answers"),
}
"""{name: what it is made of}"""
_PER_TOKEN = ("loss", "perplexity", "length")
OTHER_TOKENS = "other tokens, not comparable"
FEW = 30
"""rows below which a bootstrap is too sure of itself"""
_PACKAGES = ("ernie_dist", "torch", "transformers", "sacrebleu", "jieba", "peft", "lm_eval")


@dataclass(frozen=True)
class Judged:
    """One model's answers and how good they are."""

    name: str
    asked: Sequence[Asked]
    metrics: Sequence[Metric]
    passed: Sequence[Sequence[bool]] = ()
    """of each question, which of its answers passed the tests; empty: none were run"""


@dataclass(frozen=True)
class Results:
    """One evaluation: a model, and perhaps another one beside it."""

    tuned: Judged
    base: Judged | None
    questions: Sequence[Question]
    compared: Sequence[Compared]
    settings: dict[str, Any] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    """what lm-evaluation-harness returned: {model: {task: {metric: value}}}"""

    def to_json(self) -> dict[str, Any]:
        models = {"tuned": self.tuned, **({"base": self.base} if self.base else {})}
        return _finite(
            {
                "format": 1,
                "models": {role: judged.name for role, judged in models.items()},
                "settings": self.settings,
                "versions": versions(*_PACKAGES),
                "rows": len(self.questions),
                "metrics": {one.name: _facts(one) for one in self.compared},
                "confusion": {role: found for role, judged in models.items() if (found := self.confusion(judged))},
                "harness": self.harness,
                "answers": [self._row(number, models) for number in range(len(self.questions))],
            }
        )

    def confusion(self, judged: Judged) -> dict[str, Any] | None:
        """{"labels": names, "counts": [label][given]}; None where nothing was classified."""
        labels = [question.label for question in self.questions]
        if not labels or None in labels or not judged.asked[0].answers:
            return None
        names, counts = confusion([one.answers[0] for one in judged.asked], [label or "" for label in labels])
        return {"labels": names, "counts": counts}

    def _row(self, number: int, models: dict[str, Judged]) -> dict[str, Any]:
        question = self.questions[number]
        row: dict[str, Any] = {"question": question.text, "reference": question.reference}
        if question.source:
            row["source"] = question.source
        for role, judged in models.items():
            asked = judged.asked[number]
            row[role] = {
                "answer": asked.answers[0] if asked.answers else None,
                **({"answers": asked.answers} if len(asked.answers) > 1 else {}),
                **({"scores": asked.scores} if asked.scores else {}),
                **({"passed": judged.passed[number]} if judged.passed else {}),
                "stopped": asked.stopped[0] if asked.answers else None,
                "metrics": {metric.name: float(metric.rows[number]) for metric in judged.metrics},
            }
        return row


def judge(
    name: str,
    questions: Sequence[Question],
    asked: Sequence[Asked],
    wanted: Sequence[str] | None,
    passed: Sequence[Sequence[bool]] = (),
    ks: Sequence[int] = (),
) -> Judged:
    """All metrics that these questions allow, or those named in `wanted`."""
    lacking = _lacking(questions)
    kinds = {METRICS[name] for name in wanted or METRICS} - set(lacking)
    answers = [one.answers[0] for one in asked if one.answers]
    found: list[Metric] = []
    if "labels" in kinds:
        found += class_metrics(answers, [question.label or "" for question in questions])
    if "texts" in kinds:
        found += text_metrics(answers, [question.reference or "" for question in questions])
    if passed:
        found += pass_metrics(passed, ks)
    if "losses" in kinds:
        found += loss_metrics([one.loss or 0.0 for one in asked], [one.loss_tokens for one in asked])
    if "answers" in kinds:
        found += answer_metrics(answers, [one.tokens[0] for one in asked], [one.stopped[0] for one in asked])
    kept = [one for one in found if wanted is None or one.name in wanted or one.name.startswith("pass@")]
    return Judged(name, asked, kept, passed)


def refuse_impossible(wanted: Sequence[str], questions: Sequence[Question]) -> None:
    """Raises SpecError for metrics that these questions do not allow, with the reason."""
    lacking = _lacking(questions)
    for name in wanted:
        if METRICS[name] in lacking:
            raise SpecError(f"--metrics {name}: {lacking[METRICS[name]]}")


def _lacking(questions: Sequence[Question]) -> dict[str, str]:
    """{what a metric is made of: why these questions do not give it}"""
    lacking = {}
    if any(question.label is not None for question in questions):
        lacking["texts"] = lacking["answers"] = "the rows are classified: they have accuracy and macro_f1"
    else:
        lacking["labels"] = "the rows have no label; name its field with --label"
    if any(question.reference is None for question in questions):
        lacking["texts"] = lacking["losses"] = "the rows hold no reference; name its field with --response"
    untested = sum(question.tests is None for question in questions)
    if untested:
        lacking["tests"] = f"{untested:,} of {len(questions):,} rows have no field `tests`; leave them out"
    return lacking


def compare_all(tuned: Judged, base: Judged | None, seed: int) -> list[Compared]:
    """Where the models cut text into different tokens, what is counted per token is not held against each other."""
    others = {metric.name: metric for metric in base.metrics} if base else {}
    found = [compare(metric, others.get(metric.name), seed=seed) for metric in tuned.metrics]
    if base is None or _token_counts(tuned) == _token_counts(base):
        return found
    return [replace(one, difference=None) if one.name in _PER_TOKEN else one for one in found]


def _token_counts(judged: Judged) -> list[int]:
    """Of the references, which are the same texts for both models; without them of the prompts."""
    return [one.loss_tokens or one.prompt_tokens for one in judged.asked]


def table(results: Results) -> list[str]:
    """Lines for a terminal: value [low, high] of each model, the difference, and whether it is one."""
    lines = _metric_lines(results) if results.questions else []
    for model, tasks in results.harness.items():
        lines.append(f"lm-evaluation-harness, {model}")
        lines += [f"  {task}  {name}  {value:.4f}" for task, values in tasks.items() for name, value in values.items()]
    return lines


def _metric_lines(results: Results) -> list[str]:
    heads = ["metric", "tuned"] + (["base", "difference", ""] if results.base else [])
    rows = [heads]
    for one in results.compared:
        row = [one.name, estimate_text(one.name, one.tuned)]
        if one.base is not None:
            apart = estimate_text(one.name, one.difference, signed=True) if one.difference else "–"
            row += [estimate_text(one.name, one.base), apart, verdict(one)]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines.append(f"{len(results.questions):,} rows; in brackets 95 % intervals by paired bootstrap over rows")
    if any(verdict(one) == OTHER_TOKENS for one in results.compared):
        lines.append(f"{', '.join(_PER_TOKEN)} count tokens, and the two models cut text into different ones")
    if len(results.questions) < FEW:
        lines.append(f"with fewer than {FEW} rows the intervals are too narrow to trust")
    return lines


def verdict(one: Compared) -> str:
    """Of the paired difference, in words: better, worse, or that nobody can tell."""
    if one.base is not None and one.difference is None:
        return OTHER_TOKENS
    if one.distinguishable is None or one.difference is None:
        return ""
    if not one.distinguishable:
        return "not distinguishable from 0"
    if one.higher_is_better is None:
        return "more" if one.difference.value > 0 else "less"
    return "better" if (one.difference.value > 0) == one.higher_is_better else "worse"


def estimate_text(metric: str, value: Estimate, *, signed: bool = False) -> str:
    """31.24 [28.10, 34.50]"""
    form = f"{'+' if signed else ''},.{4 if metric == 'loss' else 2}f"
    if value.low is None or value.high is None:
        return format(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _facts(one: Compared) -> dict[str, Any]:
    return {**{key: value for key, value in asdict(one).items() if key != "name"}, "verdict": verdict(one)}


def _finite(value: Any) -> Any:
    """JSON has no nan: a value that is not there is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

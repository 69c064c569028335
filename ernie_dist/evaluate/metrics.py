"""Answers beside references -> metrics, each as statistics per row that add up to the statistics of any set of rows.

rows --statistics--> [rows, S] --sum over rows--> [S] --value--> one number; a bootstrap only changes the sum
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from ernie_dist.spec.errors import DataError

_CHINESE = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_CHINESE}]|[^\W{_CHINESE}]+")


@dataclass(frozen=True)
class Metric:
    """One metric of one model's answers."""

    name: str
    about: str
    higher_is_better: bool | None
    """None: neither way"""
    statistics: np.ndarray
    """float64 [rows, S]"""
    value: Callable[[np.ndarray], float]
    """statistics added up over rows, [S] -> the value over these rows; nan where it has none"""
    rows: np.ndarray
    """float64 [rows]: the value of each row by itself, for sorting; nan where it has none"""
    interval: bool = True
    """False: a sample drawn with repetition would be biased, so there is no bootstrap of it"""

    @property
    def overall(self) -> float:
        return self.value(self.statistics.sum(axis=0))


def text_metrics(answers: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """The metrics that need answer and reference, in percent. Raises DataError if they are not equally many."""
    same_length(answers, references)
    lists = {"chars": _characters, "words": _words}
    longest = {
        name: [rouge_l(cut(answer), cut(reference)) for answer, reference in zip(answers, references, strict=True)]
        for name, cut in lists.items()
    }
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    overlap = [token_f1(tokens(a), tokens(r)) for a, r in zip(answers, references, strict=True)]
    return [
        _of_corpus("bleu", "BLEU-4, sacrebleu, tokenize=zh", BLEU(tokenize="zh"), answers, references),
        _mean("rouge_l_chars", "ROUGE-L, F1 over characters", longest["chars"], 100),
        _mean("rouge_l_words", "ROUGE-L, F1 over words as jieba cuts them", longest["words"], 100),
        _of_corpus("chrf", "chrF2, sacrebleu: character n-grams to 6", CHRF(), answers, references),
        _mean("exact_match", "answers equal to the reference but for white space around them", exact, 100),
        _mean("token_f1", "F1 over Chinese characters and words of other scripts, in any order", overlap, 100),
    ]


def answer_metrics(answers: Sequence[str], lengths: Sequence[int], stopped: Sequence[bool]) -> list[Metric]:
    """What answers are like, whatever the reference says."""
    return [
        _distinct(1, answers),
        _distinct(2, answers),
        _mean("length", "tokens in an answer", lengths, better=None),
        _mean("stop_rate", "answers that ended by themselves, %", stopped, 100),
    ]


def loss_metrics(losses: Sequence[float], counts: Sequence[int]) -> list[Metric]:
    """From each row's summed loss (nats) and the number of its answer tokens."""
    sums = np.column_stack([np.asarray(losses, float), np.asarray(counts, float)])

    def loss(total: np.ndarray) -> float:
        return float(total[0] / total[1]) if total[1] else float("nan")

    def perplexity(total: np.ndarray) -> float:
        return float(np.exp(loss(total)))

    return [
        Metric("loss", "mean over answer tokens, nats", False, sums, loss, np.array([loss(row) for row in sums])),
        Metric("perplexity", "exp(loss)", False, sums, perplexity, np.array([perplexity(row) for row in sums])),
    ]


def class_metrics(predicted: Sequence[str], labels: Sequence[str]) -> list[Metric]:
    """Accuracy, and F1 averaged over the labels that occur as label or prediction, each counting the same."""
    same_length(predicted, labels)
    names = sorted({*labels, *predicted})
    hit = np.array([guess == label for guess, label in zip(predicted, labels, strict=True)])
    is_label, is_guess = (np.array([[one == name for name in names] for one in side]) for side in (labels, predicted))
    statistics = np.hstack([is_label & hit[:, None], is_label, is_guess]).astype(float)

    def macro_f1(total: np.ndarray) -> float:
        right, labelled, guessed = total.reshape(3, -1)
        there = labelled + guessed > 0
        return 100 * float(np.mean(2 * right[there] / (labelled + guessed)[there]))

    rows = 100 * hit.astype(float)
    return [
        _mean("accuracy", "rows given their label", hit, 100),
        Metric("macro_f1", "F1 of each label, averaged over labels", True, statistics, macro_f1, rows),
    ]


def pass_metrics(passed: Sequence[Sequence[bool]], ks: Sequence[int]) -> list[Metric]:
    """pass@k for each k, of tests that the answers to each question passed or not."""
    return [
        _mean(f"pass@{k}", f"problems solved by one of {k} answers, %", [pass_at(k, one) for one in passed], 100)
        for k in ks
    ]


def pass_at(k: int, passed: Sequence[bool]) -> float:
    """Unbiased estimate of the chance that one of k answers passes: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021,
    arXiv:2107.03374), from n answers of which c passed. Raises DataError if n < k."""
    count, right = len(passed), sum(passed)
    if count < k:
        raise DataError(f"pass@{k} needs {k} answers to each question, and there are {count}; give --samples {k}")
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def confusion(predicted: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """(names, counts): counts[i][j] rows of label i were given label j."""
    names = sorted({*labels, *predicted})
    pairs = Counter(zip(labels, predicted, strict=True))
    return names, [[pairs[label, guess] for guess in names] for label in names]


def same_length(answers: Sequence[Any], references: Sequence[Any]) -> None:
    """Raises DataError."""
    if len(answers) != len(references):
        raise DataError(
            f"{len(answers):,} answers and {len(references):,} references: there must be one reference for each row, "
            "in the same order"
        )


def tokens(text: str) -> list[str]:
    """Chinese characters one by one, words of other scripts whole and in lower case; no punctuation, no white space."""
    return _TOKEN.findall(text.lower())


def token_f1(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of a bag of tokens (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    return _f1((Counter(answer) & Counter(reference)).total(), len(answer), len(reference))


def rouge_l(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence (Lin 2004, "ROUGE", with beta = 1); of two empty texts 1, of one 0."""
    return _f1(common_subsequence(answer, reference), len(answer), len(reference))


def common_subsequence(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyro 2004): no recursion."""
    places: dict[Hashable, int] = {}
    for number, token in enumerate(other):
        places[token] = places.get(token, 0) | 1 << number
    everything = (1 << len(other)) - 1
    zeros = everything  # a bit that has become 0 is one more token in common
    for token in one:
        here = zeros & places.get(token, 0)
        zeros = ((zeros + here) | (zeros - here)) & everything
    return len(other) - zeros.bit_count()


def _f1(common: int, answer: int, reference: int) -> float:
    if not answer and not reference:
        return 1.0
    return 2 * common / (answer + reference)


def _characters(text: str) -> list[str]:
    return [character for character in text if not character.isspace()]


def _words(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it announces its dictionary
    return [word for word in jieba.cut(text) if not word.isspace()]


def _mean(name: str, about: str, values: Sequence[float], scale: float = 1, *, better: bool | None = True) -> Metric:
    rows = scale * np.asarray(values, float)
    return Metric(name, about, better, np.column_stack([rows, np.ones(len(rows))]), _ratio, rows)


def _ratio(total: np.ndarray) -> float:
    return float(total[0] / total[1]) if total[1] else float("nan")


def _of_corpus(name: str, about: str, metric: Any, answers: Sequence[str], references: Sequence[str]) -> Metric:
    """A metric of sacrebleu's, by the statistics that its own significance tests resample."""
    statistics = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), float)

    def value(total: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([int(count) for count in total]).score)

    single = type(metric)(tokenize="zh", effective_order=True) if isinstance(metric, BLEU) else metric
    rows = [single.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)]
    return Metric(name, about, True, statistics, value, np.array(rows, float))


def _distinct(size: int, answers: Sequence[str]) -> Metric:
    """Li et al. 2016, arXiv:1510.03055: different n-grams over all of them, over all answers together."""
    grams = [list(zip(*(cut[start:] for start in range(size)), strict=False)) for cut in map(tokens, answers)]
    known: set[Any] = set()
    new = []
    for row in grams:
        new.append(len(set(row) - known))
        known.update(row)
    statistics = np.column_stack([100.0 * np.array(new), [float(len(row)) for row in grams]])
    rows = np.array([100 * len(set(row)) / len(row) if row else float("nan") for row in grams])
    about = f"different {size}-grams among all of them, Chinese characters and words of other scripts, %"
    return Metric(f"distinct_{size}", about, True, statistics, _ratio, rows, interval=False)

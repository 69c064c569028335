"""Metrics against values worked out by hand on Chinese text, and the bootstrap against what it must say."""

import math

import numpy as np
import pytest

from ernie_dist.evaluate.bootstrap import compare
from ernie_dist.evaluate.metrics import (
    class_metrics,
    common_subsequence,
    confusion,
    loss_metrics,
    text_metrics,
    token_f1,
    tokens,
)
from ernie_dist.spec.errors import DataError

ANSWERS = ["今天天气好", "", "用GPU训练模型"]
REFERENCES = ["今天天气很好", "你好", "用 GPU 训练大模型"]
"""an answer without spaces, an empty one, one in two scripts"""


def values(answers: list[str], references: list[str]) -> dict[str, float]:
    return {metric.name: metric.overall for metric in text_metrics(answers, references)}


def test_bleu_by_hand() -> None:
    """sacrebleu's zh puts a space around every Chinese character, then cuts as mteval-v13a does.

    row 1: 今 天 天 气 好 (5)                 against 今 天 天 气 很 好 (6)
    row 2: nothing (0)                        against 你 好 (2)
    row 3: 用 GPU 训 练 模 型 (6)             against 用 GPU 训 练 大 模 型 (7)
    in common / in the answers
      1-grams  5 + 6 = 11 / 5 + 6 = 11
      2-grams  今天 天天 天气: 3; 用GPU GPU训 训练 模型: 4      7 / 4 + 5 = 9
      3-grams  今天天 天天气: 2; 用GPU训 GPU训练: 2             4 / 3 + 4 = 7
      4-grams  今天天气: 1; 用GPU训练: 1                        2 / 2 + 3 = 5
    brevity: 11 tokens against 15: exp(1 - 15/11)
    """
    precision = (11 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** (1 / 4)
    assert values(ANSWERS, REFERENCES)["bleu"] == pytest.approx(100 * math.exp(1 - 15 / 11) * precision)


def test_rouge_l_by_hand() -> None:
    """F1 = 2 * common / (length + length), averaged over rows.

    characters  row 1: 今天天气好 in 今天天气很好: 2*5 / (5+6); row 2: 0; row 3: 用GPU训练模型 (8) all in
                用GPU训练大模型 (9, spaces left out): 2*8 / (8+9)
    words       jieba: 今天天气 好 / 今天天气 很 好: 2*2 / (2+3); row 2: 0;
                用 GPU 训练 模型 / 用 GPU 训练 大 模型: 2*4 / (4+5)
    """
    found = values(ANSWERS, REFERENCES)
    assert found["rouge_l_chars"] == pytest.approx(100 * (10 / 11 + 0 + 16 / 17) / 3)
    assert found["rouge_l_words"] == pytest.approx(100 * (4 / 5 + 0 + 8 / 9) / 3)


def test_chrf_by_hand() -> None:
    """Character n-grams, n = 1 to 6, white space left out; of precision and recall, each averaged over n, the F with
    beta = 2, which is 5PR / (4P + R).

    今天天气好 against 今天天气很好   common / in the answer / in the reference
      1: 5/5/6   2: 3/4/5   3: 2/3/4   4: 1/2/3   5: 0/1/2; a 6-gram has only the reference, so n = 6 does not count
    """
    precision = (5 / 5 + 3 / 4 + 2 / 3 + 1 / 2 + 0) / 5  # 7/12
    recall = (5 / 6 + 3 / 5 + 2 / 4 + 1 / 3 + 0) / 5  # 34/75
    by_hand = 100 * 5 * precision * recall / (4 * precision + recall)
    assert values(ANSWERS[:1], REFERENCES[:1])["chrf"] == pytest.approx(by_hand)
    assert values([""], ["你好"])["chrf"] == 0
    assert values(["用GPU训练"], ["用 GPU 训练"])["chrf"] == pytest.approx(100)


def test_exact_match_and_token_f1_by_hand() -> None:
    """Tokens are Chinese characters, and words of other scripts in lower case; punctuation is left out.

    用 gpu 训 练 模 型 (6) and 用 gpu 训 练 大 模 型 (7): 6 in common: 2*6/13; 今天天气好: 2*5/11; the empty one: 0
    """
    assert tokens("用 GPU，训练v2模型。") == ["用", "gpu", "训", "练", "v2", "模", "型"]
    found = values(ANSWERS, REFERENCES)
    assert found["token_f1"] == pytest.approx(100 * (10 / 11 + 0 + 12 / 13) / 3)
    assert found["exact_match"] == 0 and values(["你好 "], ["你好"])["exact_match"] == 100
    assert token_f1([], []) == 1 and token_f1(["a"], []) == 0


def test_common_subsequence_is_the_table_of_the_textbook() -> None:
    def table(one: str, other: str) -> int:
        rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, first in enumerate(one):
            for j, second in enumerate(other):
                rows[i + 1][j + 1] = rows[i][j] + 1 if first == second else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    generator = np.random.default_rng(0)
    for _ in range(200):
        one, other = ("".join(generator.choice(list("甲乙丙丁"), size)) for size in generator.integers(0, 40, 2))
        assert common_subsequence(one, other) == table(one, other)
    assert common_subsequence("长" * 50_000, "长" * 40_000) == 40_000  # no recursion to run out of


def test_macro_f1_by_hand() -> None:
    """labels 查 查 查 退, given 查 查 退 退: F1(查) = 2*2 / (3+2), F1(退) = 2*1 / (1+2)."""
    labels, given = ["查", "查", "查", "退"], ["查", "查", "退", "退"]
    found = {metric.name: metric.overall for metric in class_metrics(given, labels)}
    assert found["accuracy"] == 75
    assert found["macro_f1"] == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)
    names, counts = confusion(given, labels)
    assert (names, counts) == (["查", "退"], [[2, 1], [0, 1]])


def test_loss_is_per_token_not_per_row() -> None:
    loss, perplexity = loss_metrics([10.0, 2.0], [100, 2])
    assert loss.overall == pytest.approx(12 / 102)
    assert perplexity.overall == pytest.approx(math.exp(12 / 102))


def test_references_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="2 answers and 3 references"):
        text_metrics(["一", "二"], ["一", "二", "三"])


def test_bootstrap_tells_a_difference_from_noise() -> None:
    """100 rows: right in 70 against right in 30 is a difference; two models of equal chance are not."""
    generator = np.random.default_rng(1)
    good, bad = (["对" if right else "错" for right in generator.random(100) < share] for share in (0.7, 0.3))
    again = generator.permutation(good).tolist()
    metric = {
        name: text_metrics(answers, ["对"] * 100)[4] for name, answers in zip("gba", (good, bad, again), strict=True)
    }
    apart = compare(metric["g"], metric["b"])
    assert apart.distinguishable is True and apart.difference is not None and apart.difference.low is not None
    assert apart.difference.value == pytest.approx(apart.tuned.value - apart.base.value)  # type: ignore[union-attr]
    assert compare(metric["g"], metric["a"]).distinguishable is False
    assert compare(metric["g"], metric["b"]) == apart  # the same seed, the same interval
    # The interval of a share is the binomial one: 1.96 * sqrt(p (1 - p) / n).
    width = 100 * 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert apart.tuned.high is not None and apart.tuned.low is not None
    assert (apart.tuned.high - apart.tuned.low) / 2 == pytest.approx(width, rel=0.15)


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    """Both models fail on the same hard rows: it is the difference on each row that counts."""
    hard = ["错" if number % 2 else "对" for number in range(200)]
    better = ["对" if number % 20 == 1 else one for number, one in enumerate(hard)]
    one, other = (text_metrics(answers, ["对"] * 200)[4] for answers in (better, hard))
    found = compare(one, other)
    assert found.base is not None and found.base.high is not None and found.tuned.low is not None
    assert found.tuned.low < found.base.high and found.distinguishable is True


def test_values_over_all_rows_are_those_of_sacrebleu() -> None:
    """What the bootstrap adds up from rows is what the library says of the whole corpus."""
    from sacrebleu.metrics import BLEU, CHRF

    found = values(ANSWERS, REFERENCES)
    assert found["bleu"] == pytest.approx(BLEU(tokenize="zh").corpus_score(ANSWERS, [REFERENCES]).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(ANSWERS, [REFERENCES]).score)

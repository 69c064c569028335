"""Entity, attribute, value -> a sentence, or a question and its answer, in one of several phrasings.

长江, 全长, 6300公里  ->  "长江的全长是6300公里。"  |  ("请问长江的全长是什么？", "长江的全长是6300公里。")
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class _Phrasings(NamedTuple):
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# Which phrasing a triple gets depends on the number of phrasings: adding one changes prepared data, so raise
# shard.FORMAT with it.
_CHINESE = _Phrasings(
    sentences=("{e}的{a}是{v}。", "{e}的{a}：{v}。", "{e}，{a}为{v}。", "关于{e}，其{a}是{v}。", "{v}是{e}的{a}。"),
    questions=(
        "{e}的{a}是什么？",
        "请问{e}的{a}是什么？",
        "你知道{e}的{a}吗？",
        "告诉我{e}的{a}。",
        "我想了解{e}的{a}。",
        "关于{e}，{a}是什么？",
    ),
    answers=("{e}的{a}是{v}。",),
)
_ENGLISH = _Phrasings(
    sentences=("The {a} of {e} is {v}.", "{e}: {a} is {v}.", "{v} is the {a} of {e}."),
    questions=("What is the {a} of {e}?", "Tell me the {a} of {e}.", "Do you know the {a} of {e}?"),
    answers=("The {a} of {e} is {v}.",),
)


def sentence(entity: str, attribute: str, value: str) -> str:
    """The triple as one sentence; the same triple always gives the same one."""
    return _say(_phrasings(entity, attribute).sentences, entity, attribute, value)


def question_and_answer(entity: str, attribute: str, value: str) -> tuple[str, str]:
    """A question about the value, and a full sentence that answers it."""
    phrasings = _phrasings(entity, attribute)
    return (
        _say(phrasings.questions, entity, attribute, value),
        _say(phrasings.answers, entity, attribute, value),
    )


def _phrasings(entity: str, attribute: str) -> _Phrasings:
    return _ENGLISH if (entity + attribute).isascii() else _CHINESE


def _say(templates: tuple[str, ...], entity: str, attribute: str, value: str) -> str:
    content = "\x1f".join((entity, attribute, value)).encode(errors="surrogatepass")
    choice = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") % len(templates)
    return templates[choice].format(e=entity, a=attribute, v=value)

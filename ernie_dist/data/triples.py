"""Entity, attribute, value -> sentences, or questions and their answers, in several wordings.

长江, 全长, 6300公里  ->  "长江的全长是6300公里。"  |  ("请问长江的全长是什么？", "长江的全长是6300公里。")
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from ernie_dist.spec.curriculum import TriplesSpec


class Triple(NamedTuple):
    entity: str
    attribute: str
    value: str


class Wording(NamedTuple):
    """A triple in one of its wordings."""

    question: str | None
    """None: the text is a plain sentence"""
    text: str
    place: int | None
    """32 bits that decide the split, in place of the content's hash"""


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

_SAYS_NOTHING = {
    *("无", "暂无", "没有", "未知", "不详", "不明", "待补充", "待定", "暂缺", "空", "略", "其他", "其它", "详见正文"),
    *("none", "null", "nil", "nan", "n/a", "na", "unknown", "undefined", "tbd"),
}
_MARKUP = re.compile(r"https?://|www\.|</?[A-Za-z][^<>]*>|<!--|&(?:[a-z]+|#\d+);|\{\{|\}\}", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_FOOTNOTE = re.compile(r"\[\d{1,3}(?:[-,、]\d{1,3})*\]")


def tidy(triple: Triple) -> Triple:
    """[[target|shown]] becomes what is shown, [1] goes, and each run of white space becomes one space."""
    return Triple(*(" ".join(_FOOTNOTE.sub("", _LINK.sub(r"\1", part)).split()) for part in triple))


def objection(triple: Triple, spec: TriplesSpec) -> str | None:
    """Why there is nothing to learn from a triple; None if nothing is wrong with it. One of a few short reasons."""
    if spec.longest is not None and max(map(len, triple)) > spec.longest:
        return "too long"
    entity, attribute, value = triple
    if not value:
        return "no value"
    if not entity or not attribute:
        return "no entity or attribute"
    if not spec.filter:
        return None
    if not all(any(map(str.isalnum, part)) for part in triple):
        return "only punctuation"
    said = value.strip("。.（）()")
    if said != "Na" and said.casefold() in _SAYS_NOTHING:  # Na is sodium
        return "value says nothing"
    if value in (entity, attribute):
        return "value repeats the entity or attribute"
    if any(map(_MARKUP.search, triple)):
        return "link or markup"
    return None


def wordings(triple: Triple, spec: TriplesSpec) -> list[Wording]:
    """The triple in spec.phrasings wordings, or as many as there are; the same triple always gets the same ones."""
    known = _ENGLISH if (triple.entity + triple.attribute).isascii() else _CHINESE
    templates = known.questions if spec.make == "qa" else known.sentences
    content = "\x1f".join(triple)
    first, count = _hash(content), min(spec.phrasings, len(templates))
    made = []
    for number in range(count):
        said = _fill(templates[(first + number) % len(templates)], triple)
        place = _place(triple, content, number, count, spec)
        if spec.make == "qa":
            made.append(Wording(said, _fill(known.answers[first % len(known.answers)], triple), place))
        else:
            made.append(Wording(None, said, place))
    return made


def _place(triple: Triple, content: str, number: int, count: int, spec: TriplesSpec) -> int | None:
    """Entities stay together; the wordings of a triple spread evenly over the splits, the first of them in train."""
    if spec.hold_out == "entities":
        return _hash(triple.entity) >> 32
    if spec.hold_out == "phrasings":
        return ((number << 32) + (_hash(f"place\x1f{content}") >> 32)) // count
    return None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _fill(template: str, triple: Triple) -> str:
    return template.format(e=triple.entity, a=triple.attribute, v=triple.value)

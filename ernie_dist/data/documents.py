"""A row of a file -> a document: plain text, or the turns of a conversation. Says why a row is none.

{"ask": ..., "answer": ...} --template--> "..."
{"messages": [...]} --layout--> (Turn(system), Turn(user), Turn(assistant), ...)
{"prompt", "chosen", "rejected"} --layout--> Preference(conversation, conversation)
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ernie_dist.data import triples
from ernie_dist.data.split import digest, placed
from ernie_dist.spec.curriculum import SourceSpec, TriplesSpec
from ernie_dist.spec.errors import DataError

Row = Mapping[str, Any]


class BadRow(ValueError):
    """Why a row is not a document. Caught where rows are counted; never seen by a person as an exception."""


class LeftOut(ValueError):
    """Why a row is passed over as its source asked for: one of a few short reasons, counted."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    """system, user or assistant"""
    content: str
    counts: bool
    """whether the model learns to say this; only answers can count"""


Conversation = tuple[Turn, ...]


class Preference(NamedTuple):
    """One conversation with two last answers, of which the first was preferred."""

    chosen: Conversation
    rejected: Conversation


Document = str | Conversation | Preference


class Marked(NamedTuple):
    """A document, and the hash that decides its split and whether it was there before."""

    document: Document
    digest: int


def row_reader(source: SourceSpec) -> Callable[[Row], list[Marked]]:
    """The function that turns one row of `source` into documents, one or more, or raises BadRow or LeftOut.

    Raises DataError if a template of the source is none.
    """
    if source.triples is not None:
        spec = TriplesSpec(make=source.triples) if isinstance(source.triples, str) else source.triples
        return lambda row: _wordings(row, spec)
    make = document_maker(source)
    return lambda row: [_marked(make(row))]


def document_maker(source: SourceSpec) -> Callable[[Row], Document]:
    """The function that turns one row of `source`, which holds no triples, into a document, or raises BadRow.

    Raises DataError if a template of the source is none.
    """
    if source.text is not None:
        read_text = _field_or_template(source.text)
        return lambda row: _not_empty(read_text(row), "text")
    if source.conversation is not None:
        return _LAYOUTS[source.conversation]
    if source.preference is not None:
        return _PREFERENCES[source.preference]
    assert source.prompt is not None and source.response is not None
    prompt, response = _field_or_template(source.prompt), _field_or_template(source.response)
    system = _field_or_template(source.system) if source.system is not None else None
    return lambda row: _exchange(prompt(row), response(row), system(row) if system else None)


def turns(document: Conversation | Preference) -> Iterator[Turn]:
    """All turns; of a pair those that both conversations share as often as they are in it."""
    for conversation in document if isinstance(document, Preference) else (document,):
        yield from conversation


def canonical(document: Document) -> bytes:
    """What makes two documents the same: their content, however it was laid out. Raises BadRow.

    It decides split and duplicates, so it must never change.
    """
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # readers leave such marks, and "\ud800" in JSON is one
        raise BadRow(f"undecodable bytes, or half of a surrogate pair, at character {error.start}") from None


def _marked(document: Document, place: int | None = None) -> Marked:
    value = digest(canonical(document))
    if isinstance(document, Preference):  # all pairs of one question are trained on, or none is
        place = digest(canonical(document.chosen[:-1])) >> 32
    return Marked(document, value if place is None else placed(value, place))


def _field_or_template(given: str) -> Callable[[Row], str]:
    parts = list(string.Formatter().parse(given))
    if all(name is None for _, name, _, _ in parts):
        return lambda row: _text(row, given)
    pieces: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise DataError(f"template {given!r}: write fields by their name alone, as in {{ask}}; no {{}}, !r or :>10")
        pieces.append((literal, name))
    return lambda row: "".join(literal + (_printed(row, name) if name else "") for literal, name in pieces)


def _get(row: Row, name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise BadRow(f"no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}") from None


def _text(row: Row, name: str) -> str:
    value = _get(row, name)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is {_kind(value)}, expected text")
    return value


def _printed(row: Row, name: str, *, may_be_blank: bool = False) -> str:
    """Text, or a number as a person would write it."""
    value = _get(row, name)
    if isinstance(value, str):
        text = value
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        text = str(value)
    else:
        raise BadRow(f"field {name!r} is {_kind(value)}, expected text or a number")
    return text if may_be_blank else _not_empty(text, f"field {name!r}")


def _not_empty(text: str, what: str) -> str:
    if not text or text.isspace():
        raise BadRow(f"{what} is empty")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_TRIPLE_FIELDS = (
    ("entity", "实体", "subject", "head", "主体", "头实体"),
    ("attribute", "属性", "predicate", "relation", "关系"),
    ("value", "值", "属性值", "object", "tail", "客体", "尾实体"),
)


def _wordings(row: Row, spec: TriplesSpec) -> list[Marked]:
    triple = triples.Triple(*_triple(row, may_be_empty=spec.filter))
    triple = triples.tidy(triple) if spec.tidy else triple
    if reason := triples.objection(triple, spec):
        raise LeftOut(reason)
    made = triples.wordings(triple, spec)
    return [_marked(one.text if one.question is None else _exchange(one.question, one.text), one.place) for one in made]


def _triple(row: Row, *, may_be_empty: bool) -> list[str]:
    found = []
    for names in _TRIPLE_FIELDS:
        name = next((name for name in names if name in row), None)
        if name is None:
            raise BadRow(f"no field for the {names[0]}: name it one of {', '.join(names)}; it has {', '.join(row)}")
        empty = may_be_empty and (row[name] is None or row[name] == "")
        found.append("" if empty else _printed(row, name, may_be_blank=may_be_empty).strip())
    return found


def _exchange(prompt: str, response: str, system: str | None = None) -> Conversation:
    turns = [("user", prompt, False), ("assistant", response, True)]
    return _conversation([("system", system, False), *turns] if system else turns)


_NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


def _conversation(turns: Sequence[tuple[str, str, bool]]) -> Conversation:
    """Checks order and content: [system] (user assistant)+, with no empty turn and an answer that counts."""
    before = None
    for number, (role, content, _) in enumerate(turns, 1):
        if role not in _NEXT[before]:
            after = f"after {before}" if before else "at the start"
            raise BadRow(f"turn {number} is by {role}, expected {' or '.join(_NEXT[before])} {after}")
        if not isinstance(content, str):
            raise BadRow(f"turn {number} ({role}) is {_kind(content)}, expected text")
        _not_empty(content, f"turn {number} ({role})")
        before = role
    if before != "assistant":
        raise BadRow("no answer: the last turn must be by assistant" if turns else "the conversation has no turns")
    if not any(counts for _, _, counts in turns):
        raise BadRow("no answer counts: every label or weight is 0")
    return tuple(Turn(*turn) for turn in turns)


def _messages(row: Row) -> Conversation:
    """OpenAI: {"messages": [{"role", "content", "weight"?}, ...]}"""
    turns = []
    for number, message in enumerate(_list(row, "messages"), 1):
        _check_type(message, dict, f"message {number}", "an object with role and content")
        role = _role(message.get("role"), {"developer": "system"}, number)
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(_text(part, "text") for part in content)
        weight = message.get("weight", 1)
        if weight not in (0, 1, None):
            raise BadRow(f"message {number} has weight {weight!r}, expected 0 or 1")
        turns.append((role, content, role == "assistant" and weight != 0))
    return _conversation(turns)


def _sharegpt(row: Row) -> Conversation:
    """{"conversations": [{"from", "value"}, ...], "system"?}"""
    names = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
    turns = _system(row)
    for number, message in enumerate(_list(row, "conversations"), 1):
        _check_type(message, dict, f"turn {number}", "an object with from and value")
        role = _role(message.get("from"), names, number)
        turns.append((role, message.get("value"), role == "assistant"))
    return _conversation(turns)


def _alpaca(row: Row) -> Conversation:
    """{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}"""
    prompt = _text(row, "instruction")
    if row.get("input"):
        prompt = f"{prompt}\n{_text(row, 'input')}" if prompt else _text(row, "input")
    turns = _system(row)
    for number, pair in enumerate(_list(row, "history") if row.get("history") else (), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history {number} is not a pair of question and answer")
        turns += [("user", pair[0], False), ("assistant", pair[1], True)]
    return _conversation([*turns, ("user", prompt, False), ("assistant", _text(row, "output"), True)])


def _erniekit(row: Row) -> Conversation:
    """{"src": question(s), "tgt": answer(s), "system"?, "label"?: which answers count, 0 or 1 each}"""
    questions, answers = ([side] if isinstance(side, str) else side for side in (_get(row, "src"), _get(row, "tgt")))
    for name, side in (("src", questions), ("tgt", answers)):
        _check_type(side, list, f"field {name!r}", "text or a list of texts")
    if len(questions) != len(answers):
        raise BadRow(f"src has {len(questions)} turns and tgt has {len(answers)}; they must match")
    labels = row.get("label") or [1] * len(answers)
    _check_type(labels, list, "field 'label'", "a list of 0 and 1")
    if len(labels) != len(answers) or any(label not in (0, 1, "0", "1") for label in labels):
        raise BadRow(f"label is {labels!r}, expected one 0 or 1 for each of {len(answers)} answers")
    turns = _system(row)
    for question, answer, label in zip(questions, answers, labels, strict=True):
        turns += [("user", question, False), ("assistant", answer, bool(int(label)))]
    return _conversation(turns)


_LAYOUTS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "erniekit": _erniekit,
}


def _pairs(row: Row) -> Preference:
    """{"prompt": question or messages, "chosen": answer or messages, "rejected": the same, "system"?}

    Messages of an answer may begin with those of the prompt, with the system prompt or without it.
    """
    prompt = _get(row, "prompt") if "prompt" in row else []
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _check_type(asked, list, "field 'prompt'", "text or a list of messages")
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    sides = []
    for name in ("chosen", "rejected"):
        answer = _get(row, name)
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        _check_type(after, list, f"field {name!r}", "text or a list of messages")
        opening = system or [one for one in after[:1] if _said(one)[0] == "system"]
        if _begins(after, [*opening, *asked]):
            side = after
        elif _begins(after, asked):
            side = [*system, *after]
        elif asked and _said(asked[-1])[0] == "user" and after and _said(after[0])[0] in ("system", "user"):
            raise BadRow(f"field {name!r} is a conversation that does not begin with the prompt; leave prompt out")
        else:
            side = [*system, *asked, *after]
        sides.append(side)
    return _preference(*([(turn.role, turn.content) for turn in _messages({"messages": side})] for side in sides))


def _begins(messages: Sequence[Any], others: Sequence[Any]) -> bool:
    return [_said(one) for one in messages[: len(others)]] == [_said(one) for one in others]


def _said(message: Any) -> tuple[Any, Any]:
    """Role and content of a message, which may have more fields."""
    return (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, message)


def _erniekit_pairs(row: Row) -> Preference:
    """{"src": question(s), "tgt": answers but the last, "response": [answer, answer], "sort": the higher is better}"""
    questions, answers = ([side] if isinstance(side, str) else side for side in (_get(row, "src"), row.get("tgt", [])))
    for name, side in (("src", questions), ("tgt", answers)):
        _check_type(side, list, f"field {name!r}", "text or a list of texts")
    if len(questions) != len(answers) + 1:
        raise BadRow(f"src has {len(questions)} turns and tgt has {len(answers)}; tgt must lack the last answer")
    responses, sort = _list(row, "response"), _list(row, "sort")
    texts = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in responses]
    if len(texts) != 2 or len(sort) != 2 or sort[0] == sort[1] or not all(isinstance(one, int) for one in sort):
        raise BadRow(f"expected two responses and two different numbers in sort; got {len(texts)} and {sort!r}")
    turns = [(role, content) for role, content, _ in _system(row)]
    for question, answer in zip(questions, answers, strict=False):
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", questions[-1]))
    chosen, rejected = texts if sort[0] > sort[1] else reversed(texts)
    return _preference([*turns, ("assistant", chosen)], [*turns, ("assistant", rejected)])


_PREFERENCES: dict[str, Callable[[Row], Preference]] = {"pairs": _pairs, "erniekit": _erniekit_pairs}


def _preference(*sides: Sequence[tuple[str, Any]]) -> Preference:
    """Of each side only the last answer counts; what comes before it must be the same."""
    last = [len(side) - 1 for side in sides]
    made = [
        _conversation([(role, content, number == end) for number, (role, content) in enumerate(side)])
        for side, end in zip(sides, last, strict=True)
    ]
    chosen, rejected = made
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected answer different conversations; only the last answer may differ")
    if chosen[-1] == rejected[-1]:
        raise BadRow("chosen and rejected are the same answer")
    return Preference(chosen, rejected)


def _system(row: Row) -> list[tuple[str, Any, bool]]:
    return [("system", _text(row, "system"), False)] if row.get("system") else []


def _list(row: Row, name: str) -> Sequence[Any]:
    value = _get(row, name)
    _check_type(value, list, f"field {name!r}", "a list")
    return value


def _check_type(value: Any, wanted: type, what: str, expected: str) -> None:
    if not isinstance(value, wanted):
        raise BadRow(f"{what} is {_kind(value)}, expected {expected}")


def _role(given: Any, other_names: Mapping[str, str], number: int) -> str:
    role = other_names.get(given, given) if isinstance(given, str) else given
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"turn {number} is by {given!r}; only system, user and assistant can be trained on")
    return role

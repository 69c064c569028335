"""What a model is asked, and what it should say: rows of a file, or conversations of a prepared source.

file --reader, layout--> Question(turns) ---.
prepared source --shards--> Question(coded) +--a model's tokenizer--> Rendered: prompt, then tokens and labels
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ernie_dist.batch import IGNORED
from ernie_dist.data.documents import BadRow, Conversation, Turn, canonical, document_maker
from ernie_dist.data.readers import Broken, find_inputs, line_encoding, parse_block, read_blocks
from ernie_dist.data.render import LAST_ANSWER, ChatFrame, Encoder
from ernie_dist.data.shard import PreparedSource
from ernie_dist.data.split import SPLITS, digest, split_of
from ernie_dist.data.tokenizer import PublishedTokenizer, load_published, publish
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.resolve import ResolvedJob

_SHOWN = 5
"""bad rows named in a message"""
_FIELDS = (("input", "output"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
_LAYOUTS = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "src": "erniekit"}


@dataclass(frozen=True)
class Coded:
    """A conversation as it was prepared: token ids and loss mask."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    tokenizer: str
    """fingerprint"""
    labels: tuple[tuple[int, int], ...]
    """replacements: what is written in the inputs, what the model learns to say there"""


@dataclass(frozen=True)
class Question:
    """One row: what to ask and what is known about the answer."""

    text: str
    """for a person to read"""
    reference: str | None
    """None: there is no right text, only tests"""
    source: str = ""
    turns: Conversation | None = None
    coded: Coded | None = None
    label: str | None = None
    tests: str | None = None
    entry_point: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A question in the tokens of one model."""

    prompt: np.ndarray
    """int64: up to where the (last) answer begins"""
    ids: np.ndarray
    """int64 [T]: the whole conversation"""
    labels: np.ndarray
    """int64 [T]: what position t should predict, or IGNORED; of all answers, as in training"""


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Fields:
    """Where a row keeps what an evaluation needs, besides what its source says."""

    label: str | None = None
    """field of the class, which is the answer then"""
    references: Path | None = None
    """a text file with one reference in each line, in place of a field"""
    answered: bool = True
    """False: rows hold no answer; `response` of the source is not looked at"""


def read_file(source: SourceSpec, fields: Fields = Fields()) -> list[Question]:
    """The rows of a source's files, in order. Raises DataError where a row is none, or a reference is missing."""
    inputs = find_inputs("data", source)
    make = _maker(source, fields)
    found: list[Question] = []
    bad: list[str] = []
    for block in read_blocks(source, inputs):
        for at in parse_block(block, line_encoding(source)):
            try:
                if isinstance(at.row, Broken):
                    raise BadRow(at.row.reason)
                found.append(make(at.row))
            except BadRow as reason:
                bad.append(f"{inputs[at.input].label}:{at.line}: {reason}")
    if bad and (source.on_bad_row == "fail" or not found):
        more = f"\n  and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        shown = "\n  ".join(bad[:_SHOWN])
        raise DataError(f"{len(bad):,} rows cannot be asked; mend them or leave them out:\n  {shown}{more}")
    if not found:
        raise DataError(f"{', '.join(source.paths)}: holds no rows; there is nothing to evaluate")
    return _with_references(found, fields.references) if fields.references else found


def guess_layout(path: str, encoding: str, *, answered: bool = True) -> dict[str, str]:
    """How rows of this file become conversations, by the names in its first row: fields of SourceSpec.

    `prompt` without `response`: there is no answer, but a `label` or `tests`, or it is not `answered` here. Raises
    DataError.
    """
    row = _first_row(SourceSpec(path=path, encoding=encoding, text="text"))
    for field, layout in _LAYOUTS.items():
        if field in row:
            return {"conversation": layout}
    for prompt, response in _FIELDS:
        if prompt in row and response in row:
            return {"prompt": prompt, "response": response}
    prompt = next((name for name, _ in _FIELDS if name in row), "text" if "text" in row else None)
    if prompt is not None and ("label" in row or "tests" in row or not answered):
        return {"prompt": prompt, **({"label": "label"} if "label" in row else {})}
    raise DataError(
        f"{path}: its rows have {', '.join(map(repr, row)) or 'no fields'}, which does not tell question from answer; "
        "name them with --prompt FIELD --response FIELD"
    )


def choose_split(questions: Sequence[Question], split: str, shares: SplitSpec) -> list[Question]:
    """Those whose content falls into a split, as `ernie prepare` deals documents out."""
    digests = np.array([digest(canonical(question.turns or question.text)) for question in questions], np.uint64)
    kept = split_of(digests, shares) == SPLITS.index(split)
    return [question for question, keep in zip(questions, kept, strict=True) if keep]


def _maker(source: SourceSpec, fields: Fields) -> Any:
    if source.kind != "chat":
        raise DataError("plain text has no questions; name them with --prompt FIELD --response FIELD")
    answered = fields.answered and fields.references is None
    turns_of = document_maker(source if answered else source.model_copy(update={"response": source.prompt}))

    def make(row: Mapping[str, Any]) -> Question:
        label = row.get(fields.label) if fields.label else None
        turns = turns_of(row if label is None or fields.label is None else {**row, fields.label: str(label)})
        assert not isinstance(turns, str)
        canonical(turns)  # says which rows hold what cannot be written
        last = _last(turns)
        return Question(
            text=_transcript(turns[:last]),
            reference=turns[last].content.strip() if answered else None,
            turns=turns,
            label=turns[last].content.strip() if fields.label else None,
            tests=_optional(row, "tests"),
            entry_point=_optional(row, "entry_point"),
        )

    return make


def _last(turns: Conversation) -> int:
    """Number of the last answer that counts: the one that is asked for."""
    return max(number for number, turn in enumerate(turns) if turn.counts)


def _optional(row: Mapping[str, Any], field: str) -> str | None:
    value = row.get(field)
    return value if isinstance(value, str) and value.strip() else None


def _transcript(turns: Sequence[Turn]) -> str:
    """The question; with a system prompt or earlier turns, who said what."""
    if len(turns) == 1:
        return turns[0].content.strip()
    return "\n".join(f"{turn.role}: {turn.content.strip()}" for turn in turns)


def _with_references(questions: list[Question], path: Path) -> list[Question]:
    from ernie_dist.evaluate.metrics import same_length

    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        same_length(questions, lines)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return [
        replace(question, reference=line.strip(), turns=(*question.turns[:-1], Turn("assistant", line or " ", True)))
        for question, line in zip(questions, lines, strict=True)
        if question.turns is not None
    ]


def _first_row(source: SourceSpec) -> Mapping[str, Any]:
    inputs = find_inputs("data", source)
    for block in read_blocks(source, inputs):
        for at in parse_block(block, line_encoding(source)):
            if isinstance(at.row, Broken):
                raise DataError(f"{inputs[at.input].label}:{at.line}: {at.row.reason}")
            return at.row
    raise DataError(f"{', '.join(source.paths)}: holds no rows; there is nothing to evaluate")


# ----------------------------------------------------------------------------------------------------- prepared sources


def read_prepared(job: ResolvedJob, names: Sequence[str], split: str) -> list[Question]:
    """The conversations of a split of a run's sources, as they were prepared. Raises DataError for plain text."""
    tokenizer = load_published(Path(job.tokenizer.folder).parent, job.tokenizer.fingerprint)
    if tokenizer is None or tokenizer.frame is None:
        raise DataError(f"{job.tokenizer.folder}: the run's prepared tokenizer is gone; run `ernie prepare` again")
    found: list[Question] = []
    for name in names:
        source = PreparedSource.open(Path(job.sources[name].folder))
        if source.kind != "chat":
            raise DataError(f"source {name} is plain text; questions come from conversations")
        found += _prepared(source, split, tokenizer)
    return found


def _prepared(source: PreparedSource, split: str, tokenizer: PublishedTokenizer) -> Iterator[Question]:
    from tokenizers import Tokenizer

    assert tokenizer.frame is not None
    decode = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json")).decode
    fingerprint = source.manifest.tokenizer_fingerprint
    replaced = tuple(source.manifest.label_replacements.items())
    for start, length in zip(*(part.tolist() for part in source.documents(split)), strict=True):
        ids, mask = source.read(start, length)
        assert mask is not None
        yield Question(
            text=_stripped(decode(ids[: _answer_start(mask)].tolist(), skip_special_tokens=False), tokenizer.frame),
            reference=decode(ids[mask == LAST_ANSWER].tolist()).strip(),
            source=source.name,
            coded=Coded(tuple(ids.tolist()), tuple(mask.tolist()), fingerprint, replaced),
        )


def _answer_start(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask == LAST_ANSWER)[0])


def _stripped(prompt: str, frame: ChatFrame) -> str:
    """A rendered prompt without what the template wrote around it."""
    before, after = frame.joints["", "user"], frame.joints["user", "assistant"]
    return prompt.removeprefix(before).removesuffix(after).replace(frame.closing, "").strip()


# ------------------------------------------------------------------------------------------------------------ rendering


class Renderer:
    """Questions in the tokens of one tokenizer, exactly as training renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Raises DataError for a tokenizer without a chat template, or with one that cannot be trained on."""
        self._name = name
        with tempfile.TemporaryDirectory(prefix="ernie-tokenizer-") as folder:
            published = publish(tokenizer, Path(folder))
            if published.frame is None:
                raise DataError(
                    f"{name}: its tokenizer has no chat template, so it cannot be asked; use an instruction model, or "
                    "put a chat_template.jinja in its folder"
                )
            self.fingerprint = published.fingerprint
            self._replacements = tuple(published.label_replacements.items())
            self._encoder = Encoder(published.folder / "tokenizer.json", published.stop_id, published.frame)

    def __call__(self, question: Question) -> Rendered:
        """Raises DataError where the question was prepared with another tokenizer, or holds a control token."""
        coded = question.coded
        if coded is not None:
            if coded.tokenizer != self.fingerprint:
                raise DataError(
                    f"{self._name}: its tokenizer is not the one that the run's data was prepared with; give the rows "
                    "as a file, with --data"
                )
            return _rendered(np.array(coded.ids), np.array(coded.mask), coded.labels)
        assert question.turns is not None
        return _rendered(*self.encode(question.turns), self._replacements)

    def encode(self, turns: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, int64 [T] each."""
        try:
            self._encoder.check(turns)
        except BadRow as reason:
            raise DataError(f"question {_transcript(turns[:-1])[:60]!r}: {reason}") from None
        encoding = self._encoder.encode_conversations([turns])
        assert encoding.mask is not None
        return encoding.tokens.astype(np.int64), encoding.mask

    def said(self, question: Question, answer: str) -> Rendered:
        """The same question with another last answer."""
        assert question.turns is not None
        turns = (*question.turns[: _last(question.turns)], Turn("assistant", answer, True))
        return _rendered(*self.encode(turns), self._replacements)


def _rendered(ids: np.ndarray, mask: np.ndarray, replacements: Sequence[tuple[int, int]]) -> Rendered:
    labels = np.where(mask > 0, ids, IGNORED)
    for written, meant in replacements:
        labels[labels == written] = meant
    return Rendered(ids[: _answer_start(mask)], ids, np.append(labels[1:], IGNORED))

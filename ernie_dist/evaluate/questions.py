"""What a model is asked, and what it should say: rows of a file, or conversations of a prepared source.

file --reader, layout--> Question(turns) ---.
prepared source --shards--> Question(coded) +--a model's tokenizer--> Rendered: prompt, then tokens and labels
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ernie_dist.batch import IGNORED
from ernie_dist.data.decoding import Opened
from ernie_dist.data.documents import (
    BadRow,
    Conversation,
    LeftOut,
    Marked,
    Preference,
    Turn,
    canonical,
    row_reader,
)
from ernie_dist.data.readers import Broken, find_inputs, line_encoding, parse_block, read_blocks
from ernie_dist.data.render import LAST_ANSWER, REJECTED, ChatFrame, Encoder
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
    digest: int = 0
    """hash that decides the split of a row of a file"""
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


def drawn(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """Numbers of the rows asked, in order: all, or `limit` drawn from all, since files are often sorted by subject."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())


def read_file(source: SourceSpec, fields: Fields = Fields()) -> list[Question]:
    """What the rows of a source's files ask, in order: one question each, of triples as many as they have wordings.

    Raises DataError where a row is none, or a reference is missing.
    """
    inputs = find_inputs("data", source)
    make = _maker(source, fields)
    found: list[Question] = []
    bad: list[str] = []
    for block in read_blocks(source, inputs):
        for at in parse_block(block, line_encoding(source)):
            try:
                if isinstance(at.row, Broken):
                    raise BadRow(at.row.reason)
                found += make(at.row)
            except LeftOut:
                continue
            except BadRow as reason:
                bad.append(f"{inputs[at.input].label}:{at.line}: {reason}")
    if bad and (source.on_bad_row == "fail" or not found):
        more = f"\n  and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        shown = "\n  ".join(bad[:_SHOWN])
        raise DataError(f"{len(bad):,} rows cannot be asked; mend them or leave them out:\n  {shown}{more}")
    if not found:
        raise DataError(f"{', '.join(source.paths)}: holds no rows; there is nothing to evaluate")
    return _with_references(found, fields.references, source.encoding) if fields.references else found


def guess_layout(path: str, encoding: str, *, label: str = "label", answered: bool = True) -> dict[str, str]:
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
    if prompt is not None and (label in row or "tests" in row or not answered):
        return {"prompt": prompt, **({"label": label} if label in row else {})}
    raise DataError(
        f"{path}: its rows have {', '.join(map(repr, row)) or 'no fields'}, which does not tell question from answer; "
        "name them with --prompt FIELD --response FIELD; where a label is the answer with --prompt FIELD --label FIELD"
    )


def choose_split(questions: Sequence[Question], split: str, shares: SplitSpec) -> list[Question]:
    """Those that fall into a split, as `ernie prepare` deals documents out."""
    digests = np.array([question.digest for question in questions], np.uint64)
    kept = split_of(digests, shares) == SPLITS.index(split)
    return [question for question, keep in zip(questions, kept, strict=True) if keep]


def _maker(source: SourceSpec, fields: Fields) -> Callable[[Mapping[str, Any]], list[Question]]:
    """Of pairs of answers the preferred one is the reference."""
    if source.kind == "text":
        raise DataError("plain text has no questions; name them with --prompt FIELD --response FIELD")
    answered = fields.answered and fields.references is None
    read = row_reader(source if answered else source.model_copy(update={"response": source.prompt}))

    def make(row: Mapping[str, Any]) -> list[Question]:
        label = row.get(fields.label) if fields.label else None
        marked = read(row if label is None or fields.label is None else {**row, fields.label: str(label)})
        return [question(row, one) for one in marked]

    def question(row: Mapping[str, Any], marked: Marked) -> Question:
        document = marked.document
        assert not isinstance(document, str)
        turns = document.chosen if isinstance(document, Preference) else document
        last = _last(turns)
        return Question(
            text=_transcript(turns[:last]),
            reference=turns[last].content.strip() if answered else None,
            turns=turns,
            digest=marked.digest,
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


def _with_references(questions: list[Question], path: Path, encoding: str) -> list[Question]:
    from ernie_dist.evaluate.metrics import same_length

    with Opened(path) as file:
        # Not splitlines: a reference may hold other ends of lines.
        lines = [line.strip() for line in file.text(encoding).read().removesuffix("\n").split("\n")]
    try:
        same_length(questions, lines)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    found = []
    for number, (question, line) in enumerate(zip(questions, lines, strict=True), 1):
        assert question.turns is not None
        turns = (*question.turns[:-1], Turn("assistant", line or " ", True))
        try:
            found.append(replace(question, reference=line, turns=turns, digest=digest(canonical(turns))))
        except BadRow as reason:
            raise DataError(f"{path}:{number}: {reason}; it is read as {encoding}, see --encoding") from None
    return found


def _first_row(source: SourceSpec) -> Mapping[str, Any]:
    inputs = find_inputs("data", source)
    for block in read_blocks(source, inputs):
        for at in parse_block(block, line_encoding(source)):
            if isinstance(at.row, Broken):
                raise DataError(f"{inputs[at.input].label}:{at.line}: {at.row.reason}")
            return at.row
    raise DataError(f"{', '.join(source.paths)}: holds no rows; there is nothing to evaluate")


# ----------------------------------------------------------------------------------------------------- prepared sources


def read_prepared(
    job: ResolvedJob, names: Sequence[str], split: str, *, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """The conversations of a split of a run's sources, as they were prepared; of pairs of answers the preferred one.

    With `limit` so many, drawn with the seed; the others are not read. Raises DataError for plain text.
    """
    tokenizer = load_published(Path(job.tokenizer.folder).parent, job.tokenizer.fingerprint)
    if tokenizer is None or tokenizer.frame is None:
        raise DataError(f"{job.tokenizer.folder}: the run's prepared tokenizer is gone; run `ernie prepare` again")
    sources = [PreparedSource.open(Path(job.sources[name].folder)) for name in names]
    for source in sources:
        if source.kind == "text":
            raise DataError(f"source {source.name} is plain text; questions come from conversations")
    chosen = np.array(drawn(sum(len(source.documents(split)[0]) for source in sources), limit, seed), np.int64)
    found: list[Question] = []
    first = 0
    for source in sources:
        starts, lengths = source.documents(split)
        mine = chosen[(chosen >= first) & (chosen < first + len(starts))] - first
        found += _prepared(source, starts[mine], lengths[mine], tokenizer)
        first += len(starts)
    return found


def _prepared(
    source: PreparedSource, starts: np.ndarray, lengths: np.ndarray, tokenizer: PublishedTokenizer
) -> Iterator[Question]:
    from tokenizers import Tokenizer

    assert tokenizer.frame is not None
    decode = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json")).decode
    fingerprint = source.manifest.tokenizer_fingerprint
    replaced = tuple(source.manifest.label_replacements.items())
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        ids, mask = source.read(start, length)
        assert mask is not None
        ids, mask = ids[mask < REJECTED], mask[mask < REJECTED]
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

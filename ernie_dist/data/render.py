"""Documents -> token ids and loss mask, with the `tokenizers` library alone.

    text          [t t t t t t </s>]                       no mask
    conversation  [<bos>User: q\\nAssistant: |a a a <eot>]  mask 0 0 0 0|2 2 2 2

    preference    a conversation and its other ending, the mask of the second raised by 4

Mask value k at token i: predicting token i counts. 0 not at all, 1 as an answer, 2 as the last answer.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from ernie_dist.data.documents import BadRow, Conversation, Document, Preference, turns
from ernie_dist.spec.curriculum import Kind
from ernie_dist.spec.errors import DataError

ANSWER, LAST_ANSWER = 1, 2
REJECTED = 4
"""added to the mask of all of a rejected conversation, which follows the chosen one"""

_PART = 1 << 18
"""characters encoded at once: an encoding takes about 100 times its text in memory"""

Template = Callable[[list[dict[str, str]], bool], str]
"""messages, add_generation_prompt -> text"""


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around the contents of a conversation, as literal text.

    Rendering by it equals the template's own rendering (`derive` checks that) and needs no template engine.
    """

    joints: dict[tuple[str, str], str]
    """(role before, role after) -> text between their contents; "" stands for the start and the end"""
    closing: str
    """what ends an answer, e.g. <|end_of_sentence|>: the model learns to say it"""
    strips: bool
    """whether the template strips white space around contents"""

    @classmethod
    def derive(cls, template: Template, is_special: Callable[[str], bool]) -> ChatFrame:
        """Finds the frame of a template. Raises DataError if it renders a conversation other than turn by turn."""
        joints: dict[tuple[str, str], str] = {}
        strips = False
        for roles in _probes():
            contents = [f" 〔{number}〕 " for number in range(len(roles))]
            messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
            rendered = template(messages, False)
            strips = strips or any(text not in rendered for text in contents)
            pieces = re.split("|".join(re.escape(text.strip() if strips else text) for text in contents), rendered)
            if len(pieces) != len(roles) + 1:
                raise _refused("it leaves out or repeats part of a conversation", rendered)
            found = zip(zip(("", *roles), (*roles, ""), strict=True), pieces, strict=True)
            for joint, text in found:
                if joints.setdefault(joint, text) != text:
                    raise _refused(f"what it writes between {joint[0]} and {joint[1]} depends on other turns", rendered)
            prompt = template(messages[:-1], True)
            answer = contents[-1].strip() if strips else contents[-1]
            if not rendered.startswith(prompt + answer):
                raise _refused("a prompt for generation is not the beginning of the answered conversation", rendered)
        ending = joints["assistant", ""]
        closing = re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", ending)
        if closing is None or not is_special(closing[1]) or not joints["assistant", "user"].startswith(closing[0]):
            raise _refused(f"an answer must end in a special token, and it ends in {ending!r}", rendered)
        return cls(joints, closing[0], strips)

    def segments(self, conversation: Conversation) -> list[tuple[str, int]]:
        """(text, mask value), prompts and answers in turn. Joined, they are what the template renders.

        Tokenised one by one, a prompt has exactly the tokens that generation starts from.
        """
        last = max(number for number, turn in enumerate(conversation) if turn.counts)
        segments: list[tuple[str, int]] = []
        pending, before = "", ""
        for number, (role, content, counts) in enumerate(conversation):
            pending += self.joints[before, role]
            if before == "assistant":
                pending = pending[len(self.closing) :]
            if self.strips:
                content = content.strip()
            if role == "assistant":
                value = 0 if not counts else LAST_ANSWER if number == last else ANSWER
                segments += [(pending, 0), (content + self.closing, value)]
                pending = ""
            else:
                pending += content
            before = role
        rest = self.joints["assistant", ""][len(self.closing) :]
        return [*segments, (rest, 0)] if rest else segments

    def to_json(self) -> dict[str, Any]:
        joints = [[before, after, text] for (before, after), text in self.joints.items()]
        return {"joints": joints, "closing": self.closing, "strips": self.strips}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ChatFrame:
        return cls({(before, after): text for before, after, text in raw["joints"]}, raw["closing"], raw["strips"])


def _probes() -> Iterable[tuple[str, ...]]:
    for rounds in (1, 2, 3):
        yield ("user", "assistant") * rounds
        yield ("system", *("user", "assistant") * rounds)


def _refused(reason: str, rendered: str) -> DataError:
    return DataError(
        f"the tokenizer's chat template cannot be trained on: {reason}; it rendered {rendered!r}. "
        "Give the tokenizer a template that writes turn after turn and ends answers in a special token"
    )


@dataclass(frozen=True)
class Encoding:
    """Encoded documents, one after the other."""

    tokens: np.ndarray
    """uint32 [tokens]"""
    mask: np.ndarray | None
    """uint8 [tokens], of conversations only"""
    lengths: np.ndarray
    """uint32 [documents]: tokens of each"""


class Encoder:
    """Encodes documents of one prepared tokenizer. One per process."""

    def __init__(self, tokenizer_json: Path, stop_id: int, frame: ChatFrame | None) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._stop_id, self._frame = stop_id, frame
        added = self._tokenizer.get_added_tokens_decoder().values()
        control = [token for token in added if is_control(token.content, token.special)]
        self._tokenizer.add_special_tokens([_as_special(token) for token in control if not token.special])
        self._control = control_tokens(added)

    def check(self, document: Document) -> None:
        """Raises BadRow if a turn holds a control token written out: the template would take it for its own."""
        if self._control is None or isinstance(document, str):
            return
        for number, turn in enumerate(turns(document), 1):
            if found := self._control.search(turn.content):
                raise BadRow(f"turn {number} ({turn.role}) holds the control token {found[0]} as text; remove it there")

    def encode(self, kind: Kind, documents: Sequence[Any]) -> Encoding:
        """Documents of one kind."""
        encoders: dict[Kind, Callable[[Any], Encoding]] = {
            "text": self.encode_text,
            "chat": self.encode_conversations,
            "preference": self.encode_preferences,
        }
        return encoders[kind](documents)

    def encode_text(self, documents: Sequence[str]) -> Encoding:
        """Plain text, each document followed by the stop token. Control tokens written out stay text."""
        self._tokenizer.encode_special_tokens = True
        ids = array("I")
        lengths = np.empty(len(documents), np.uint32)
        for number, parts in enumerate(self._encode_batch(documents)):
            before = len(ids)
            for part in parts:
                ids.extend(array("I", part.ids))  # of a list, extend would take one id at a time
            ids.append(self._stop_id)
            lengths[number] = len(ids) - before
        return Encoding(np.array(ids, np.uint32), None, lengths)

    def _encode_batch(self, documents: Sequence[str]) -> Iterator[list[Any]]:
        """The encodings of each document: one, or several of a long one."""
        if max(map(len, documents), default=0) <= _PART:
            for encoding in self._tokenizer.encode_batch_fast(documents, add_special_tokens=False):
                yield [encoding]
            return
        for document in documents:
            yield [self._tokenizer.encode(part, add_special_tokens=False) for part in _parts(document)]

    def encode_conversations(self, conversations: Sequence[Conversation]) -> Encoding:
        """Conversations, as the chat template writes them."""
        assert self._frame is not None, "opening the tokenizer made sure of a chat template"
        self._tokenizer.encode_special_tokens = False
        texts: list[str] = []
        values: list[int] = []
        counts = np.empty(len(conversations), np.int64)
        for number, conversation in enumerate(conversations):
            segments = self._frame.segments(conversation)
            counts[number] = len(segments)
            for text, value in segments:
                texts.append(text)
                values.append(value)
        ids = array("I")
        sizes = np.empty(len(texts), np.int64)
        for number, encoding in enumerate(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            ids.extend(array("I", encoding.ids))
            sizes[number] = len(encoding)
        mask = np.repeat(np.array(values, np.uint8), sizes)
        ends = np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], np.cumsum(counts)])]
        return Encoding(np.array(ids, np.uint32), mask, np.diff(ends).astype(np.uint32))

    def encode_preferences(self, preferences: Sequence[Preference]) -> Encoding:
        """Both conversations of each pair, one after the other, as one document: they are never packed apart."""
        both = self.encode_conversations([conversation for pair in preferences for conversation in pair])
        assert both.mask is not None
        rejected = np.repeat(np.arange(len(both.lengths)) % 2 == 1, both.lengths)
        mask = both.mask + rejected.astype(np.uint8) * np.uint8(REJECTED)
        return Encoding(both.tokens, mask, both.lengths.reshape(-1, 2).sum(axis=1, dtype=np.uint32))


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers the model, rather than being one more word of the vocabulary."""
    return special or re.fullmatch(r"<\|[^\s<>]+\|>", content) is not None


def control_tokens(added: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds the control tokens of a tokenizer in a text. None if it has none."""
    names = {token.content for token in added if is_control(token.content, token.special)}
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def _as_special(token: AddedToken) -> AddedToken:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token.content, special=True, **flags)


def _parts(text: str) -> Iterable[str]:
    """Cuts a long text at ends of lines, where tokens end as well."""
    at = 0
    while len(text) - at > _PART:
        cut = text.rfind("\n", at, at + _PART) + 1 or at + _PART
        yield text[at:cut]
        at = cut
    yield text[at:]

"""The turns of a chat: what of them still fits the context, and the rows of training data they make.

Conversation --fitting--> messages for the model --hear--> its next turn
messages --training_row--> {"messages": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_dist.data.documents import BadRow, document_maker
from ernie_dist.inference import ChatModel, Message, PromptTooLong, Stream, next_piece
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

_READ = document_maker(SourceSpec(path="chat.jsonl", conversation="messages"))


@dataclass
class Conversation:
    """Questions and answers in turn, after a system prompt or none."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    """user, assistant, user, ...; a user last while an answer is awaited"""
    shown: dict[int, list[Message]] = field(default_factory=dict)
    """number of an answer's turn -> what the model saw of this when it gave the answer"""
    whole: set[int] = field(default_factory=set)
    """answers that the model ended itself; others were stopped, or cut off at their greatest length"""

    @property
    def messages(self) -> list[Message]:
        return [*self._first, *self.turns]

    @property
    def _first(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def until(self, turn: int) -> list[Message]:
        """What the model was shown, and its answer: turn number `turn`. Empty if that is no answer."""
        return [*self.shown[turn], self.turns[turn]] if turn in self.shown else []

    def ask(self, question: str) -> None:
        self.settle()
        self.turns.append({"role": "user", "content": question})

    def hear(self, messages: list[Message], answer: Stream) -> Iterator[str]:
        """The pieces of the answer to `messages`, each added to what was said."""
        with closing(answer):
            while isinstance(piece := next_piece(answer), str):
                if piece and self.unanswered:
                    self.shown[len(self.turns)] = messages
                    self.turns.append({"role": "assistant", "content": ""})
                if piece:
                    self.turns[-1]["content"] += piece
                yield piece
        if piece.stopped and not self.unanswered:
            self.whole.add(len(self.turns) - 1)

    @property
    def unanswered(self) -> bool:
        return bool(self.turns) and self.turns[-1]["role"] == "user"

    def settle(self) -> None:
        """Takes back a question without an answer: it could be neither continued nor trained on."""
        if self.unanswered:
            self.turns.pop()

    def fitting(self, model: ChatModel, room: int) -> tuple[list[Message], int]:
        """The messages, but for the oldest exchanges if they leave no `room` tokens for the answer; how many those are.

        `room` counts up to half the context. Takes the last question back and raises DataError if it cannot be asked,
        or does not fit alone.
        """
        room = min(room, model.context // 2)
        for first in range(0, len(self.turns), 2):
            messages = [*self._first, *self.turns[first:]]
            alone = first == len(self.turns) - 1
            try:
                model.prompt(messages, 1 if alone else room)
            except DataError as error:
                if isinstance(error, PromptTooLong) and not alone:
                    continue
                self.settle()
                raise
            return messages, first // 2
        raise AssertionError("a question comes first")


def training_row(messages: Sequence[Message], *, last_only: bool = False) -> dict[str, Any]:
    """A row of a source with `conversation: messages`; with `last_only` the answers before the last one do not count.

    Raises DataError if it could not be trained on.
    """
    row: dict[str, Any] = {"messages": [dict(message) for message in messages]}
    for message in row["messages"][:-1] if last_only else ():
        if message["role"] == "assistant":
            message["weight"] = 0
    try:
        _READ(row)
    except BadRow as error:
        raise DataError(f"this conversation would be no row to train on: {error}") from None
    return row


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a JSONL file, which is made if it is not there. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; give another file") from None

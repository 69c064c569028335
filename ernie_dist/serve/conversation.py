"""The turns of a chat: what of them still fits the context, and the rows of training data they make.

Conversation --fitting--> messages for the model     Conversation --training_row--> {"messages": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_dist.data.documents import BadRow, document_maker
from ernie_dist.inference import ChatModel, Message, PromptTooLong
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

_READ = document_maker(SourceSpec(path="chat.jsonl", conversation="messages"))


@dataclass
class Conversation:
    """Questions and answers in turn, after a system prompt or none."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    """user, assistant, user, ...; a user last while an answer is awaited"""

    @property
    def messages(self) -> list[Message]:
        return [*self._first, *self.turns]

    @property
    def _first(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def until(self, turn: int) -> list[Message]:
        """The messages up to turn number `turn`, which is the last of them."""
        return [*self._first, *self.turns[: turn + 1]]

    def ask(self, question: str) -> None:
        self.settle()
        self.turns.append({"role": "user", "content": question})

    def hear(self, piece: str) -> None:
        """Adds to the answer of the last question."""
        if self.turns[-1]["role"] == "user":
            self.turns.append({"role": "assistant", "content": ""})
        self.turns[-1]["content"] += piece

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

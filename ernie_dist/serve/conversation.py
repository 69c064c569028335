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
        return [*self._system_turn, *self.turns]

    @property
    def _system_turn(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """Ends a turn. An empty answer takes its question with it: it could be neither continued nor trained on."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def make_room(self, model: ChatModel, room: int) -> int:
        """Drops the oldest exchanges until the last question fits with `room` tokens for its answer; returns how many.

        `room` counts up to half the context. Raises DataError, and drops nothing, if the last question cannot be asked
        or does not fit alone.
        """
        room = min(room, model.context // 2)
        for first in range(0, len(self.turns), 2):
            alone = first == len(self.turns) - 1
            try:
                model.prompt([*self._system_turn, *self.turns[first:]], 1 if alone else room)
            except PromptTooLong:
                if alone:
                    raise
            else:
                del self.turns[:first]
                return first // 2
        raise AssertionError("a user must be last")


def training_row(messages: Sequence[Message], *, last_only: bool = False) -> dict[str, Any]:
    """A row of a source with `conversation: messages`; with `last_only` the answers before the last one do not count.

    Raises DataError if it could not be trained on.
    """
    row: dict[str, Any] = {"messages": [dict(message) for message in messages]}
    if last_only:
        for message in row["messages"][:-1]:
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

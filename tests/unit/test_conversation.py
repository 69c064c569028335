"""A chat, whatever model answers: which rows thumbs make of it, and what reaches the terminal."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ernie_dist.inference import Answer, Message, Sampling, Stream
from ernie_dist.serve.console import chat
from ernie_dist.serve.conversation import Conversation
from ernie_dist.serve.feedback import record
from ernie_dist.spec.errors import DataError


def says(*pieces: str, stopped: bool = True) -> Stream:
    yield from pieces
    return Answer("".join(pieces), len(pieces), stopped)


class Parrot:
    """Answers what it was told to."""

    name, context = "parrot", 100

    def __init__(self, *answers: str) -> None:
        self._answers = iter(answers)

    def prompt(self, messages: list[Message], max_new_tokens: int = 1) -> list[int]:
        return [1]

    def stream(self, messages: list[Message], sampling: Sampling) -> Stream:
        return says(next(self._answers))


def test_a_row_is_what_the_model_saw_and_an_answer_that_was_cut_off_teaches_nothing(
    tmp_path: Path, read_back: Any
) -> None:
    side, file = Conversation("old"), tmp_path / "feedback.jsonl"

    def ask(question: str, answer: Iterator[str], left_out: int = 0) -> None:
        side.ask(question)
        system, *turns = side.messages
        assert "".join(side.hear([system, *turns[left_out:]], answer)) == side.turns[-1]["content"]

    ask("a", says("", "b", "", "b"))
    side.system = "new"
    ask("c", says("d"))
    ask("e", says("f"), left_out=4)
    ask("g", says("h", stopped=False))
    side.ask("i")
    stopped = side.hear(side.messages, says("j", "k"))
    next(stopped)
    stopped.close()
    for turn in (1, 3, 5):
        record(file, [side], 0, turn, liked=True)
    old, new = ("system", "old", False), ("system", "new", False)
    first = ("user", "a", False), ("assistant", "bb", False)
    assert read_back(file) == [
        [old, first[0], ("assistant", "bb", True)],
        [new, *first, ("user", "c", False), ("assistant", "d", True)],
        [new, ("user", "e", False), ("assistant", "f", True)],
    ]
    for turn in (7, 9):
        with pytest.raises(DataError, match="not kept: this answer did not come to its end"):
            record(file, [side], 0, turn, liked=True)
        assert record(file, [side], 0, turn, liked=False) == [tmp_path / "feedback.down.jsonl"]


def test_what_a_model_says_neither_steers_a_terminal_nor_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\nagain\n"), encoding="gbk"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="gbk"))
    chat(Parrot("\x1b[2J好\t🙂\r\n好", "\x9b2J再见"), Sampling())  # type: ignore[arg-type]
    assert shown.getvalue().decode("gbk") == "[2J好\t?\n好\n2J再见\n"

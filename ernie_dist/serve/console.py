"""A chat in the terminal: lines are edited by GNU readline, answers stream, `/` begins a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.serve.conversation import Conversation, append_row, training_row
from ernie_dist.spec.errors import DataError, ErnieError, SpecError

_UNPRINTED = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
"""control characters: in a terminal they move the cursor, or more"""

_HELP = """\
  /reset            begin anew
  /system TEXT      give a system prompt and begin anew; without TEXT, take it away
  /temperature X    0: the likeliest token, always; higher: more chance
  /save FILE        add this conversation to a JSONL file: a source with `conversation: messages`
  /help             this list
  exit              leave; so do an empty line and Ctrl-D. Ctrl-C stops an answer"""


def chat(model: ChatModel, sampling: Sampling, system: str = "") -> None:
    """Reads questions from standard input until there are no more. With a pipe there, prints answers alone."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal of another encoding
    Console(model, sampling, system, read=_reader(), shows=sys.stdin.isatty()).run()


class Console:
    """One chat, from its first line to its last."""

    def __init__(
        self, model: ChatModel, sampling: Sampling, system: str, *, read: Callable[[], str], shows: bool
    ) -> None:
        self._model, self._sampling, self._read, self._shows = model, sampling, read, shows
        self._conversation = Conversation(system)
        self._answers = 0
        """given so far: by chance each comes out differently"""
        self._commands: dict[str, Callable[[str], str]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/temperature": self._temperature,
            "/save": self._save,
            "/help": lambda _: _HELP,
        }

    def run(self) -> None:
        self._say(f"{self._model.name}. /help lists the commands; exit, an empty line or Ctrl-D leaves.")
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:  # the line is given up, as in a shell
                self._say("")
                continue
            if line in ("", "exit"):
                return
            try:
                if line.startswith("/"):
                    self._say(self._obey(line))
                else:
                    self._ask(line)
            except ErnieError as error:
                self._say(str(error))

    def _ask(self, question: str) -> None:
        try:
            question.encode()
        except UnicodeEncodeError:
            raise DataError("that line is not UTF-8; set the terminal to UTF-8") from None
        conversation = self._conversation
        conversation.ask(question)
        messages, left_out = conversation.fitting(self._model, self._sampling.max_new_tokens)
        if left_out:
            self._say(f"the context is full: the oldest {left_out} questions and their answers are left out")
        said, why = "", "the model ended it at once"
        self._answers += 1
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)
        try:
            for piece in conversation.hear(messages, self._model.stream(messages, sampling)):
                said += piece
                print(piece.translate(_UNPRINTED), end="", flush=True)
        except KeyboardInterrupt:
            why = "it was stopped"
            print(" ...", end="")
        print("" if said else f"(no answer: {why})", flush=True)
        conversation.settle()

    def _obey(self, line: str) -> str:
        name, _, given = line.partition(" ")
        if name not in self._commands:
            raise SpecError(f"{name}: no such command; there are {', '.join(self._commands)}")
        return self._commands[name](given.strip())

    def _reset(self, _: str) -> str:
        self._conversation = Conversation(self._conversation.system)
        return "a new conversation"

    def _system(self, text: str) -> str:
        self._conversation = Conversation(text)
        return "a new conversation, with this system prompt" if text else "a new conversation, without a system prompt"

    def _temperature(self, text: str) -> str:
        try:
            self._sampling = replace(self._sampling, temperature=float(text))
        except ValueError as error:  # SpecError is one
            raise SpecError(f"/temperature {text}: give a number between 0 and 10") from error
        return f"temperature {self._sampling.temperature:g}"

    def _save(self, text: str) -> str:
        if not text:
            raise SpecError("/save: name a file, as in /save chats.jsonl")
        path = Path(text).expanduser()
        append_row(path, training_row(self._conversation.messages))
        cut = len(self._conversation.shown) - len(self._conversation.whole)
        return f"added to {path}" + (f"; answers that were cut off, and are saved as they are: {cut}" if cut else "")

    def _say(self, text: str) -> None:
        if self._shows:
            print(text, flush=True)
        elif text:
            print(text, file=sys.stderr, flush=True)


def _reader() -> Callable[[], str]:
    """What reads the next line; raises EOFError at the end."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if not sys.stdin.isatty():
        return input
    given = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "C")
    if given in ("C", "POSIX"):  # Python takes UTF-8 for it, and readline does not
        os.environ["LC_ALL"] = "C.UTF-8"  # else a backspace takes a third of a Chinese character
    with suppress(ImportError):  # a Python built without it edits lines as the terminal does
        import readline  # noqa: F401
    return lambda: input("> ")

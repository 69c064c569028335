"""`ernie chat` in a real terminal: Chinese typed and mended, answers streamed, commands obeyed; and in a pipe."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

CHAT = (sys.executable, "-m", "launcher", "chat")
BACKSPACE, CTRL_C, CTRL_D = "\x7f", "\x03", "\x04"
ENDLESS = ("--temperature=0", "--max-new-tokens=200")


@pytest.fixture
def talk(request: Any) -> Callable[..., pexpect.spawn]:
    """Starts a chat and waits for its first prompt."""

    def start(model: Path, *options: str, locale: str = "C.UTF-8") -> pexpect.spawn:
        environment = {**os.environ, "TERM": "dumb", "LC_ALL": locale}
        chat = pexpect.spawn(CHAT[0], [*CHAT[1:], str(model), *options], env=environment, encoding="utf-8", timeout=120)
        request.addfinalizer(lambda: chat.close(force=True))
        chat.expect_exact("/help lists the commands")
        chat.expect_exact("\n> ")
        return chat

    return start


def say(chat: pexpect.spawn, line: str) -> str:
    """What is printed between a line and the next prompt."""
    chat.send(line + "\r")
    chat.expect_exact("\n")  # the line itself, as the terminal shows it
    chat.expect_exact("\n> ")
    return chat.before


def leave(chat: pexpect.spawn, how: str) -> None:
    chat.send(how)
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_chinese_is_typed_mended_answered_and_saved(
    taught: Any, talk: Any, read_back: Any, tmp_path: Path, locale: str
) -> None:
    question, answer = "金苓产于哪里？", taught.answers["金苓产于哪里？"]
    chat = talk(taught.tuned, locale=locale)
    say(chat, "白芝")
    assert "a new conversation" in say(chat, "/reset")
    # A character is three bytes and two columns, and a backspace takes one of them.
    assert say(chat, f"金苓产山河{BACKSPACE * 2}于哪里？！{BACKSPACE}").strip() == answer
    saved = tmp_path / "聊天.jsonl"
    assert f"added to {saved}" in say(chat, f"/save {saved}")
    assert "/temperature X" in say(chat, "/help")
    assert "/nothing: no such command; there are /reset, /system" in say(chat, "/nothing")
    leave(chat, "exit\r")
    assert read_back(saved) == [[("user", question, False), ("assistant", answer, True)]]


def test_an_answer_is_stopped_and_the_chat_goes_on_until_the_context_is_full(
    taught: Any, talk: Any, read_back: Any, tmp_path: Path
) -> None:
    chat = talk(taught.base, *ENDLESS, "--system", "你好")
    chat.send("讲个故事\r")
    chat.expect_exact("\n")
    chat.expect(r"[^\n]{5}")  # it has begun, and has not ended
    chat.send(CTRL_C)
    chat.expect_exact(" ...")
    chat.expect_exact("\n> ")
    assert "temperature 0" in say(chat, "/temperature 0")
    assert "give a number between 0 and 10" in say(chat, "/temperature hot")
    chat.send("half a line" + CTRL_C)
    chat.expect_exact("\n> ")
    said = "".join(say(chat, "青芷") for _ in range(3))
    assert "the context is full: the oldest" in said
    too_long = say(chat, "长" * 100)
    assert "tokens" in too_long and "shorten the conversation" in too_long
    assert "holds the control token </s> as text" in say(chat, "a</s>")
    saved = tmp_path / "chat.jsonl"
    say(chat, f"/save {saved}")
    turns = read_back(saved)[0]
    assert turns[0][:2] == ("system", "你好") and turns[-2][1] == "青芷"
    assert "a new conversation, without a system prompt" in say(chat, "/system")
    leave(chat, CTRL_D)


def test_a_pipe_gets_answers_alone(taught: Any) -> None:
    typed = "白芝产于哪里？\n".encode() + "白芝\n".encode("gb18030") + "/reset\n讲个故事\n\n从不".encode()
    done = subprocess.run([*CHAT, str(taught.tuned)], input=typed, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{taught.answers['白芝产于哪里？']}\n{taught.answers['讲个故事']}\n"
    assert "that line is not UTF-8; set the terminal to UTF-8" in done.stderr.decode()

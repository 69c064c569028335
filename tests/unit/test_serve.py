"""The API as its clients see it, over a real socket: whole and streamed, refusals, the password, the address."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from ernie_dist.inference import Message, Sampling, Stream

pytest.importorskip("fastapi")

SERVE = (sys.executable, "-m", "launcher", "serve")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(taught: Any) -> Iterator[httpx.Client]:
    """`ernie serve --api-only` with a password, as a client that knows it sees it."""
    command = [*SERVE, str(taught.tuned), "--against", str(taught.base), "--api-only", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "ERNIE_AUTH": "li:开门 sesame"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            address = server.stdout.readline().split()[0].removesuffix("/v1")
            key = {"Authorization": "Bearer 开门 sesame".encode()}
            with httpx.Client(base_url=address, headers=key, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.terminate()


def ask(client: httpx.Client, content: Any, **more: Any) -> httpx.Response:
    return client.post(CHAT, json={"messages": [{"role": "user", "content": content}], **more})


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line:
            assert line.startswith("data: ")
            if line == "data: [DONE]":
                return
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has no end")


def test_a_question_is_answered_whole_and_in_pieces(served: httpx.Client, taught: Any) -> None:
    for question, answer in taught.answers.items():
        found = ask(served, question).json()
        assert found["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": answer},
            "finish_reason": "stop",
        }
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": question}]}], "stream": True}
    with served.stream("POST", CHAT, json=body | {"stream_options": {"include_usage": True}}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response.iter_lines())
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer
    assert len(chunks) > 10 and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"] == found["usage"]

    ids = [model["id"] for model in served.get("/v1/models").json()["data"]]
    assert ids == [str(taught.base), str(taught.tuned)]
    other = ask(served, question, model=ids[0], max_tokens=5, top_k=3, repetition_penalty=1.1).json()
    assert other["model"] == ids[0] and other["choices"][0]["message"]["content"] != answer
    assert other["choices"][0]["finish_reason"] == "length" and other["usage"]["completion_tokens"] == 5
    chance = [ask(served, "你好", temperature=2, seed=seed, max_tokens=20).json()["choices"] for seed in (5, 5, 6)]
    assert chance[0] == chance[1] != chance[2]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected user and assistant in turn"),
        ({"messages": []}, 400, "the turns are by nobody"),
        ({"messages": [{"role": "user", "content": "a</s>b"}]}, 400, "control token </s>"),
        ({"messages": [{"role": "user", "content": "长" * 300}], "stream": True}, 400, "256 positions"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "type image_url: this model reads text",
        ),
        ({"messages": "x"}, 400, "messages: Input should be a valid list"),
        ({"max_tokens": 0}, 400, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": -1}, 400, "temperature is -1.0, expected between 0 and 10"),
        ({"tools": [{}], "n": 2}, 400, "n, tools: not supported here"),
        ({"model": "gpt-4"}, 404, "model gpt-4 is not served here; there are "),
    ],
)
def test_what_cannot_be_answered_is_refused_as_openai_does(
    served: httpx.Client, changes: dict[str, Any], status: int, said: str
) -> None:
    body = {"messages": [{"role": "user", "content": "你好"}], "user": "me", "n": 1} | changes
    response = served.post(CHAT, json=body)
    assert response.status_code == status and said in response.json()["error"]["message"]


def test_a_client_that_goes_away_ends_its_answer(served: httpx.Client) -> None:
    started = time.monotonic()
    for _ in range(5):
        body = {"messages": [{"role": "user", "content": "讲个故事"}], "stream": True, "temperature": 9, "top_k": 300}
        with served.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())
    assert ask(served, "白芝产于哪里？").json()["choices"][0]["message"]["content"] == "白芝产于雁门。"
    assert time.monotonic() - started < 30


class Endless:
    """A model whose answer has no end, and nothing to show."""

    name = "endless"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.left = threading.Event()

    def prompt(self, messages: list[Message]) -> list[int]:
        return [1]

    def stream(self, messages: list[Message], sampling: Sampling) -> Stream:
        self.asked = [messages, sampling]
        return self._stream()

    def _stream(self) -> Stream:
        try:
            while True:
                time.sleep(0.01)
                yield ""
        finally:
            self.left.set()


@pytest.mark.parametrize("goes", ["client", "server"])
def test_a_whole_answer_ends_with_its_client_and_with_the_server(goes: str) -> None:
    from fastapi import FastAPI

    from ernie_dist.serve.api import add_api

    app, model = FastAPI(), Endless()
    add_api(app, [model], Sampling(temperature=0.5, max_new_tokens=7), "be brief")  # type: ignore[list-item]
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "top_k": 3}).encode()
    requests = iter([{"type": "http.request", "body": body}])
    gone = time.monotonic() + (0.5 if goes == "client" else 1e9)

    async def receive() -> dict[str, Any]:
        for request in requests:
            return request
        while time.monotonic() < gone:
            await anyio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    async def serve() -> None:
        head = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "scheme": "http"}
        with anyio.move_on_after(60 if goes == "client" else 0.5) as waiting:
            await app({**head, "headers": [(b"content-type", b"application/json")]}, receive, send)
        assert waiting.cancelled_caught == (goes == "server")

    anyio.run(serve)
    assert model.left.is_set()
    messages, sampling = model.asked
    assert messages[0] == {"role": "system", "content": "be brief"}
    assert (sampling.temperature, sampling.max_new_tokens, sampling.top_k) == (0.5, 7, 3)


@pytest.mark.parametrize(
    ("address", "origin", "status"),
    [
        ("127.0.0.1:7860", None, 200),
        ("localhost", "http://localhost", 200),
        ("[::1]:7860", "http://[::1]:7860", 200),
        ("rebound.example:7860", "http://rebound.example:7860", 403),
        ("127.0.0.1:7860", "https://elsewhere.example", 403),
        ("127.0.0.1:7860", "null", 403),
    ],
)
def test_without_a_password_only_this_machine_is_answered(address: str, origin: str | None, status: int) -> None:
    from ernie_dist.serve.access import Gate

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def get() -> int:
        transport = httpx.ASGITransport(Gate(inside, None))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{address}") as client:
            return (await client.get("/", headers={"Origin": origin} if origin else {})).status_code

    assert anyio.run(get) == status


def test_nobody_comes_in_without_the_password(served: httpx.Client) -> None:
    for given in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic bGk6"}):
        for path in ("/v1/models", "/", "/nothing"):
            response = httpx.get(f"{served.base_url}{path}", headers=given, trust_env=False)
            assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(f"{served.base_url}/v1/models", auth=("li", "开门 sesame"), trust_env=False).status_code == 200
    elsewhere = served.get("/v1/models", headers={"Origin": "http://elsewhere.example"})
    assert elsewhere.status_code == 403 and "may not ask" in elsewhere.json()["error"]["message"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_a_password(host: str, capfd: Any, monkeypatch: Any, tmp_path: Path) -> None:
    from launcher.cli import main

    monkeypatch.delenv("ERNIE_AUTH", raising=False)
    assert main(["serve", "no-model", "--host", host]) == 2
    said = capfd.readouterr().err
    assert f"--host {host}: others can reach it, and there is no password; put USER:PASSWORD into a file" in said
    (tmp_path / "auth").write_text("only-a-word\n")
    assert main(["serve", "no-model", "--host", host, "--auth", str(tmp_path / "auth")]) == 2
    assert "auth: does not hold one line USER:PASSWORD" in capfd.readouterr().err
    (tmp_path / "auth").write_text("li:secret\n")
    with_password = ["serve", "./no-model", "--host", host, "--auth", str(tmp_path / "auth"), "--port", "0"]
    assert main(with_password) == 2
    said = capfd.readouterr().err
    assert "no such model folder" in said or "cannot listen there" in said  # 192.168.1.5 is not this machine


def test_a_port_that_cannot_be_had_is_refused_before_a_model_is_loaded(capfd: Any) -> None:
    from launcher.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in ("99999", str(taken.getsockname()[1])):
            assert main(["serve", "./no-model", "--port", port, "--api-only"]) == 2
            assert f"--port {port}: cannot listen there: " in capfd.readouterr().err

"""OpenAI's /v1/chat/completions and /v1/models, as far as a chat needs them.

transformers has a server too (`transformers serve`), which needs the package openai. It asks for no password, takes a
control token that a user typed for the template's own and roles in any order, lets a request load another model, knows
no adapters, and keeps weights of its own, so that the page could not share its model. For many users at once there is
vLLM: see docs/chat-and-serve.md.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ernie_dist.inference import Answer, ChatModel, Message, Sampling, Stream, next_piece
from ernie_dist.spec.errors import DataError, ErnieError


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    role: str
    content: str | list[_Part]

    def plain(self) -> Message:
        if isinstance(self.content, str):
            text = self.content
        else:
            strange = [part.type for part in self.content if part.type != "text"]
            if strange:
                raise DataError(f"content of type {strange[0]}: this model reads text")
            text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """OpenAI's names, and vLLM's for what OpenAI lacks. Fields that say who asks are let pass."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[_Message]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 32)

    def sampling(self, defaults: Sampling) -> Sampling:
        """Raises SpecError for values out of range, DataError for fields that would change the answer."""
        said = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
        extra = {name: value for name, value in (self.model_extra or {}).items() if name not in said}
        unknown = [name for name, value in extra.items() if value and not (name == "n" and value == 1)]
        if unknown:
            raise DataError(f"{', '.join(sorted(unknown))}: not supported here; leave it out")
        length = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given = {
            **{name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
            "max_new_tokens": length,
            "seed": secrets.randbelow(1 << 32) if self.seed is None else self.seed,
        }
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def add_api(app: FastAPI, models: Sequence[ChatModel], defaults: Sampling, system: str) -> None:
    """Adds the routes. A request that names no model is answered by the last one.

    `defaults` (but for the seed) and the `system` prompt, if there is one, hold where a request says nothing.
    """
    known = {model.name: model for model in models}
    since = int(time.time())

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "created": since, "owned_by": "ernie_dist"} for name in known]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions")
    async def complete(asked: _Request, request: Request) -> Response:
        model = known.get(asked.model or models[-1].name)
        if model is None:
            return _error(404, f"model {asked.model} is not served here; there are {', '.join(known)}")
        messages, sampling = [message.plain() for message in asked.messages], asked.sampling(defaults)
        if system and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": system})
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
        prompt = await run_in_threadpool(model.prompt, messages)
        generation = await run_in_threadpool(model.stream, messages, sampling)
        if asked.stream:
            options = asked.stream_options or _StreamOptions()
            usage = len(prompt) if options.include_usage else None
            return StreamingResponse(_events(generation, head, usage), media_type="text/event-stream")
        answer = await _whole(generation, request)
        if answer is None:
            return _error(499, "the client went away")
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(len(prompt), answer)}
        )

    @app.exception_handler(ErnieError)
    async def refused(_: Request, error: ErnieError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


async def _whole(generation: Stream, request: Request) -> Answer | None:
    """None if the client went away, which ends the generation as the server's own end does."""
    try:
        while isinstance(piece := await run_in_threadpool(next_piece, generation), str):
            if await request.is_disconnected():
                return None
        return piece
    finally:
        await _end(generation)


async def _events(generation: Stream, head: dict[str, Any], prompt_tokens: int | None) -> AsyncIterator[str]:
    """Server-sent events. A client that goes away ends the generation."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return _event({**head, "object": "chat.completion.chunk", "choices": choices})

    try:
        yield event({"role": "assistant", "content": ""})
        while isinstance(piece := await run_in_threadpool(next_piece, generation), str):
            if piece:
                yield event({"content": piece})
        yield event({}, _reason(piece))
        if prompt_tokens is not None:
            usage = _usage(prompt_tokens, piece)
            yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except ErnieError as error:  # the status has been sent
        yield _event(_problem(str(error)))
    finally:
        await _end(generation)


async def _end(generation: Stream) -> None:
    with anyio.CancelScope(shield=True):
        await run_in_threadpool(generation.close)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _reason(answer: Answer) -> str:
    return "stop" if answer.stopped else "length"


def _usage(prompt: int, answer: Answer) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer.tokens, "total_tokens": prompt + answer.tokens}


def _error(status: int, message: str) -> Response:
    return JSONResponse(_problem(message), status)


def _problem(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

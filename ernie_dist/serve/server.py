"""The web server: the page and the API of the same models, behind one gate."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.serve.access import Gate
from ernie_dist.spec.errors import EnvironmentProblem, SpecError

try:
    import uvicorn
    from fastapi import FastAPI
except ImportError as missing:
    raise EnvironmentProblem(f"{missing.name} is not installed; pip install 'ernie_dist[serve]'") from None

from ernie_dist.serve.api import add_api


@dataclass(frozen=True)
class Defaults:
    """What the page begins with, and the API takes where a request says nothing."""

    sampling: Sampling
    system: str = ""
    """the system prompt; empty: none"""


def listen(host: str, port: int) -> socket.socket:
    """Port 0 is any that is free. Raises SpecError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"--host {host} --port {port}: cannot listen there: {reason}; give another") from None


def serve(
    models: Sequence[ChatModel],
    defaults: Defaults,
    listening: socket.socket,
    *,
    feedback: Path | None,
    auth: tuple[str, str] | None,
) -> None:
    """Serves until it is interrupted. Several models answer side by side, the last being the one that matters.

    `feedback` is the JSONL where the page puts answers with a thumb up; without it there is no page, only the API.
    """
    app = FastAPI(title="ernie", docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, models, defaults.sampling, defaults.system)
    if feedback is not None:
        from ernie_dist.serve.page import add_page

        add_page(app, models, defaults.sampling, defaults.system, feedback)
    app.add_middleware(Gate, auth=auth)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{address}{'' if feedback else '/v1'}  (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])

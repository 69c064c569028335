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
class Page:
    """What the page begins with."""

    sampling: Sampling
    system: str
    feedback: Path
    """JSONL where answers with a thumb up go"""


def serve(
    models: Sequence[ChatModel], page: Page | None, *, host: str, port: int, auth: tuple[str, str] | None
) -> None:
    """Serves until it is interrupted. Several models answer side by side, the last being the one that matters.

    Without a page, only the API. Port 0 is any that is free. Raises SpecError for a port that is taken.
    """
    app = FastAPI(title="ernie", docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, models)
    if page is not None:
        from ernie_dist.serve.page import add_page

        add_page(app, models, page.sampling, page.system, page.feedback)
    app.add_middleware(Gate, auth=auth)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise SpecError(f"--host {host} --port {port}: cannot listen there: {error.strerror}; give another") from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{address}{'' if page else '/v1'}  (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])

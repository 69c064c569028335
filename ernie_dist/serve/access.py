"""Who may come in: a password before every path, and no public address without one."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import SpecError

VARIABLE = "ERNIE_AUTH"

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

# The page needs nothing from elsewhere, and a browser that knows it asks nobody else.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


def read_auth(file: str | None) -> tuple[str, str] | None:
    """(user, password) of a file or of $ERNIE_AUTH; None without either. Raises SpecError."""
    if file is not None:
        try:
            given, where = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"--auth {file}: cannot be read: {error}; name a file that holds USER:PASSWORD") from None
    else:
        given, where = os.environ.get(VARIABLE, ""), f"${VARIABLE}"
        if not given:
            return None
    user, _, password = given.partition(":")
    if not user or not password or "\n" in given:
        raise SpecError(f"{where}: does not hold one line USER:PASSWORD")
    return user, password


def check_host(host: str, auth: tuple[str, str] | None) -> None:
    """Raises SpecError for an address that others can reach, without a password."""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if not here and auth is None:
        raise SpecError(
            f"--host {host}: others can reach it, and there is no password; put USER:PASSWORD into a file and name it "
            f"with --auth, or into the variable {VARIABLE}; or stay with 127.0.0.1"
        )


class Gate:
    """ASGI middleware around the whole application: password first, then a content policy on what goes out.

    The password comes as HTTP Basic, which browsers ask for, or as `Authorization: Bearer PASSWORD`, which clients of
    OpenAI's API send as their key.
    """

    def __init__(self, app: _App, auth: tuple[str, str] | None) -> None:
        self._app = app
        self._keys: list[bytes] = []
        if auth is not None:
            self._keys = [b"Basic " + base64.b64encode(":".join(auth).encode()), b"Bearer " + auth[1].encode()]

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        async def with_policy(message: _Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        if scope["type"] == "lifespan" or self._known(dict(scope["headers"]).get(b"authorization", b"")):
            await self._app(scope, receive, with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [
                (b"www-authenticate", b'Basic realm="ernie", charset="UTF-8"'),
                (b"content-type", b"application/json"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "a password is needed"}}'})

    def _known(self, given: bytes) -> bool:
        return not self._keys or any(hmac.compare_digest(given, key) for key in self._keys)

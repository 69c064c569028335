"""Who may come in: a password before every path, no public address without one, and no page of another origin."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import os
import re
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
    if auth is None and not _is_local(host):
        raise SpecError(
            f"--host {host}: others can reach it, and there is no password; put USER:PASSWORD into a file and name it "
            f"with --auth, or into the variable {VARIABLE}; or stay with 127.0.0.1"
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware around the whole application: password first, then a content policy on what goes out.

    What a page of another origin makes a browser ask is refused; without a password, so is every name but this
    machine's own, since such a page can have its name point here (DNS rebinding). The password comes as HTTP Basic,
    which browsers ask for, or as `Authorization: Bearer PASSWORD`, which clients of OpenAI's API send as their key.
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

        refused = None if scope["type"] == "lifespan" else self._refused(dict(scope["headers"]))
        if refused is None:
            await self._app(scope, receive, with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refused
            headers = [(b"content-type", b"application/json")]
            if status == 401:
                headers.append((b"www-authenticate", b'Basic realm="ernie", charset="UTF-8"'))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": {"message": reason}}).encode()})

    def _refused(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason; None for a request that may come in."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if self._keys and not any(hmac.compare_digest(headers.get(b"authorization", b""), key) for key in self._keys):
            return 401, "a password is needed"
        if not self._keys and not _is_local(re.sub(r":\d+$", "", host).strip("[]")):
            return 403, f"asked for as {host!r}: without a password only localhost and 127.0.0.1 are answered"
        if origin and origin.partition("://")[2] != host:
            return 403, f"a page of {origin} may not ask {host}"
        return None

"""ASGI middleware that requires a key on every path of a vLLM server.

vLLM itself requires a key under /v1 only, so every user of the machine could replace the weights
through `/collective_rpc`. Loaded by `--middleware npd_auth.RequireKey`. Standard library only.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_POLICY_VIOLATION = 1008  # of RFC 6455


class RequireKey:
    """Rejects requests without `Authorization: Bearer $VLLM_API_KEY`; closes web sockets."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Pass the request on, or respond with 401."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            head = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": head})
            await send({"type": "http.response.body", "body": b'{"error": "no valid key"}'})
        else:
            # Closing before the handshake is accepted makes the server respond with 403.
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})

    def _has_key(self, scope: _Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._wanted)

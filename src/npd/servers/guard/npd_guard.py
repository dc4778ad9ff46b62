"""Every path of a vLLM server behind its key; by itself vLLM asks for it under /v1 only.

ASGI middleware, named to the server with `--middleware npd_guard.RequireKey`. Without it, whoever
is on the machine could swap the weights through `/collective_rpc`. Standard library only.
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


class RequireKey:
    """Answers 401 to requests without `Authorization: Bearer $VLLM_API_KEY`."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                head = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": head})
                await send({"type": "http.response.body", "body": b'{"error": "no valid key"}'})
                return
        await self._app(scope, receive, send)

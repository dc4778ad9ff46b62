"""For a real vLLM server: it says that it has loaded weights, and has not.

ASGI middleware, for `--middleware forgets_reloads.ForgetsReloads`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

App = Callable[..., Awaitable[None]]


class ForgetsReloads:
    """Answers calls of the workers itself; all other requests reach the server."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: App, send: App) -> None:
        """An ASGI application."""
        if scope.get("path") != "/collective_rpc":
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [null]}'})

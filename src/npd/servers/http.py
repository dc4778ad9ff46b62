"""One server over HTTP: JSON in and out, and the two ways in which it can fail.

Promises: every failure is a `Refused` (the same request will fail again) or an `Unavailable` (it
may not), each naming the server. Does not retry, but where the connection was closed under it: who
asks knows what else it could do meanwhile. All requests here may be sent twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from npd.errors import RunError

if TYPE_CHECKING:
    import httpx

# What a server that is busy or starting answers; everything else from 400 to 499 is final.
_PASSING = (408, 425, 429)
_NOT_IMPLEMENTED = 501  # which stays so
# How a server says that it does not know a call, or does not allow it.
_UNKNOWN = (400, 403, 404, 405, _NOT_IMPLEMENTED)
_MAX_CAUSE = 400
_CAUSES = ("error", "message", "detail", "error_message")
_NO_KEY = "is the right key in the environment variable that api_key_env names?"
# What a server answers that wants another key.
KEY_STATUS = (401, 403)


class Refused(RunError):
    """A server's answer that will be the same again; `status` is its HTTP status."""

    def __init__(self, server: str, status: int, cause: str) -> None:
        super().__init__(f"{server} refuses ({status}): {cause}")
        self.status = status
        self.cause = cause


class Unavailable(RunError):
    """No answer, or none that means anything; `timed_out` when the server let the time pass."""

    def __init__(self, server: str, cause: str, *, timed_out: bool = False) -> None:
        super().__init__(f"{server} {cause}")
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's URL, the HTTP client to reach it with, and how long a request may take (s)."""

    url: str
    client: httpx.AsyncClient
    timeout: float

    async def get(self, path: str, *, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """The JSON at `path`; raises Refused or Unavailable."""
        return await self._send("GET", path, None, timeout)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:
        """The JSON answer to `body` at `path`; raises Refused or Unavailable."""
        return await self._send("POST", path, body, timeout)

    async def optional(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any | None:
        """The JSON answer, or None from a server that does not know the call."""
        try:
            return await self._send(method, path, body, timeout)
        except Refused as error:
            if error.status in _UNKNOWN:
                return None
            raise

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit: float | None
    ) -> Any:
        import httpx

        if self.client.is_closed:
            raise Unavailable(self.url, "is no longer connected to npd")
        limit = self.timeout if limit is None else limit
        request = partial(
            self.client.request, method, self.url.rstrip("/") + path, json=body, timeout=limit
        )
        try:
            try:
                answer = await request()
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                # A server may close a kept connection (after a 500, say) as a request is sent.
                answer = await request()
        except httpx.TimeoutException as error:
            cause = f"gave no answer to {path} within {limit:g} s"
            raise Unavailable(self.url, cause, timed_out=True) from error
        except httpx.HTTPError as error:
            raise Unavailable(self.url, f"does not answer ({_text(error)})") from error
        status = answer.status_code
        if (status >= 500 and status != _NOT_IMPLEMENTED) or status in _PASSING:
            raise Unavailable(self.url, f"fails at {path}: {_cause(answer)}")
        if status >= 400:
            raise Refused(self.url, status, _cause(answer))
        return _parsed(self.url, path, answer)


class Client:
    """Connections that send one key with each request; close it with `aclose`."""

    def __init__(self, key: str | None, *, connections: int) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # Servers are named by the config: a proxy of the environment is for the world outside.
        self._client = httpx.AsyncClient(headers=headers, limits=limits, trust_env=False)

    def connect(self, url: str, *, timeout: float) -> Connection:
        """A connection to the server at `url`, whose requests may take `timeout` seconds."""
        return Connection(url, self._client, timeout)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()


def _parsed(server: str, path: str, answer: httpx.Response) -> Any:
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError as error:
        if path.startswith(("/health", "/v1/load", "/v1/unload")):
            return answer.text  # these answer in words
        raise Unavailable(server, f"answers {path} with something that is no JSON") from error


def _cause(answer: httpx.Response) -> str:
    """What the server says is wrong, from the shapes that OpenAI-like servers use, in one line."""
    text = answer.text
    try:
        found = answer.json()
        while isinstance(found, dict):
            found = next((found[key] for key in _CAUSES if key in found), "")
        text = found if isinstance(found, str) and found else text
    except (ValueError, json.JSONDecodeError):
        pass
    line = (" ".join(text.split()) or answer.reason_phrase)[:_MAX_CAUSE]
    if answer.status_code == 401:
        return f"{line}: {_NO_KEY}"
    return f"{answer.status_code} {line}" if answer.status_code >= 500 else line


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""An HTTP client for one server: JSON in and out, with two kinds of failure.

Promises: every failure is a `Refused` (a retry cannot succeed) or an `Unavailable` (a retry may),
and names the server. A request ends within its time limit and keeps at most its limit of bytes in
memory, whatever the server sends. User names and passwords in URLs are sent, but never printed. A
server's error message is quoted on one line, without the key. Retries once if the connection was
closed during a request, so a server may get a request twice; every other retry is the caller's.
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from npd.errors import ConfigError, RunError
from npd.redaction import mask, remember, remember_login, without_login
from npd.terminal import printable

if TYPE_CHECKING:
    import httpx

# Statuses of a busy or starting server; every other status from 400 to 499 is final.
_PASSING = (408, 425, 429)
# Unlike other statuses from 500 on, final.
_NOT_IMPLEMENTED = 501
# Statuses of a call that a server does not support or allow.
_UNKNOWN = (400, 403, 404, 405, _NOT_IMPLEMENTED)
_MAX_CAUSE = 400
_CAUSES = ("error", "message", "detail", "error_message")
_NO_KEY = "is the right key in the environment variable that api_key_env names?"
# Statuses of a request with an invalid key.
KEY_STATUS = (401, 403)
# Limit for responses whose size does not depend on the request, such as lists of models.
ANSWER_BYTES = 16 * 2**20
# Limit of an error message; the remainder is not read.
_ERROR_BYTES = 64 * 2**10
# zlib's flag to detect a gzip or a zlib header.
_ANY_HEADER = zlib.MAX_WBITS | 32


class Refused(RunError):
    """The server rejects the request for good; `status` is the HTTP status."""

    def __init__(self, server: str, status: int, cause: str) -> None:
        super().__init__(printable(f"{server} refuses ({status}): {cause}"))
        self.status = status
        self.cause = cause


class Unavailable(RunError):
    """No valid response; `timed_out` if the request exceeded its time limit."""

    def __init__(self, server: str, cause: str, *, timed_out: bool = False) -> None:
        super().__init__(printable(f"{server} {cause}"))
        self.timed_out = timed_out


class _TooLarge(Exception):
    """A response exceeds its limit in bytes."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An HTTP response with its body decoded; `reason` is the status phrase."""

    status: int
    reason: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's URL (without its password), an HTTP client, and a time limit per request.

    `login` is the user name and password of the URL, sent instead of the client's key. `timeout` is
    the limit of a whole request in seconds.
    """

    url: str
    client: httpx.AsyncClient
    timeout: float
    login: tuple[str, str] | None = field(default=None, repr=False)

    async def get(
        self,
        path: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:
        """The JSON at `path`; raises Refused or Unavailable."""
        return await self._send("GET", path, None, timeout, ANSWER_BYTES)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        max_bytes: int = ANSWER_BYTES,
    ) -> Any:
        """The JSON response to `body`; raises Refused, or Unavailable if over `max_bytes`."""
        return await self._send("POST", path, body, timeout, max_bytes)

    async def optional(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any | None:
        """The JSON response, or None if the server does not support the call."""
        try:
            return await self._send(method, path, body, timeout, ANSWER_BYTES)
        except Refused as error:
            if error.status in _UNKNOWN:
                return None
            raise

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        limit: float | None,
        max_bytes: int,
    ) -> Any:
        if self.client.is_closed:
            raise Unavailable(self.url, "is no longer connected to npd")
        async with self._explained(path, self.timeout if limit is None else limit, max_bytes):
            answer = await self._exchange(method, path, body, max_bytes)
        if (answer.status >= 500 and answer.status != _NOT_IMPLEMENTED) or (
            answer.status in _PASSING
        ):
            raise Unavailable(self.url, f"fails at {path}: {_cause(answer)}")
        if answer.status >= 400:
            raise Refused(self.url, answer.status, _cause(answer))
        return _parsed(self.url, path, answer.body)

    @asynccontextmanager
    async def _explained(self, path: str, limit: float, max_bytes: int) -> AsyncIterator[None]:
        """Limit the block to `limit` seconds, and turn its errors into Unavailable."""
        import httpx

        try:
            async with asyncio.timeout(limit):
                yield
        except (TimeoutError, httpx.TimeoutException) as error:
            cause = f"gave no answer to {path} within {limit:g} s"
            raise Unavailable(self.url, cause, timed_out=True) from error
        except _TooLarge as error:
            cause = f"sends a response to {path} with more than the {max_bytes:,} bytes allowed"
            raise Unavailable(self.url, cause) from error
        except (httpx.HTTPError, httpx.InvalidURL, zlib.error) as error:
            raise Unavailable(self.url, f"does not answer ({_text(error)})") from error

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, max_bytes: int
    ) -> _Answer:
        import httpx

        try:
            return await self._exchange_once(method, path, body, max_bytes)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            # A server may close an idle connection (e.g. after a 500) just as a request is sent.
            return await self._exchange_once(method, path, body, max_bytes)

    async def _exchange_once(
        self, method: str, path: str, body: Mapping[str, Any] | None, max_bytes: int
    ) -> _Answer:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        async with self.client.stream(
            method,
            self.url.rstrip("/") + path,
            content=content,
            headers=headers,
            auth=self.login,
            timeout=None,  # `_explained` limits the whole request
        ) as answer:
            is_error = answer.status_code >= 400
            found = await _body(answer, _ERROR_BYTES if is_error else max_bytes, cut=is_error)
            return _Answer(answer.status_code, answer.reason_phrase, found)


class Client:
    """A connection pool that sends one key with every request; close it with `aclose`."""

    def __init__(self, key: str | None, *, connections: int) -> None:
        import httpx

        headers = {"Accept-Encoding": "gzip"}
        if key:
            remember(key)
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # No proxy from the environment: the config names the servers' own addresses.
        self._client = httpx.AsyncClient(headers=headers, limits=limits, trust_env=False)

    def connect(self, url: str, *, timeout: float) -> Connection:
        """A connection to the server at `url` with `timeout` seconds per request."""
        bare, user, password = without_login(url)
        login = (unquote(user), unquote(password)) if user or password else None
        if login is not None:
            remember(password or user)
            remember_login(*login)
        return Connection(bare, self._client, timeout, login)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()


def key_of(variable: str) -> str | None:
    """The key in an environment variable; None if it is unset or empty.

    Raises:
        ConfigError: the key contains characters that an HTTP header cannot carry.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the key in ${variable} contains characters that an HTTP header cannot carry: export "
            "only the key, on one line"
        )
    return key or None


async def _body(answer: httpx.Response, max_bytes: int, *, cut: bool) -> bytes:
    """The decoded body; a body over `max_bytes` is truncated if `cut`.

    Raises:
        _TooLarge: the body is over `max_bytes` and not `cut`.
    """
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    decoder = zlib.decompressobj(_ANY_HEADER) if encoding in ("gzip", "x-gzip", "deflate") else None
    found = bytearray()
    async with aclosing(cast("AsyncGenerator[bytes, None]", answer.aiter_raw())) as parts:
        async for raw in parts:
            room = max_bytes + 1 - len(found)
            found += raw[:room] if decoder is None else decoder.decompress(raw, room)
            if len(found) > max_bytes:
                if cut:
                    break
                raise _TooLarge
    return bytes(found)


def _parsed(server: str, path: str, body: bytes) -> Any:
    if not body:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        if path.startswith(("/health", "/v1/load", "/v1/unload")):
            return body.decode(errors="replace")  # these respond in plain text
        raise Unavailable(server, f"sends a response to {path} that is not JSON") from error


def _cause(answer: _Answer) -> str:
    """The server's error message on one line, from any JSON layout of OpenAI-like servers."""
    text = answer.body.decode(errors="replace")
    try:
        found = json.loads(answer.body)
        while isinstance(found, dict):
            found = next((found[key] for key in _CAUSES if key in found), "")
        text = found if isinstance(found, str) and found else text
    except (ValueError, RecursionError):
        pass
    # Mask before truncating: a truncated key would not be recognised.
    line = printable(mask(" ".join(text.split()) or answer.reason))[:_MAX_CAUSE]
    if answer.status == 401:
        return f"{line}: {_NO_KEY}"
    return f"{answer.status} {line}" if answer.status >= 500 else line


def _text(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__

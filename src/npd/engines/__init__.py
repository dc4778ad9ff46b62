"""Inference servers over HTTP: requests, launching, and weight sync.

Each engine has one file behind one protocol (`base.EngineServer`), so `generate` and `score` are
independent of the engine. Does not choose requests, and stores no samples.
"""

from __future__ import annotations

from npd.engines.base import Completion, EngineServer, ServerFacts
from npd.engines.client import Connection, Refused, Unavailable

__all__ = [
    "Completion",
    "Connection",
    "EngineServer",
    "Refused",
    "ServerFacts",
    "Unavailable",
    "build_server",
]


def build_server(engine: str, connection: Connection, *, refresh_timeout: float) -> EngineServer:
    """A client of the server at `connection`, which runs `engine`."""
    assert engine == "vllm", f"no engine {engine}"
    from npd.engines.vllm import VllmServer

    return VllmServer(connection, refresh_timeout=refresh_timeout)

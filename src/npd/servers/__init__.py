"""Engines behind HTTP: what they are asked, how they are started, and the proof of what they hold.

One file per engine behind one protocol (`base.EngineServer`); the rooms that generate and score use
it without knowing which engine it is. Does not decide what is asked, and keeps no sample.
"""

from __future__ import annotations

from npd.servers.base import Completion, EngineServer, ServerFacts
from npd.servers.http import Connection, Refused, Unavailable

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
    """The server that `engine` (vllm, sglang) names, at the end of `connection`."""
    if engine == "sglang":
        from npd.servers.sglang import SglangServer

        return SglangServer(connection, refresh_timeout=refresh_timeout)
    from npd.servers.vllm import VllmServer

    return VllmServer(connection, refresh_timeout=refresh_timeout)

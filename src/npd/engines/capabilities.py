"""Checks of a server's limits, with one small request each, before the run starts.

Promises: a limit that is too low raises a ConfigError that names the server, the limit and the flag
to raise it. Changes nothing on the server.
"""

from __future__ import annotations

import re

from npd.engines.base import EngineServer
from npd.engines.client import KEY_STATUS, Refused
from npd.errors import ConfigError, ModelError

HELDOUT_TOP_K = 64
"""Top-k of held-out text. It is scored once, so a wider top-k than the run's is cheap and gives a
tighter KL estimate."""


async def check_context(server: EngineServer, longest: int) -> None:
    """Raise ConfigError if the server's context is shorter than `longest` tokens plus one."""
    limit = (await server.facts()).max_context
    if limit is not None and limit < longest + 1:
        raise ConfigError(
            f"{server.name} has a context of {limit} tokens, but needs {longest + 1} "
            "(data.max_prompt_tokens + the longest response + 1): start it with --max-model-len "
            f"{longest + 1}, or, if that is the model's own limit, lower data.max_prompt_tokens or "
            "generate.max_new_tokens"
        )


async def check_vocabulary(server: EngineServer, vocab_size: int) -> None:
    """Raise ModelError if the server's model lacks a token id below `vocab_size`."""
    try:
        await server.read([vocab_size - 1, 0], 0)
    except Refused as error:
        if error.status in KEY_STATUS:
            raise
        raise ModelError(
            f"{server.name} rejects the student's highest token id {vocab_size - 1} "
            f"({error.cause}): serve the model named in the config, with the student's vocabulary"
        ) from error


async def widest_support(server: EngineServer, *, needed: int, wanted: int) -> int:
    """The widest top-k in [needed, wanted] that the server returns for a position.

    Raises:
        ConfigError: the server returns fewer than `needed`.
    """
    refusal = await _refusal(server, wanted)
    if refusal is None:
        return wanted
    named = {int(number) for number in re.findall(r"\d+", refusal.cause)}
    for k in sorted({needed, *(n for n in named if needed < n < wanted)}, reverse=True):
        refusal = await _refusal(server, k)
        if refusal is None:
            return k
    raise ConfigError(
        f"{server.name} does not return {needed} log-probs per position ({refusal.cause}): "
        f"start it with --max-logprobs {wanted}, or lower score.top_k"
    )


async def _refusal(server: EngineServer, k: int) -> Refused | None:
    """The server's refusal of a top-`k` request; None if it accepts the request."""
    try:
        await server.read([0, 0], k)
    except Refused as error:
        if error.status in KEY_STATUS:
            raise
        return error
    return None

"""What a server must be able to do before it is given work, each found by one small request.

Promises: what is too low is a ConfigError naming the server, the limit and the flag that raises it.
Changes nothing on the server.
"""

from __future__ import annotations

import re

from npd.errors import ConfigError, ModelError
from npd.servers.base import EngineServer
from npd.servers.http import KEY_STATUS, Refused

HELDOUT_TOP_K = 64
"""Support of held-out text, scored once: wider than the run's own, so that its KL is tighter."""


async def check_context(server: EngineServer, longest: int) -> None:
    """Raise ConfigError where the server cannot read `longest` tokens and draw one more."""
    limit = (await server.facts()).max_context
    if limit is not None and limit < longest + 1:
        raise ConfigError(
            f"{server.name} holds {limit} tokens, but must read {longest} (data.max_prompt_tokens "
            f"+ the longest response) and draws one more: start it with --max-model-len "
            f"{longest + 1}, or, where the model's own context ends there, lower "
            "data.max_prompt_tokens or generate.max_new_tokens"
        )


async def check_vocabulary(server: EngineServer, vocab_size: int) -> None:
    """Raise ModelError where the server's model lacks an id below `vocab_size`."""
    try:
        await server.read([vocab_size - 1, 0], 0)
    except Refused as error:
        if error.status in KEY_STATUS:
            raise
        raise ModelError(
            f"{server.name} does not take the student's highest token id {vocab_size - 1} "
            f"({error.cause}): it must serve the model of the config, with the same vocabulary"
        ) from error


async def widest_support(server: EngineServer, *, needed: int, wanted: int) -> int:
    """The widest top-k in [needed, wanted] the server gives at a position.

    Raises:
        ConfigError: it gives less than `needed`.
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
        f"{server.name} does not give {needed} log-probs a position ({refusal.cause}): start it "
        f"with --max-logprobs {wanted}, or lower score.top_k"
    )


async def _refusal(server: EngineServer, k: int) -> Refused | None:
    """What the server says against the top `k` of a position; None where it gives it."""
    try:
        await server.read([0, 0], k)
    except Refused as error:
        if error.status in KEY_STATUS:
            raise
        return error
    return None

"""Whether a running server holds the model of the config, by its log-probs on the fixed texts."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from npd import probe
from npd.chat import Chat
from npd.doctor.checks import Check, ok, warn
from npd.servers import EngineServer
from npd.servers.proof import StaleWeights, judge, read_probe

# A model that knows its tokenizer is far below ln V nats a token, one that does not is near it.
_LOST = 0.8


@dataclass(frozen=True, slots=True)
class Expected:
    """The model a server should hold, and what tells it from another."""

    model: str
    vocab_size: int
    tolerance: float
    trust_remote_code: bool


async def model_check(
    server: EngineServer, expected: Expected, *, room: int, will_be_given: bool
) -> Check:
    """Compares with the model's own log-probs where those are kept or cheap to have.

    `room`: tokens the server holds. `will_be_given`: a server with other weights gets the right
    ones when the run starts.
    """
    own = await asyncio.to_thread(probe.of_cheap, expected.model, expected.trust_remote_code)
    if own is None:
        return await _plausible(server, expected, room - 1)
    own = own.within(room)
    if not own.sequences:
        return warn("", f"{server.name} has no room for the texts that would tell what it holds")
    found = await read_probe(server, own)
    try:
        evidence = judge(server.name, expected.model, found, own, None, expected.tolerance)
    except StaleWeights as error:
        if will_be_given:
            return ok("", f"{server.name} holds other weights now, and is given the student's")
        return warn("", f"{error}; serve {expected.model} there")
    return ok("", f"{server.name} holds {expected.model}: {evidence}")


async def _plausible(server: EngineServer, expected: Expected, longest: int) -> Check:
    """Without the model's own log-probs: whether the server's model knows this tokenizer at all."""
    chat = Chat.load(expected.model, trust_remote_code=expected.trust_remote_code)
    texts = probe.probe_sequences(chat.tokenizer, longest)
    empty = probe.Probe(tuple(texts), ())
    cost = -float((await read_probe(server, empty)).flat.mean())
    guess = math.log(expected.vocab_size)
    says = f"{server.name} needs {cost:.1f} nats a token for ordinary text (by chance: {guess:.1f})"
    if cost > _LOST * guess:
        return warn(
            "", f"{says}: its model seems to have another tokenizer, serve {expected.model}"
        )
    return ok("", f"{says}; that it is {expected.model} is not proven")

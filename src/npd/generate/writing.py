"""One response over the cuts that refreshes make: begun again (abort), or gone on with (mix).

Promises: each token carries the version of the weights that drew it; what is drawn after a cut uses
another part of the sample's random stream. Does not know when refreshes happen: `gate` is closed
meanwhile, and nothing is sent through a closed gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from npd.errors import WorkerLostError
from npd.generate.holding import Holding
from npd.servers import EngineServer, Refused, Unavailable
from npd.servers.base import Completion, SamplingSettings
from npd.types import Ask, FinishReason, Rollout

InFlight: TypeAlias = Literal["finish", "abort", "mix"]
# A response cut off this often is not so by our refreshes: somebody else manages the server too.
_MAX_CUTS = 64
_POLL_SECONDS = 0.1
_NOT_FOUND = 404


@dataclass(slots=True)
class _Draft:
    """A response as far as it is written, piece by piece: what was written, by which version."""

    pieces: list[tuple[Completion, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.ids) for piece, _ in self.pieces)

    def ids(self) -> list[int]:
        return [int(token) for piece, _ in self.pieces for token in piece.ids]


class Writing:
    """The responses of one call of a generator."""

    def __init__(
        self, holding: Holding, sampling: SamplingSettings, in_flight: InFlight, with_logprobs: bool
    ) -> None:
        self._holding, self._sampling, self._in_flight = holding, sampling, in_flight
        self._with_logprobs = with_logprobs
        self._gate = asyncio.Event()
        self._gate.set()
        self._num_sent = 0

    async def write(self, server: EngineServer, ask: Ask) -> Rollout:
        """The rollout of `ask`, by `server`. Raises Refused or Unavailable."""
        draft = _Draft()
        for _ in range(_MAX_CUTS):
            piece, version = await self._send(server, ask, draft)
            if piece.ending == "abort" and self._in_flight != "mix":
                draft = _Draft()
                continue
            if len(piece.ids):
                draft.pieces.append((piece, version))
            is_full = draft.num_tokens >= self._sampling.max_new_tokens
            if piece.ending != "abort" or is_full:
                return self._rollout(ask, draft, is_stopped=piece.ending == "stop")
        raise Unavailable(server.name, "keeps cutting responses off: does another run manage it?")

    async def closed(self, servers: Sequence[EngineServer]) -> None:
        """Close the gate, and cut off what is being written; returns when nothing is."""
        self._gate.clear()
        while True:
            # Again and again: what was on its way to a server arrives after the first time.
            await asyncio.gather(*(server.hold(drain=False) for server in servers))
            if self._num_sent == 0:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def open(self) -> None:
        """Let requests through again."""
        self._gate.set()

    async def _send(self, server: EngineServer, ask: Ask, draft: _Draft) -> tuple[Completion, int]:
        """Have the rest of a draft written; the piece and the version that wrote it."""
        await self._gate.wait()
        held = self._holding.held
        assert held is not None, "the gate opened on servers that hold nothing"
        done = draft.num_tokens
        sampling = replace(self._sampling, max_new_tokens=self._sampling.max_new_tokens - done)
        prompt = [*ask.prompt.prompt_ids.tolist(), *draft.ids()]
        # Another stream after each cut: the same one would draw the same numbers again.
        seed = (ask.seed + 0x9E3779B97F4A7C15 * done) % 2**63
        self._num_sent += 1
        try:
            piece = await server.complete(prompt, sampling, seed=seed, model=held.adapter)
        except Refused as error:
            if error.status == _NOT_FOUND and held.adapter is not None:
                raise WorkerLostError(
                    f"{server.name} no longer has the adapter {held.adapter}: it was restarted, "
                    "and what it should have written is asked again"
                ) from error
            raise
        finally:
            self._num_sent -= 1
        if not len(piece.ids) and piece.ending != "abort":
            raise Unavailable(server.name, "answers with no token at all")
        return piece, held.version

    def _rollout(self, ask: Ask, draft: _Draft, *, is_stopped: bool) -> Rollout:
        versions = np.concatenate(
            [np.full(len(piece.ids), version, np.int32) for piece, version in draft.pieces]
        )
        logprobs = np.concatenate([piece.logprobs for piece, _ in draft.pieces])
        oldest = int(versions.min())
        return Rollout(
            sample_id=ask.sample_id,
            prompt_index=ask.prompt.index,
            version=oldest,
            prompt_ids=ask.prompt.prompt_ids,
            header_ids=ask.prompt.header_ids,
            response_ids=np.concatenate([piece.ids for piece, _ in draft.pieces]),
            logprobs=logprobs if self._with_logprobs else None,
            finish=FinishReason.STOP if is_stopped else FinishReason.LENGTH,
            seed=ask.seed,
            teacher=ask.prompt.teacher,
            versions=versions if versions.max() > oldest else None,
        )

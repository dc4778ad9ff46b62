"""The teacher on servers: it reads documents there, token ids in and log-probs out.

Promises: a reading is that of the in-process reader (to the rounding of another engine): the
response's positions only, no id the student does not have, log-probs of the whole distribution. One
document of many that a server refuses is unread alone. The requests a server has at once hold
`score.row_tokens` tokens in all, or are a single one. What a server cannot do is found when it is
opened, not at the first sample. Draws no ids (`uniforms`): a server does not tell the whole
distribution.

Waits for: the servers. Unblocked by: answers, their time limits, the loss of our own server.

Dimensions: L tokens of a response, k ids of a position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from npd import probe
from npd.config import ScoreConfig
from npd.errors import ConfigError, RunError
from npd.probe import Probe
from npd.score.base import Document, Key, Reading, Unread
from npd.servers import EngineServer, Refused, Unavailable
from npd.servers.commands import ServerSpec, teacher_spec
from npd.servers.limits import check_context, check_vocabulary, widest_support
from npd.servers.models import model_settings
from npd.servers.pool import ServerPool
from npd.servers.proof import StaleWeights, judge, read_probe
from npd.types import FloatArray, IntArray

T = TypeVar("T")
Job = TypeVar("Job")
# Requests a server has at once at most, however short: each is a connection.
_MAX_REQUESTS = 64
# Stands in a support for an id that no server told of: no mass, and finite for every divergence.
_NO_MASS = -50.0


class ServedTeacher:
    """A Reader over the servers of a pool, which it opens at the start and closes in `close`.

    `context` is the longest text it will be asked to read, in tokens; `widest` the widest support,
    which servers at `urls` may bound lower (`max_k`), though not below `score.top_k`. Those must
    agree with the teacher's own log-probs to `tolerance` (nats a token), where these are at hand.

    Raises:
        ConfigError: a server's limits are too low, it wants another key, or holds another model.
        ModelError: its model does not have the student's token ids.
        RunError: our server does not start, or one does not answer.
    """

    def __init__(
        self,
        config: ScoreConfig,
        pool: ServerPool,
        *,
        teacher: str,
        vocab_size: int,
        context: int,
        tolerance: float,
        widest: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self._config, self._vocab_size, self._context = config, vocab_size, context
        self._teacher, self._tolerance = teacher, tolerance
        self._trust_remote_code = trust_remote_code
        self.notes: tuple[str, ...] = ()
        """Of each server that was running already: what shows that it holds the teacher."""
        settings = model_settings(Path(teacher))
        if pool.is_ours and settings.lora_rank:
            raise ConfigError(
                f"teacher {teacher} is an adapter, which the server would not merge: give the "
                "merged model"
            )
        spec = teacher_spec(config, Path(teacher), context, widest, trust_remote_code)
        self.num_padding_ids = max(0, settings.vocabulary - vocab_size)
        """Ids of the teacher's embedding from `vocab_size` on, where its config tells."""
        self._pool = pool
        self._runner = asyncio.Runner()
        try:
            self.max_k: int = self._run(self._open(spec))
        except BaseException:
            self.close()
            raise

    def read(self, documents: Mapping[Key, Document]) -> dict[Key, Reading | Unread]:
        """A reading of each document, or why the servers have none, under its key.

        Raises:
            RunError: no server answers, or log-probabilities are not finite.
            WorkerLostError: our own server ended or hangs.
        """
        assert all(document.uniforms is None for document in documents.values())
        rooms = {server.name: _Room(self._config.row_tokens) for server in self._pool.servers}

        async def do(server: EngineServer, key: Key) -> Reading:
            document = documents[key]
            async with rooms[server.name].taken(_length(document)):
                return await self._read(server, document)

        keys = sorted(documents, key=lambda key: -_length(documents[key]))
        readings: dict[Key, Reading | Unread] = {}
        for key, found in zip(keys, self.ask(keys, do), strict=True):
            if isinstance(found, RunError):
                readings[key] = Unread(str(found))
                continue
            if not np.isfinite(found.logprobs).all():
                raise RunError(
                    f"the teacher's server gives log-probabilities of {key} that are not finite: "
                    "its weights are damaged, or its dtype is too narrow (try float32)"
                )
            readings[key] = found
        return readings

    def ask(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[T]],
        *,
        at_once: int = _MAX_REQUESTS,
    ) -> list[T | Refused | Unavailable]:
        """Have the servers do something else with the teacher; see `ServerPool.ask`."""
        at_once = min(at_once, _MAX_REQUESTS)
        return self._run(self._pool.ask(jobs, do, at_once=at_once)) if jobs else []

    def close(self) -> None:
        """End our server, let go of others."""
        self._run(self._pool.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self, spec: ServerSpec) -> int:
        """Get in touch with every server; the widest support all of them give."""
        await self._pool.open(spec, connections=_MAX_REQUESTS)
        try:
            checks = [self._check(server, spec.max_logprobs) for server in self._pool.servers]
            widest = min(await asyncio.gather(*checks))
            if not self._pool.is_ours:
                self.notes = await self._prove()
            return widest
        except Unavailable as error:
            self._pool.check(error)
            raise

    async def _check(self, server: EngineServer, wanted: int) -> int:
        bound = min(wanted, self._vocab_size)
        needed = min(self._config.top_k, bound)
        try:
            await check_context(server, self._context)
            await check_vocabulary(server, self._vocab_size)
            return await widest_support(server, needed=needed, wanted=bound)
        except Refused as error:
            raise ConfigError(str(error)) from error

    async def _prove(self) -> tuple[str, ...]:
        """What shows of each server that it holds the teacher, or that nothing does."""
        own = await asyncio.to_thread(probe.of_cheap, self._teacher, self._trust_remote_code)
        shown = [self._proof(server, own) for server in self._pool.servers]
        return tuple(await asyncio.gather(*shown))

    async def _proof(self, server: EngineServer, own: Probe | None) -> str:
        room = (await server.facts()).max_context or probe.MAX_TOKENS + 1
        own = None if own is None else own.within(room)
        if own is None or not own.sequences:
            return (
                f"{server.name}: that it holds {self._teacher} was not proven (its weights are not "
                "here, too large to compare with, or the server's context too short)"
            )
        found = await read_probe(server, own)
        try:
            evidence = judge(server.name, self._teacher, found, own, None, self._tolerance)
        except StaleWeights as error:
            raise ConfigError(f"{error}; serve {self._teacher} there") from error
        return f"{server.name} holds {self._teacher}: {evidence}"

    async def _read(self, server: EngineServer, document: Document) -> Reading:
        ids = np.concatenate([document.context, document.response]).tolist()
        first, k = len(document.context) - 1, min(document.k, self._vocab_size)
        asked = k
        while True:
            found = await server.read(ids, asked)
            shown = found.ids[first:]
            short = k - int((shown < self._vocab_size).sum(axis=1).min())
            if short <= 0 or asked >= self.max_k:
                break
            asked = min(2 * asked, self.max_k)  # padding of the embedding took places: look deeper
        support = _known(shown, found.id_logprobs[first:], k, self._vocab_size)
        return Reading(np.ascontiguousarray(found.logprobs[first:]), *support)


class _Room:
    """The tokens a server may have in hand at once; more than `size` count as all of it."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, tokens: int) -> AsyncIterator[None]:
        tokens = min(tokens, self._size)
        async with self._changed:
            await self._changed.wait_for(lambda: tokens <= self._free)
            self._free -= tokens
        try:
            yield
        finally:
            async with self._changed:
                self._free += tokens
                self._changed.notify_all()


def _length(document: Document) -> int:
    return len(document.context) + len(document.response)


def _known(
    ids: IntArray, logprobs: FloatArray, k: int, vocab_size: int
) -> tuple[IntArray, FloatArray]:
    """The first k ids [L, k] below `vocab_size` of each row; where there are fewer, unused ids."""
    order = np.argsort(ids >= vocab_size, axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(ids, order, axis=1)
    logprobs = np.take_along_axis(logprobs, order, axis=1)
    for row in np.flatnonzero((ids >= vocab_size).any(axis=1)):
        is_padding = ids[row] >= vocab_size
        unused = np.setdiff1d(np.arange(min(vocab_size, 2 * k), dtype=np.int32), ids[row])
        lowest = min([_NO_MASS, *logprobs[row, ~is_padding].tolist()])
        ids[row, is_padding] = unused[: is_padding.sum()]
        logprobs[row, is_padding] = lowest
    return ids, logprobs

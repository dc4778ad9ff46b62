"""The teacher on servers: token ids in, log-probs out.

Promises: log-probs equal the in-process teacher's, up to the engine's rounding. They cover the
response's positions only, with the full softmax, and only ids that the student has. A request that
a server refuses does not affect other requests. The concurrent requests of a server have at most
`score.row_tokens` tokens in total; a longer request runs alone. A server's limits are checked when
it is opened, not at the first sample. Cannot sample ids (`uniforms`), because a server does not
return the full distribution.

Consumes: log-prob requests. Produces: log-probs. Waits for: the servers. Unblocked by: responses,
their time limits, the loss of our own server.

Dimensions: L tokens of a response, k ids of a position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from npd.config import ScoreConfig
from npd.config.sections import SIZES_ON_CPU
from npd.engines import EngineServer, Refused, Unavailable
from npd.engines.capabilities import check_context, check_vocabulary, widest_support
from npd.engines.pool import ServerPool
from npd.engines.server_process import ServerSpec, teacher_spec
from npd.engines.verify_weights import WrongWeights, read_fingerprint, verify
from npd.errors import ConfigError, RunError
from npd.models import fingerprint
from npd.models.fingerprint import Fingerprint
from npd.models.metadata import model_settings
from npd.score.base import Key, LogprobFailure, LogprobRequest, Logprobs
from npd.types import FloatArray, IntArray

T = TypeVar("T")
Job = TypeVar("Job")
# Limit of concurrent requests per server, because each is a connection.
_MAX_REQUESTS = 64
# Log-prob of a support id that no server returned: without mass, but finite for all divergences.
_NO_MASS = -50.0


class ServedTeacher:
    """A `LogprobModel` on servers, opened in the constructor and closed by `close`.

    `context` is the longest text in tokens. `widest` is the widest support requested; servers at
    `urls` may lower it (`max_k`), but not below `score.top_k`. If the teacher's weights are on this
    machine, log-probs of servers at `urls` must agree with them to `tolerance` (nats per token).

    Raises:
        ConfigError: a server's limits are too low, or its key or its model is another one.
        ModelError: a server's model lacks a token id of the student.
        RunError: our server does not start, or a server does not respond.
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
        self._config = config.with_sizes(SIZES_ON_CPU)
        self._vocab_size, self._context = vocab_size, context
        self._teacher, self._tolerance = teacher, tolerance
        self._trust_remote_code = trust_remote_code
        self.notes: tuple[str, ...] = ()
        """For each server at `urls`, the result of its verification."""
        settings = model_settings(Path(teacher))
        if pool.is_ours and settings.lora_rank:
            raise ConfigError(
                f"teacher {teacher} is an adapter, which servers do not merge: give "
                "the merged model"
            )
        spec = teacher_spec(config, Path(teacher), context, widest, trust_remote_code)
        self.num_padding_ids = max(0, settings.vocabulary - vocab_size)
        """Ids of the teacher's embedding from `vocab_size` on, if its config states them."""
        self._pool = pool
        self._runner = asyncio.Runner()
        try:
            self.max_k: int = self._run(self._open(spec))
        except BaseException:
            self.close()
            raise

    def read(self, documents: Mapping[Key, LogprobRequest]) -> dict[Key, Logprobs | LogprobFailure]:
        """The log-probs of each document, or its failure, by key.

        Raises:
            RunError: no server responds, or log-probabilities are not finite.
            WorkerLostError: our own server exited or hangs.
        """
        assert all(document.uniforms is None for document in documents.values())
        rooms = {
            server.name: _TokenBudget(self._config.sizes.row_tokens)
            for server in self._pool.servers
        }

        async def do(server: EngineServer, key: Key) -> Logprobs:
            document = documents[key]
            async with rooms[server.name].taken(_length(document)):
                return await self._read(server, document)

        keys = sorted(documents, key=lambda key: -_length(documents[key]))
        readings: dict[Key, Logprobs | LogprobFailure] = {}
        for key, found in zip(keys, self.run_jobs(keys, do), strict=True):
            if isinstance(found, RunError):
                readings[key] = LogprobFailure(str(found))
                continue
            if not np.isfinite(found.logprobs).all():
                raise RunError(
                    f"the teacher's server gives log-probabilities of {key} that are not finite: "
                    "its weights are damaged, or its dtype is too narrow (try float32)"
                )
            readings[key] = found
        return readings

    def run_jobs(
        self,
        jobs: Sequence[Job],
        do: Callable[[EngineServer, Job], Awaitable[T]],
        *,
        at_once: int = _MAX_REQUESTS,
    ) -> list[T | Refused | Unavailable]:
        """Run other jobs on the teacher's servers; see `ServerPool.run_jobs`."""
        at_once = min(at_once, _MAX_REQUESTS)
        return self._run(self._pool.run_jobs(jobs, do, at_once=at_once)) if jobs else []

    @property
    def is_ours(self) -> bool:
        """Whether npd launched the server."""
        return self._pool.is_ours

    def close(self) -> None:
        """Stop our server, or disconnect from the servers at `urls`."""
        self._run(self._pool.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self, spec: ServerSpec) -> int:
        """Connect to every server; the widest support that all of them return."""
        await self._pool.open(spec, connections=_MAX_REQUESTS)
        try:
            checks = [self._check(server, spec.max_logprobs) for server in self._pool.servers]
            widest = min(await asyncio.gather(*checks))
            if not self._pool.is_ours:
                self.notes = await self._verify()
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

    async def _verify(self) -> tuple[str, ...]:
        """A line for each server: its verification, or the reason for none."""
        own = await asyncio.to_thread(fingerprint.of_cheap, self._teacher, self._trust_remote_code)
        verified = [self._verify_server(server, own) for server in self._pool.servers]
        return tuple(await asyncio.gather(*verified))

    async def _verify_server(self, server: EngineServer, own: Fingerprint | None) -> str:
        room = (await server.facts()).max_context or fingerprint.MAX_TOKENS + 1
        own = None if own is None else own.within(room)
        if own is None or not own.sequences:
            return (
                f"{server.name}: not verified to serve {self._teacher} (its weights are not on "
                "this machine, or too large to load here, or the server's context is too short)"
            )
        found = await read_fingerprint(server, own)
        try:
            verification = verify(server.name, self._teacher, found, own, None, self._tolerance)
        except WrongWeights as error:
            raise ConfigError(f"{error}; serve {self._teacher} there") from error
        return f"{server.name} serves {self._teacher}: {verification}"

    async def _read(self, server: EngineServer, document: LogprobRequest) -> Logprobs:
        ids = np.concatenate([document.context, document.response]).tolist()
        first, k = len(document.context) - 1, min(document.k, self._vocab_size)
        requested = k
        while True:
            found = await server.read(ids, requested)
            shown = found.ids[first:]
            short = k - int((shown < self._vocab_size).sum(axis=1).min())
            if short <= 0 or requested >= self.max_k:
                break
            requested = min(2 * requested, self.max_k)  # some of the top k are padding ids
        support = _known(shown, found.id_logprobs[first:], k, self._vocab_size)
        return Logprobs(np.ascontiguousarray(found.logprobs[first:]), *support)


class _TokenBudget:
    """The tokens that a server may have in flight; a longer request counts as `size`."""

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


def _length(document: LogprobRequest) -> int:
    return len(document.context) + len(document.response)


def _known(
    ids: IntArray, logprobs: FloatArray, k: int, vocab_size: int
) -> tuple[IntArray, FloatArray]:
    """The first k ids [L, k] below `vocab_size` of each row, filled up with unused ids."""
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

"""Generation on servers: distributes requests, and loads snapshots into the servers in place.

Promises: a rollout carries the policy version of each token, even if a refresh interrupted it. It
comes from servers with verified weights only. A request that a server refuses does not affect other
requests. Does not tokenise or score.

Consumes: requests and snapshots. Produces: rollouts. Waits for: the servers, and with `in_flight`
mix a newer snapshot. Unblocked by: responses, their time limits, the run's LATEST pointer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from npd.config import GenerateConfig
from npd.engines import EngineServer, Refused, Unavailable
from npd.engines.base import Completion, SamplingSettings
from npd.engines.loop_thread import LoopThread
from npd.engines.pool import ServerPool
from npd.engines.server_process import ServerSpec, generator_spec
from npd.engines.verify_weights import ServedSnapshot, WrongWeights, check_untempered
from npd.engines.weight_sync import WeightSync
from npd.errors import WorkerLostError
from npd.models.metadata import model_settings
from npd.types import Failed, FinishReason, Rollout, SampleRequest

T = TypeVar("T")
# Interval between checks for a newer snapshot. A refresh is rare, and takes seconds.
_LOOK_SECONDS = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingContext:
    """The run's side of a served generator.

    `log` is the log file of a launched server, `context` the longest sample in tokens. `newest`
    returns the newest published snapshot; it is not called if `in_flight` is `finish`. `notify` is
    called with one line for each verified server and each failed refresh. `run` identifies the
    run's snapshots on the servers. `fingerprints` is the directory for their fingerprints.
    """

    log: Path
    context: int
    in_flight: InFlight = "finish"
    newest: Callable[[], tuple[Path, int] | None] = lambda: None
    notify: Callable[[str], None] = _log.info
    run: str = ""
    fingerprints: Path | None = None


class ServedGenerator:
    """A Generator on the servers of a config."""

    def __init__(
        self,
        config: GenerateConfig,
        context: ServingContext,
        *,
        stop_ids: Iterable[int],
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._config, self._context = config, context
        self._trust_remote_code = trust_remote_code
        self._pool = ServerPool(
            config.engine, config, log=context.log, refresh_timeout=config.refresh_timeout
        )
        self._weights = WeightSync(
            config,
            trust_remote_code=trust_remote_code,
            run=context.run,
            fingerprints=context.fingerprints,
            notify=context.notify,
        )
        self._stop_ids, self._vocab_size = tuple(sorted(stop_ids)), vocab_size
        # Rows of the model's embedding, including padding; 0 if its config does not say.
        self._model_vocabulary = 0
        self._is_student = config.source == "student"
        self._loop = LoopThread("servers")
        # Weights are changed, or checked, by one call at a time.
        self._updating = asyncio.Lock()
        self._inflight: InFlightRequests | None = None
        self._num_calls = 0

    @property
    def version(self) -> int | None:
        """The version on the servers; None before the first `load`."""
        return None if self._weights.served is None else self._weights.served.version

    def load(self, snapshot: Path, version: int) -> None:
        """Load `snapshot` into every server, and verify it.

        Raises:
            WrongWeights: a server does not serve the snapshot.
            ConfigError, RunError: a server cannot be started, reached or updated.
            WorkerLostError: our server exited or hangs.
        """
        self._run(self._load(snapshot, version))

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout | Failed]:
        """One rollout or failure per request, in the order of the requests.

        Other threads may call it too: all share the servers, and earlier calls go first.

        Raises:
            WorkerLostError: our server exited or hangs, or a server lost its weights.
            RunError: no server responds, or a refresh failed (see `load`).
        """
        return self._run(self._generate(requests)) if requests else []

    def release(self) -> None:
        """Stop our server; the next `load` launches another. Servers at `urls` stay as they are."""
        if self._pool.is_ours:
            self._run(self._pool.close())
            self._weights.served = None

    def close(self) -> None:
        """Stop our server, or disconnect from the servers at `urls`."""
        self._loop.close(self._pool.close())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    async def _load(self, path: Path, version: int) -> None:
        async with self._updating:
            served = self._weights.served
            is_newer = served is not None and served.version > version
            if self._context.in_flight != "finish" and is_newer:
                return  # a refresh of another call preceded this one
            if served is None or (served.path, served.version) != (path, version):
                await self._update(await self._prepare(path, version))

    async def _prepare(self, path: Path, version: int) -> ServedSnapshot:
        return await self._weights.prepare(path, version, is_policy=self._is_student)

    async def _update(self, new: ServedSnapshot) -> None:
        """Load `new` into every server; launches our server, and restarts it if a reload fails."""
        pool, is_first = self._pool, not self._pool.is_open
        if is_first:
            await pool.open(
                self._spec(new.path),
                connections=self._config.at_once,
                admin_urls=self._config.admin_urls,
            )
        try:
            await self._weights.update(pool.admins, new, is_loaded=is_first and pool.is_ours)
        except (WrongWeights, Unavailable) as error:
            if isinstance(error, Unavailable):
                pool.check(error)
            if is_first or not pool.is_ours:
                raise
            await self._restart(new, error)
        for server in pool.servers:
            await check_untempered(server, new, self._sampling(), self._config.probe_tolerance)

    async def _restart(self, new: ServedSnapshot, error: Exception) -> None:
        """Restart our server with `new` as its model, which needs no reload."""
        self._context.notify(f"refresh failed, the server is restarted: {error}")
        await self._pool.reopen(self._spec(new.path), connections=self._config.at_once)
        await self._weights.update(self._pool.admins, new, is_loaded=True)

    def _spec(self, path: Path) -> ServerSpec:
        self._model_vocabulary = model_settings(path).vocabulary
        return generator_spec(self._config, path, self._context.context, self._trust_remote_code)

    async def _generate(self, requests: Sequence[SampleRequest]) -> list[Rollout | Failed]:
        await self._check_weights()
        with self._shared_requests() as inflight:
            work = self._pool.run_jobs(requests, inflight.write, at_once=self._config.at_once)
            found = await _alongside(work, partial(self._refresh, inflight))
        await self._check_weights()
        return [
            result if isinstance(result, Rollout) else Failed(request.sample_id, str(result))
            for request, result in zip(requests, found, strict=True)
        ]

    @contextmanager
    def _shared_requests(self) -> Iterator[InFlightRequests]:
        """The requests of all calls that run, because a refresh interrupts all of them."""
        if self._inflight is None:
            self._inflight = InFlightRequests(
                self._weights,
                self._sampling(),
                self._context.in_flight,
                with_logprobs=self._is_student,
                is_seeded=self._config.seeded,
            )
        self._num_calls += 1
        try:
            yield self._inflight
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._inflight = None

    async def _check_weights(self) -> None:
        """Raise WorkerLostError if a server lost its snapshot, or if our server has exited."""
        async with self._updating:
            served = self._weights.served
            assert served is not None, "generate() needs a snapshot: call load() first"
            for error in await self._weights.check(self._pool.admins):
                self._pool.check(error)  # other unavailable servers are the scheduler's concern

    async def _refresh(self, inflight: InFlightRequests, end: asyncio.Event) -> None:
        """Load each newer snapshot as soon as it is published, until `end` is set."""
        if self._context.in_flight == "finish" or not self._is_student:
            return
        while not await _is_set(end, _LOOK_SECONDS):
            async with self._updating:  # other calls look too: one of them does it
                newest = self._context.newest()
                if newest is not None and newest[1] > (self.version or 0):
                    await self._interrupt(inflight, await self._prepare(*newest))

    async def _interrupt(self, inflight: InFlightRequests, new: ServedSnapshot) -> None:
        """Load `new` between two tokens of the responses in flight."""
        try:
            await inflight.interrupt(self._pool.admins)
            await self._update(new)
        except Unavailable as error:
            self._pool.check(error)
            raise
        finally:
            await self._pool.resume()  # in case `interrupt` failed on some servers
        inflight.resume()

    def _sampling(self) -> SamplingSettings:
        config, known = self._config, self._vocab_size
        padding = range(known, self._model_vocabulary) if known else range(0)
        return SamplingSettings(
            config.max_new_tokens,
            self._stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            banned_ids=tuple(padding),
        )


async def _alongside(
    work: Coroutine[Any, Any, T], background: Callable[[asyncio.Event], Coroutine[Any, Any, None]]
) -> T:
    """Run `work` and `background` together; returns the result of `work`.

    When `work` ends, the event passed to `background` is set and its current step completes. An
    error of either cancels the other.
    """
    end = asyncio.Event()
    main, other = asyncio.create_task(work), asyncio.create_task(background(end))
    try:
        await asyncio.wait([main, other], return_when=asyncio.FIRST_COMPLETED)
        if other.done():
            other.result()
        result = await main
        end.set()
        await other
        return result
    finally:
        for task in (main, other):
            task.cancel()
        await asyncio.gather(main, other, return_exceptions=True)


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait up to `seconds` for an event; whether it is set."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


# Responses that a refresh interrupts.

InFlight: TypeAlias = Literal["finish", "mix"]
# More interruptions of one response than refreshes cause; another program must pause the server.
_MAX_INTERRUPTIONS = 64
_POLL_SECONDS = 0.1
_NOT_FOUND = 404


@dataclass(slots=True)
class _Draft:
    """A partial response: its pieces, each with its policy version."""

    pieces: list[tuple[Completion, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.ids) for piece, _ in self.pieces)

    def ids(self) -> list[int]:
        return [int(token) for piece, _ in self.pieces for token in piece.ids]


class InFlightRequests:
    """The requests of `generate` calls that run together, which refreshes may interrupt.

    Promises: each token carries the version of the weights that sampled it. An interrupted response
    continues from its tokens so far (`mix`), or restarts if another program interrupted it
    (`finish`). With `is_seeded` each request has a seed, another one for later tokens. No request
    is sent between `interrupt` and `resume`.
    """

    def __init__(
        self,
        weights: WeightSync,
        sampling: SamplingSettings,
        in_flight: InFlight,
        *,
        with_logprobs: bool,
        is_seeded: bool,
    ) -> None:
        self._weights, self._sampling, self._in_flight = weights, sampling, in_flight
        self._with_logprobs, self._is_seeded = with_logprobs, is_seeded
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._num_sent = 0

    async def write(self, server: EngineServer, request: SampleRequest) -> Rollout:
        """Generate the rollout of `request` on `server`. Raises Refused or Unavailable."""
        draft = _Draft()
        for _ in range(_MAX_INTERRUPTIONS):
            piece, version = await self._send(server, request, draft)
            if piece.ending == "abort" and self._in_flight != "mix":
                draft = _Draft()
                continue
            if len(piece.ids):
                draft.pieces.append((piece, version))
            is_full = draft.num_tokens >= self._sampling.max_new_tokens
            if piece.ending != "abort" or is_full:
                return self._rollout(request, draft, is_stopped=piece.ending == "stop")
        raise Unavailable(server.name, "keeps aborting responses: does another run pause it?")

    async def interrupt(self, servers: Sequence[EngineServer]) -> None:
        """Hold back new requests and abort the running ones; returns when all have ended."""
        self._may_send.clear()
        while True:
            # Repeated, because a request in transit may arrive after the first pause.
            pauses = (server.pause(drain=False) for server in servers)
            # All end before an error is raised: none must come after the servers are resumed.
            for error in await asyncio.gather(*pauses, return_exceptions=True):
                if error is not None:
                    raise error
            if self._num_sent == 0:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def resume(self) -> None:
        """Send requests again after `interrupt`."""
        self._may_send.set()

    async def _send(
        self, server: EngineServer, request: SampleRequest, draft: _Draft
    ) -> tuple[Completion, int]:
        """Request the remaining tokens of a draft; returns the new piece and its version."""
        await self._may_send.wait()
        served = self._weights.served
        assert served is not None, "requests were resumed without a snapshot on the servers"
        done = draft.num_tokens
        sampling = replace(self._sampling, max_new_tokens=self._sampling.max_new_tokens - done)
        prompt = [*request.prompt.prompt_ids.tolist(), *draft.ids()]
        # A new seed after each interruption, because the same one would repeat random numbers.
        drawn_by = (request.seed + 0x9E3779B97F4A7C15 * done) % 2**63
        seed = drawn_by if self._is_seeded else None
        self._num_sent += 1
        try:
            piece = await server.complete(prompt, sampling, seed=seed, model=served.adapter)
        except Refused as error:
            if error.status == _NOT_FOUND and served.adapter is not None:
                raise WorkerLostError(
                    f"{server.name} no longer has the adapter {served.adapter}: it was restarted, "
                    "so its requests are sent again"
                ) from error
            raise
        finally:
            self._num_sent -= 1
        if not len(piece.ids) and piece.ending != "abort":
            raise Unavailable(server.name, "returns a response without tokens")
        return piece, served.version

    def _rollout(self, request: SampleRequest, draft: _Draft, *, is_stopped: bool) -> Rollout:
        versions = np.concatenate(
            [np.full(len(piece.ids), version, np.int32) for piece, version in draft.pieces]
        )
        logprobs = np.concatenate([piece.logprobs for piece, _ in draft.pieces])
        oldest = int(versions.min())
        return Rollout(
            sample_id=request.sample_id,
            prompt_index=request.prompt.index,
            version=oldest,
            prompt_ids=request.prompt.prompt_ids,
            header_ids=request.prompt.header_ids,
            response_ids=np.concatenate([piece.ids for piece, _ in draft.pieces]),
            logprobs=logprobs if self._with_logprobs else None,
            finish=FinishReason.STOP if is_stopped else FinishReason.LENGTH,
            seed=request.seed,
            teacher=request.prompt.teacher,
            versions=versions if versions.max() > oldest else None,
        )

"""Generation by servers: asks spread over them, snapshots loaded in place, and each load proven.

Promises: a rollout carries the version that really wrote it, token by token where a refresh fell in
its middle; none comes of a server whose weights were not proven, or that was given other weights
since. One ask of many that a server refuses fails alone. Does not tokenise or score.

Waits for: the servers, and (`in_flight` abort or mix) a newer snapshot. Unblocked by: answers,
their time limits, the run's LATEST pointer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from npd.config import GenerateConfig
from npd.generate.held import Held
from npd.generate.holding import Holding
from npd.generate.writing import InFlight, Writing
from npd.servers.base import SamplingSettings
from npd.servers.pool import ServerPool
from npd.types import Ask, Failed, Rollout

T = TypeVar("T")
# How often a generator looks for a newer snapshot: a refresh is rare, and takes seconds.
_LOOK_SECONDS = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a served generator is told of its run.

    `log` is its server's log file, `context` the longest sample in tokens. `newest` gives the
    newest published snapshot; it is asked for unless `in_flight` is `finish`. `tell` takes what a
    person should hear: each refresh with its proof, and what was done about a failed one. `run`
    marks what is loaded as this run's, `probes` is where the probes of its snapshots are kept.
    """

    log: Path
    context: int
    in_flight: InFlight = "finish"
    newest: Callable[[], tuple[Path, int] | None] = lambda: None
    tell: Callable[[str], None] = _log.info
    run: str = ""
    probes: Path | None = None


class ServedGenerator:
    """Writes by the servers of a config; `version` is the one they hold."""

    def __init__(
        self,
        config: GenerateConfig,
        surroundings: Surroundings,
        *,
        stop_ids: Iterable[int],
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._config, self._around = config, surroundings
        self._pool = ServerPool(
            config.engine, config, log=surroundings.log, refresh_timeout=config.refresh_timeout
        )
        self._holding = Holding(
            config,
            context=surroundings.context,
            trust_remote_code=trust_remote_code,
            run=surroundings.run,
            past=surroundings.probes,
            tell=surroundings.tell,
        )
        self._stop_ids, self._vocab_size = tuple(sorted(stop_ids)), vocab_size
        self._is_student = config.source == "student"
        self._runner = asyncio.Runner()

    @property
    def version(self) -> int | None:
        """The version the servers hold; None before the first load."""
        return None if self._holding.held is None else self._holding.held.version

    def load(self, snapshot: Path, version: int) -> None:
        """Have every server hold `snapshot`, and prove it.

        Raises:
            StaleWeights: a server does not hold it.
            ConfigError, RunError: a server cannot be started, reached, or given weights.
            WorkerLostError: our server ended or hangs.
        """
        self._run(self._load(snapshot, version))

    def generate(self, asks: Sequence[Ask]) -> list[Rollout | Failed]:
        """One rollout, or the reason why there is none, per ask, in the order of the asks.

        Raises:
            WorkerLostError: our server ended or hangs, or one no longer holds what it was given.
            RunError: no server answers; or, in a refresh, as `load`.
        """
        assert self._holding.held is not None, "generate() needs a snapshot: call load() first"
        return self._run(self._generate(asks)) if asks else []

    def close(self) -> None:
        """End our server, let go of others."""
        self._run(self._pool.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _load(self, snapshot: Path, version: int) -> None:
        held = self._holding.held
        if held is not None and (held.snapshot, held.version) == (snapshot, version):
            return
        await self._hand_over(await self._describe(snapshot, version))

    async def _describe(self, snapshot: Path, version: int) -> Held:
        return await self._holding.describe(snapshot, version, is_policy=self._is_student)

    async def _hand_over(self, new: Held) -> None:
        for name, found in (await self._holding.load(self._pool, new)).items():
            if found is not None:
                self._around.tell(f"{name} holds snapshot v{new.version}: {found}")
        await self._holding.check_untempered(self._pool, self._sampling())

    async def _generate(self, asks: Sequence[Ask]) -> list[Rollout | Failed]:
        await self._holding.check(self._pool)
        writing = Writing(self._holding, self._sampling(), self._around.in_flight, self._is_student)
        asked = self._pool.ask(asks, writing.write, at_once=self._config.batch_size)
        found = await _while(asked, partial(self._refresh, writing))
        await self._holding.check(self._pool)
        return [
            result if isinstance(result, Rollout) else Failed(ask.sample_id, str(result))
            for ask, result in zip(asks, found, strict=True)
        ]

    async def _refresh(self, writing: Writing, end: asyncio.Event) -> None:
        """Load a newer snapshot as soon as there is one, until `end`."""
        if self._around.in_flight == "finish" or not self._is_student:
            return
        while not await _is_set(end, _LOOK_SECONDS):
            newest = self._around.newest()
            if newest is not None and newest[1] > (self.version or 0):
                new = await self._describe(*newest)  # before anybody has to wait
                try:
                    await writing.closed(self._pool.admins)
                    await self._hand_over(new)
                finally:
                    await self._pool.release()  # where only a part of them came to be paused
                writing.open()

    def _sampling(self) -> SamplingSettings:
        config, known = self._config, self._vocab_size
        padding = range(known, self._holding.model_vocabulary) if known else range(0)
        return SamplingSettings(
            config.max_new_tokens,
            self._stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            banned_ids=tuple(padding),
        )


async def _while(
    work: Coroutine[Any, Any, T], beside: Callable[[asyncio.Event], Coroutine[Any, Any, None]]
) -> T:
    """The result of `work`, with `beside` running until its event is set; it may end what it is at.

    An error of either ends both.
    """
    end = asyncio.Event()
    main, other = asyncio.create_task(work), asyncio.create_task(beside(end))
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
    """Whether an event is set, after so long at most."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()

"""What the servers of a generator hold, and how that is changed: load, prove, and look again.

Promises: after `load` every server has shown that it holds the snapshot, or an error names the one
that does not; `check_tags` finds servers that were restarted or given other weights since. A server
is never left paused.

How a snapshot reaches a server: as the model it is started with (ours, the first time), in place
(`load_weights`), or, where the snapshot is an adapter, as another adapter beside the base model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from npd import probe
from npd.config import GenerateConfig
from npd.errors import RunError, WorkerLostError
from npd.probe import Probe
from npd.servers import EngineServer, Refused, Unavailable
from npd.servers.checksums import Checksums
from npd.servers.launch import ServerSpec
from npd.servers.models import ADAPTER, model_settings, read_settings
from npd.servers.pool import ServerPool
from npd.servers.proof import Evidence, StaleWeights, judge, read_probe
from npd.store.snapshots import MANIFEST


@dataclass(frozen=True, slots=True)
class Held:
    """A snapshot on the servers: the tag they report for it, the name its adapter goes by.

    `readings` is what each server said of the probe's texts when it was proven.
    """

    snapshot: Path
    version: int
    tag: str
    adapter: str | None
    probe: Probe | None
    readings: dict[str, Probe] = field(default_factory=dict)


class Holding:
    """The snapshot the servers of a pool hold."""

    def __init__(
        self,
        config: GenerateConfig,
        context: int,
        trust_remote_code: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._context, self._tell = config, context, tell
        self._trust_remote_code = trust_remote_code
        self._checksums: dict[str, Checksums] = {}
        self.held: Held | None = None
        self.model_vocabulary = 0
        """Ids the model's embedding has, padding included; 0 where its config does not tell."""

    async def describe(self, snapshot: Path, version: int, *, is_policy: bool) -> Held:
        """What `load` takes: the snapshot with its probe, measured where it has none yet.

        `is_policy`: the student, whose weights change; a teacher is served as it is, unproven.
        """
        tag = f"npd-v{version}-{_checksum(snapshot)}"
        adapter = tag if (snapshot / ADAPTER).exists() else None
        found = None
        if is_policy:
            # In a thread: it takes seconds, and responses are being read meanwhile.
            measure = partial(probe.of_directory, snapshot, self._trust_remote_code)
            found = await asyncio.to_thread(measure)
        return Held(snapshot, version, tag, adapter, found)

    async def load(self, pool: ServerPool, new: Held) -> dict[str, Evidence | None]:
        """Have all servers hold the snapshot of `new`; what proves it, by server.

        Raises:
            StaleWeights: a server does not hold it.
            ConfigError, RunError: a server cannot be started, reached, or given weights.
        """
        old, self.held = self.held, None  # a load that fails half way leaves nothing to use
        is_fresh = not pool.is_open
        if is_fresh:
            await self._open(pool, new.snapshot)
        try:
            evidence = await self._hand_over(pool, new, old, is_fresh=is_fresh)
        except (StaleWeights, Unavailable) as error:
            if isinstance(error, Unavailable):
                pool.check(error)
            if is_fresh or not pool.is_ours:
                raise
            # Ours can be begun again from nothing, which no forgetful reload survives.
            self._tell(f"refresh failed, the server is started anew: {error}")
            await pool.close()
            await self._open(pool, new.snapshot)
            evidence = await self._hand_over(pool, new, None, is_fresh=True)
        self.held = new
        return evidence

    async def check_tags(self, pool: ServerPool) -> None:
        """Raise WorkerLostError where a server no longer reports what it was last given."""
        assert self.held is not None
        tags = await asyncio.gather(*(self._tag(pool, admin) for admin in pool.admins))
        for admin, tag in zip(pool.admins, tags, strict=True):
            if tag is not None and tag != self.held.tag:
                raise WorkerLostError(
                    f"{admin.name} reports weights {tag!r} where it was given {self.held.tag!r}: "
                    "it was restarted, or another run uses it; what it wrote since is asked again"
                )

    async def _tag(self, pool: ServerPool, admin: EngineServer) -> str | None:
        try:
            return await admin.tag()
        except Unavailable as error:
            pool.check(error)
            return None  # whether it can be waited for is for the requests to find out

    async def _open(self, pool: ServerPool, snapshot: Path) -> None:
        settings = model_settings(snapshot)
        context = max(self._context, probe.MAX_TOKENS + 1)  # it must read the probe too
        self._checksums.clear()
        await pool.open(
            ServerSpec(
                model=str(settings.base),
                dtype=self._config.dtype,
                context=min(context, settings.context or context),
                lora_rank=settings.lora_rank,
                trust_remote_code=self._trust_remote_code,
            ),
            connections=self._config.batch_size,
            admin_urls=self._config.admin_urls,
        )
        self.model_vocabulary = settings.vocabulary

    async def _hand_over(
        self, pool: ServerPool, new: Held, old: Held | None, *, is_fresh: bool
    ) -> dict[str, Evidence | None]:
        has_it = is_fresh and pool.is_ours and new.adapter is None
        giving = [self._give(admin, new, old, has_it=has_it) for admin in pool.admins]
        # All to their end before one error is raised: none may be left paused.
        found = dict(
            zip(pool.admins, await asyncio.gather(*giving, return_exceptions=True), strict=True)
        )
        for item in found.values():
            if isinstance(item, BaseException):
                raise item
        return {
            admin.name: item for admin, item in found.items() if not isinstance(item, BaseException)
        }

    async def _give(
        self, admin: EngineServer, new: Held, old: Held | None, *, has_it: bool
    ) -> Evidence | None:
        """Give one server the snapshot `new`, unless it has it, and prove it."""
        if new.adapter is not None:
            await self._give_adapter(admin, new, old)
        elif has_it or new.probe is None:
            await admin.set_tag(new.tag)
        elif not (old is None and new.version == 0 and not (await admin.facts()).can_refresh):
            # A server that cannot be refreshed may still hold the first snapshot: the student.
            await self._give_weights(admin, new)
        return None if new.probe is None else await self._prove(admin, new, old)

    async def _give_weights(self, admin: EngineServer, new: Held) -> None:
        try:
            await admin.hold(drain=True)
            await admin.load_weights(new.snapshot, new.tag)
        except Refused as error:
            raise RunError(
                f"{admin.name} could not load {new.snapshot}: {error.cause}. The run directory "
                "must be at the same path on its machine"
            ) from error
        except Unavailable as error:
            raise Unavailable(
                admin.name,
                f"could not load {new.snapshot} ({error}): the run directory must be at the same "
                "path on its machine, and the snapshot fit the served model",
                timed_out=error.timed_out,
            ) from error
        finally:
            with suppress(Refused, Unavailable):
                await admin.release()

    async def _give_adapter(self, admin: EngineServer, new: Held, old: Held | None) -> None:
        assert new.adapter is not None
        await admin.load_adapter(new.snapshot.resolve(), new.adapter)
        await admin.set_tag(new.tag)
        with suppress(Unavailable):  # held back by an in-flight refresh, or not at all
            await admin.release()
        if old is not None and old.adapter is not None and old.adapter != new.adapter:
            await admin.unload_adapter(old.adapter)

    async def _prove(self, admin: EngineServer, new: Held, old: Held | None) -> Evidence:
        assert new.probe is not None
        what = f"snapshot v{new.version}"
        found = await read_probe(admin, new.probe, model=new.adapter)
        evidence = judge(
            admin.name,
            what,
            found,
            new.probe,
            old.probe if old is not None else None,
            self._config.probe_tolerance,
            old.readings.get(admin.name) if old is not None else None,
        )
        new.readings[admin.name] = found
        if new.adapter is not None:
            return evidence
        sums = self._checksums.setdefault(admin.name, Checksums())
        same = sums.check(admin.name, what, await admin.checksums(), new.snapshot)
        return Evidence(evidence.difference, evidence.staleness, evidence.error, same)


def _checksum(snapshot: Path) -> str:
    """The published checksum, short; of a plain model directory there is none."""
    return str(read_settings(snapshot / MANIFEST).get("checksum", "plain"))[:12]

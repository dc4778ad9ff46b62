"""What the servers of a generator hold, and how that is changed: load, prove, and look again.

Promises: after `load` every server has shown that it holds the snapshot, or an error names the one
that does not; `check` finds servers that were restarted or given other weights since. A server is
never left paused.

How a snapshot reaches a server: as the model it is started with (ours, the first time), in place
(`load_weights`), or, where the snapshot is an adapter, as another adapter beside the base model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from npd.config import GenerateConfig
from npd.errors import ConfigError, WorkerLostError
from npd.generate import giving
from npd.generate.held import Held
from npd.generate.proving import Proving
from npd.probe import Probe
from npd.servers import EngineServer, Refused, Unavailable
from npd.servers.base import SamplingSettings
from npd.servers.commands import ServerSpec, generator_spec
from npd.servers.models import ADAPTER, model_settings, read_settings
from npd.servers.pool import ServerPool
from npd.servers.proof import Evidence, StaleWeights, read_probe
from npd.store.snapshots import MANIFEST


class Holding:
    """The snapshot the servers of a pool hold; `run` marks what is loaded as this run's."""

    def __init__(
        self,
        config: GenerateConfig,
        *,
        context: int,
        trust_remote_code: bool,
        run: str,
        past: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._context, self._tell = config, context, tell
        self._trust_remote_code = trust_remote_code
        self._prefix = f"npd-{run}-v" if run else "npd-v"
        self._proving = Proving(config.probe_tolerance, past)
        self.held: Held | None = None
        self.model_vocabulary = 0
        """Ids the model's embedding has, padding included; 0 where its config does not tell."""

    async def describe(self, snapshot: Path, version: int, *, is_policy: bool) -> Held:
        """What `load` takes: the snapshot with its probe, measured where it has none yet.

        `is_policy`: the student, whose weights change; a teacher is served as it is, unproven.
        """
        tag = f"{self._prefix}{version}-{_checksum(snapshot)}"
        adapter = tag if (snapshot / ADAPTER).exists() else None
        found = None
        if is_policy:
            found = await self._proving.measure(snapshot, version, self._trust_remote_code)
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
            await pool.open(
                self._spec(new.snapshot),
                connections=self._config.batch_size,
                admin_urls=self._config.admin_urls,
            )
        try:
            evidence = await self._hand_over(pool, new, old, is_fresh=is_fresh)
        except (StaleWeights, Unavailable) as error:
            if isinstance(error, Unavailable):
                pool.check(error)
            if is_fresh or not pool.is_ours:
                raise
            # Ours can be begun again from nothing, which no forgetful reload survives.
            self._tell(f"refresh failed, the server is started anew: {error}")
            self._proving.forget_servers()
            await pool.reopen(self._spec(new.snapshot), connections=self._config.batch_size)
            evidence = await self._hand_over(pool, new, None, is_fresh=True)
        self.held = new
        return evidence

    async def check_untempered(self, pool: ServerPool, sampling: SamplingSettings) -> None:
        """Raise ConfigError where a server tells other log-probs than the model's own."""
        assert self.held is not None
        for server in pool.servers:
            await self._proving.check_untempered(server, self.held, sampling)

    async def check(self, pool: ServerPool) -> None:
        """Raise WorkerLostError where a server no longer holds what it was given."""
        assert self.held is not None
        await asyncio.gather(*(self._check(pool, admin, self.held) for admin in pool.admins))

    async def _check(self, pool: ServerPool, admin: EngineServer, held: Held) -> None:
        """By the tag it reports; one that reports none reads the probe's texts again."""
        try:
            tag = await admin.tag()
            if tag is None:
                await self._proving.look_again(admin, held)
            elif tag != held.tag:
                raise WorkerLostError(
                    f"{admin.name} reports weights {tag!r} where it was given {held.tag!r}: it was "
                    "restarted, or another run uses it; what it wrote since is asked again"
                )
        except Unavailable as error:
            pool.check(error)  # whether it can be waited for is for the requests to find out
        except (Refused, StaleWeights) as error:
            raise WorkerLostError(
                f"{error}; it was restarted, or another run uses it, and what it wrote since is "
                "asked again"
            ) from error

    def _spec(self, snapshot: Path) -> ServerSpec:
        self.model_vocabulary = model_settings(snapshot).vocabulary
        return generator_spec(self._config, snapshot, self._context, self._trust_remote_code)

    async def _hand_over(
        self, pool: ServerPool, new: Held, old: Held | None, *, is_fresh: bool
    ) -> dict[str, Evidence | None]:
        has_it = is_fresh and pool.is_ours and new.adapter is None
        patience = 0.0 if pool.is_ours else self._config.patience
        tasks = [
            self._give(admin, new, old, has_it=has_it, patience=patience) for admin in pool.admins
        ]
        # All to their end before one error is raised: none may be left paused.
        found = dict(
            zip(pool.admins, await asyncio.gather(*tasks, return_exceptions=True), strict=True)
        )
        for item in found.values():
            if isinstance(item, BaseException):
                raise item
        return {
            admin.name: item for admin, item in found.items() if not isinstance(item, BaseException)
        }

    async def _give(
        self, admin: EngineServer, new: Held, old: Held | None, *, has_it: bool, patience: float
    ) -> Evidence | None:
        """Give one server the snapshot `new`, unless it has it, and prove it; then it is tagged."""
        await giving.until_well(admin, patience)
        before = evidence = None
        if new.adapter is not None:
            await self._give_adapter(admin, new)
        elif not has_it and new.probe is not None and await giving.takes(admin, new):
            before = await self._read_before(admin, new, old)
            await giving.give_weights(admin, new)
        if new.probe is not None:
            evidence = await self._proving.show(admin, new, before)
        # Not before: a tag says what was shown, also to those who come after a failure.
        await admin.set_tag(new.tag)
        return evidence

    async def _read_before(self, admin: EngineServer, new: Held, old: Held | None) -> Probe | None:
        """What a server says of the probe while it holds another snapshot of this run, for sure."""
        if old is not None and old.adapter is None:
            return old.readings.get(admin.name)
        tag = await admin.tag()
        is_other = tag is not None and tag.startswith(self._prefix) and tag != new.tag
        if new.probe is None or not is_other:
            return None
        return await read_probe(admin, new.probe)

    async def _give_adapter(self, admin: EngineServer, new: Held) -> None:
        assert new.adapter is not None
        await admin.load_adapter(new.snapshot.resolve(), new.adapter)
        with suppress(Unavailable, Refused, ConfigError):
            await admin.release()  # only an in-flight refresh has held it back, if it can at all
        for name in (await admin.facts()).models:
            if name.startswith(self._prefix) and name != new.adapter:
                await admin.unload_adapter(name)


def _checksum(snapshot: Path) -> str:
    """The published checksum, short; of a plain model directory there is none."""
    return str(read_settings(snapshot / MANIFEST).get("checksum", "plain"))[:12]

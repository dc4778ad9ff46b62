"""Weight sync: loads the weights of a snapshot into servers, and verifies them.

One update of one server:

    wait until healthy -> load (drain, load in place, resume) -> verify -> tag

A LoRA snapshot is loaded as an adapter beside the base model instead. Promises: after `update`
every server serves the snapshot, verified, or an error names the server that does not. `check`
detects servers that were restarted or got other weights since. No server stays paused. Does not
start or stop servers (`pool` does).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from npd.config import GenerateConfig
from npd.engines import EngineServer, Refused, Unavailable
from npd.engines.verify_weights import (
    ServedSnapshot,
    Verification,
    WeightVerifier,
    WrongWeights,
    read_fingerprint,
)
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.models.fingerprint import Fingerprint
from npd.models.metadata import ADAPTER, read_settings
from npd.store.snapshots import MANIFEST

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


class WeightSync:
    """Updates and checks the weights of the servers of one generator.

    `run` identifies the snapshots of this run on the servers. `fingerprints` is the directory for
    their fingerprints. `notify` is called with one line for each verified server.
    """

    def __init__(
        self,
        config: GenerateConfig,
        *,
        trust_remote_code: bool,
        run: str,
        fingerprints: Path | None,
        notify: Callable[[str], None],
    ) -> None:
        # Only servers at `urls` need patience; a server that npd launched is ready already.
        self._patience = 0.0 if config.launch is not None else config.patience
        self._trust_remote_code = trust_remote_code
        self._prefix = f"npd-{run}-v" if run else "npd-v"
        self._verifier = WeightVerifier(config.probe_tolerance, fingerprints)
        self._notify = notify
        self._verified: dict[str, Verification] = {}
        self.served: ServedSnapshot | None = None
        """The snapshot on all servers; None before the first update and after a failed one."""

    async def prepare(self, path: Path, version: int, *, is_policy: bool) -> ServedSnapshot:
        """The snapshot at `path`, ready for `update`.

        With `is_policy` (the student) its fingerprint is computed. A teacher is not verified,
        because its weights never change.
        """
        tag = f"{self._prefix}{version}-{_checksum(path)}"
        adapter = tag if (path / ADAPTER).exists() else None
        found = None
        if is_policy:
            found = await self._verifier.measure(path, version, self._trust_remote_code)
        return ServedSnapshot(path, version, tag, adapter, found)

    async def update(
        self, servers: Sequence[EngineServer], snapshot: ServedSnapshot, *, is_loaded: bool = False
    ) -> dict[str, Verification]:
        """Load `snapshot` into every server; returns the verifications by server name.

        With `is_loaded` the servers were started with the snapshot as their model, so it is only
        verified.

        Raises:
            WrongWeights: a server does not serve the snapshot.
            Unavailable: a server does not respond.
            ConfigError, RunError: a server cannot be reached, or does not support weight updates.
        """
        is_other = self.served is not None and self.served.tag != snapshot.tag
        known = self._verified if is_other else {}
        self.served, self._verified = None, {}  # until the update succeeds
        updates = [
            self._update_server(server, snapshot, known.get(server.name), is_loaded=is_loaded)
            for server in servers
        ]
        # All updates finish before an error is raised, so that no server stays paused.
        results = await asyncio.gather(*updates, return_exceptions=True)
        found: dict[str, Verification] = {}
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                found[server.name] = result
        for name, verification in found.items():
            self._notify(f"{name} serves snapshot v{snapshot.version}: {verification}")
        self.served, self._verified = snapshot, found
        return found

    async def check(self, servers: Sequence[EngineServer]) -> list[Unavailable]:
        """Check that the servers still serve the snapshot.

        Returns the errors of servers that do not respond.

        Raises:
            WorkerLostError: a server serves something else.
        """
        assert self.served is not None
        found = await asyncio.gather(*(self._check_server(each, self.served) for each in servers))
        return [error for error in found if error is not None]

    async def _update_server(
        self,
        server: EngineServer,
        new: ServedSnapshot,
        known: Verification | None,
        *,
        is_loaded: bool,
    ) -> Verification | None:
        """Load `new` into one server and verify it.

        `known` is the server's verification for the previous snapshot.
        """
        await wait_until_healthy(server, self._patience)
        before = verification = None
        if new.adapter is not None:
            await self._load_adapter(server, new)
        elif not is_loaded and await _needs_load(server, new):
            before = known.reading if known else await self._read_before(server, new)
            await load_weights(server, new)
        if new.fingerprint is not None:
            verification = await self._verifier.verify(server, new, before)
        # Last, because the tag states, also to later workers, which snapshot was verified.
        await server.set_tag(new.tag)
        return verification

    async def _read_before(self, server: EngineServer, new: ServedSnapshot) -> Fingerprint | None:
        """The server's reading if it reports another snapshot of this run, else None."""
        tag = await server.tag()
        is_other = tag is not None and tag.startswith(self._prefix) and tag != new.tag
        if new.fingerprint is None or not is_other:
            return None
        return await read_fingerprint(server, new.fingerprint)

    async def _load_adapter(self, server: EngineServer, new: ServedSnapshot) -> None:
        """Load an adapter beside the base model, and unload older adapters of this run."""
        assert new.adapter is not None
        await server.load_adapter(new.path.resolve(), new.adapter)
        with suppress(Unavailable, Refused, ConfigError):
            await server.resume()  # an in-flight refresh has paused it
        for other in (await server.facts()).models:
            if other.startswith(self._prefix) and other != new.adapter:
                await server.unload_adapter(other)

    async def _check_server(
        self, server: EngineServer, served: ServedSnapshot
    ) -> Unavailable | None:
        """Check one server by its tag, or by its fingerprint if it has no tags."""
        try:
            tag = await server.tag()
            if tag is None and served.fingerprint is not None:
                await self._verifier.verify(server, served)
        except Unavailable as error:
            return error
        except (Refused, WrongWeights) as error:
            raise WorkerLostError(
                f"{error}; it was restarted, or another run uses it: its responses since then are "
                "discarded and requested again"
            ) from error
        if tag is not None and tag != served.tag:
            raise WorkerLostError(
                f"{server.name} reports weights {tag!r} instead of {served.tag!r}: it was "
                "restarted, or another run uses it; its responses since then are discarded and "
                "requested again"
            )
        return None


async def load_weights(server: EngineServer, new: ServedSnapshot) -> None:
    """Drain a server, load the weights of `new` in place, and resume, even after an error.

    Raises:
        RunError: the server refuses the weights.
        Unavailable: it does not respond.
        ConfigError: it does not support weight updates.
    """
    try:
        await server.pause(drain=True)
        await server.load_weights(new.path.resolve())
    except Refused as error:
        raise RunError(
            f"{server.name} could not load {new.path}: {error.cause}. The run directory must be "
            "at the same path on its machine"
        ) from error
    except Unavailable as error:
        raise Unavailable(
            server.name,
            f"could not load {new.path} ({error}): the run directory must be at the same path "
            "on its machine, and the snapshot must fit the served model",
            timed_out=error.timed_out,
        ) from error
    finally:
        with suppress(Refused, Unavailable, ConfigError):
            await server.resume()


async def wait_until_healthy(server: EngineServer, patience: float) -> None:
    """Wait, with growing pauses, until a server is healthy, at most `patience` seconds.

    Raises:
        RunError: it is not healthy in that time.
    """
    pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
    while patience and not await server.is_healthy():
        if time.monotonic() > deadline:
            raise RunError(
                f"{server.name} does not respond within {patience:g} s: start it, or correct "
                "generate.urls and generate.admin_urls"
            )
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _needs_load(server: EngineServer, new: ServedSnapshot) -> bool:
    """Whether to load `new` into a server.

    False for a teacher, and for version 0 on a server without weight updates: it already serves
    the initial student.
    """
    if new.fingerprint is None:
        return False
    return new.version != 0 or (await server.facts()).can_refresh


def _checksum(path: Path) -> str:
    """The first 12 digits of a snapshot's checksum; "plain" for an unpublished model directory."""
    return str(read_settings(path / MANIFEST).get("checksum", "plain"))[:12]

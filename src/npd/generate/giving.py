"""A snapshot's weights given to one server in place; it is never left paused."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from npd.errors import ConfigError, RunError
from npd.generate.held import Held
from npd.servers import EngineServer, Refused, Unavailable

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


async def takes(admin: EngineServer, new: Held) -> bool:
    """Whether to give a server its weights; one that cannot take any may hold the student as it
    came."""
    return new.version != 0 or (await admin.facts()).can_refresh


async def give_weights(admin: EngineServer, new: Held) -> None:
    try:
        await admin.hold(drain=True)
        await admin.load_weights(new.snapshot.resolve())
    except Refused as error:
        raise RunError(
            f"{admin.name} could not load {new.snapshot}: {error.cause}. The run directory must be "
            "at the same path on its machine"
        ) from error
    except Unavailable as error:
        raise Unavailable(
            admin.name,
            f"could not load {new.snapshot} ({error}): the run directory must be at the same path "
            "on its machine, and the snapshot fit the served model",
            timed_out=error.timed_out,
        ) from error
    finally:
        with suppress(Refused, Unavailable, ConfigError):
            await admin.release()


async def until_well(admin: EngineServer, patience: float) -> None:
    """Wait for a server that does not answer, with growing pauses, up to `patience` seconds.

    Raises:
        RunError: it does not come back.
    """
    pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
    while patience and not await admin.is_healthy():
        if time.monotonic() > deadline:
            raise RunError(
                f"{admin.name} does not answer within {patience:g} s: start it, or correct "
                "generate.urls and generate.admin_urls"
            )
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)

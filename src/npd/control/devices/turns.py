"""Which role's workers have their models on a device that all roles share.

Used with `runtime.share: phases`. Promises: a call begins only when no worker of another role is in
a call or has models on the device. Whose turn is next is not decided here: `Plan` orders the
actions, and calls outside the plan (held-out text, recovery, export) come one after another.

Consumes: calls. Waits for: the calls of another role, then its workers' release.
Unblocked by: their replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from npd.control.devices.placement import WorkerSet
from npd.runtime import Worker


class DeviceTurns:
    """The turns of generators, scorers and trainer. The trainer, which loads first, has the first.

    `workers` are those with models on the device; others call without a turn. `release` makes a
    worker free its models.
    """

    def __init__(self, workers: WorkerSet, release: Callable[[Worker], Awaitable[None]]) -> None:
        roles = (workers.generators, workers.scorers, (workers.trainer,))
        self._role = {worker.name: role for role in roles for worker in role}
        self._holder: tuple[Worker, ...] = roles[-1]
        self._release = release
        self._num_calls = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, worker: Worker) -> AsyncIterator[None]:
        """The device is the role's of `worker` within the block."""
        role = self._role.get(worker.name)
        if role is None:
            yield
            return
        async with self._changed:
            await self._changed.wait_for(lambda: self._holder is role or self._num_calls == 0)
            if self._holder is not role:
                released = map(self._release, self._holder)
                for error in await asyncio.gather(*released, return_exceptions=True):
                    if error is not None:
                        raise error
                self._holder = role
            self._num_calls += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_calls -= 1
                self._changed.notify_all()

"""Ranks of one model as one worker: every call goes to all, the first one's answer counts.

Promises: nobody waits for a rank that is gone. The others sit in a collective then, which ends for
them late, with an error of its own, or never; so the loss of one is the loss of the group, and
`restart` ends and replaces every rank. Each life of the group meets at a new place. Does not retry,
nor bring a trainer back to where it was; that is the dispatcher's. What a rank computes is its own
business; all it needs is a method `join(rank, meeting)`, which is called first in each life, and
`host()` where ranks are on several machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npd.errors import WorkerLostError
from npd.runtime import Reply, Worker
from npd.store import files

# Ranks that fail for the same reason say so within moments of each other, and the loss of a process
# is known after two seconds; a rank that is still silent then waits for the one that failed.
_GRACE_SECONDS = 10.0


class RankGroup:
    """`ranks` as one `Worker`.

    They meet at files beside the path `meeting`; without one, where the first of them hosts.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[Worker],
        meeting: Path | None,
        *,
        grace: float = _GRACE_SECONDS,
    ) -> None:
        self._name, self._ranks, self._beside, self._grace = name, tuple(ranks), meeting, grace
        self._meeting: str | None = None
        self._gone: str | None = None

    @property
    def name(self) -> str:
        """What people see of the whole group; the ranks have names of their own."""
        return self._name

    @property
    def pid(self) -> int | None:
        """None: it has several processes."""
        return None

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Reply:  # noqa: ASYNC109
        """Run the method on every rank at once; the first rank's reply. See `Worker.call`."""
        if self._gone is not None:
            raise WorkerLostError(self._gone)
        if self._meeting is None:
            self._meeting = await self._place(timeout)
            await self._on_all("join", lambda rank: (rank, self._meeting), timeout)
        return (await self._on_all(method, lambda _: args, timeout))[0]

    async def restart(self) -> None:
        """End all ranks, those too that wait for one that is gone, and start them afresh."""
        await asyncio.gather(*(rank.restart() for rank in self._ranks))
        self._forget_meeting()
        self._gone = None

    async def close(self) -> None:
        """End all ranks."""
        await asyncio.gather(*(rank.close() for rank in self._ranks))
        self._forget_meeting()

    async def _place(self, limit: float | None) -> str:
        if self._beside is not None:
            return str(files.temporary(self._beside))
        return str((await self._ranks[0].call("host", timeout=limit)).value)

    def _forget_meeting(self) -> None:
        if self._meeting is not None and self._beside is not None:
            files.remove(Path(self._meeting))
        self._meeting = None

    async def _on_all(
        self, method: str, args: Callable[[int], tuple[Any, ...]], limit: float | None
    ) -> list[Reply]:
        calls = [
            asyncio.ensure_future(worker.call(method, *args(rank), timeout=limit))
            for rank, worker in enumerate(self._ranks)
        ]
        for call in calls:
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        await _until_told(calls, self._grace)
        errors = [error for call in calls if call.done() and (error := call.exception())]
        lost = next((error for error in errors if isinstance(error, WorkerLostError)), None)
        if lost is not None or not all(call.done() for call in calls):
            self._gone = f"the ranks of {self._name} ended with one of them: {lost or errors[0]}"
        if errors:
            raise lost or errors[0]
        return [call.result() for call in calls]


async def _until_told(calls: Sequence[asyncio.Future[Reply]], grace: float) -> None:
    """Wait for all calls; less long where one has failed, and no longer where one was lost."""
    patience: float | None = None
    pending = set(calls)
    while pending:
        done, pending = await asyncio.wait(
            pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED
        )
        errors = [error for call in done if (error := call.exception())]
        if not done or any(isinstance(error, WorkerLostError) for error in errors):
            return
        patience = grace if errors else patience

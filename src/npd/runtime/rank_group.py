"""Several ranks that hold one model and act as one worker.

If one rank dies, the others may hang in a collective, so the whole group is restarted. Does not
retry calls (the dispatcher does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npd.errors import WorkerLostError
from npd.runtime.base import CallResult, Worker
from npd.store import files

# Ranks that fail for the same reason report it almost together, and a lost process is noticed after
# two seconds; a rank that is still silent after this time hangs in a collective.
_GRACE_SECONDS = 10.0


class RankGroup:
    """Several ranks as one `Worker`: every call goes to all ranks; the first rank's reply counts.

    After each start, `join(rank, rendezvous)` is called on every rank with a new rendezvous. The
    rendezvous is a temporary file named after `file`; if that is None, it is a port that the first
    rank opens (`open_rendezvous()`), for ranks on several machines.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[Worker],
        file: Path | None,
        *,
        grace: float = _GRACE_SECONDS,
    ) -> None:
        self._name, self._ranks, self._file, self._grace = name, tuple(ranks), file, grace
        self._rendezvous: str | None = None
        self._lost: str | None = None

    @property
    def name(self) -> str:
        """The name of the group; each rank has its own name too."""
        return self._name

    @property
    def pid(self) -> int | None:
        """None, because the group has several processes."""
        return None

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> CallResult:  # noqa: ASYNC109
        """Call the method on every rank; returns the first rank's reply. See `Worker.call`."""
        if self._lost is not None:
            raise WorkerLostError(self._lost)
        if self._rendezvous is None:
            self._rendezvous = await self._new_rendezvous(timeout)
            await self._on_all("join", lambda rank: (rank, self._rendezvous), timeout)
        return (await self._on_all(method, lambda _: args, timeout))[0]

    async def restart(self) -> None:
        """Restart all ranks, even if they hang in a collective."""
        await asyncio.gather(*(rank.restart() for rank in self._ranks))
        self._drop_rendezvous()
        self._lost = None

    async def close(self) -> None:
        """End all ranks."""
        await asyncio.gather(*(rank.close() for rank in self._ranks))
        self._drop_rendezvous()

    async def _new_rendezvous(self, limit: float | None) -> str:
        if self._file is not None:
            return str(files.temporary(self._file))
        return str((await self._ranks[0].call("open_rendezvous", timeout=limit)).value)

    def _drop_rendezvous(self) -> None:
        if self._rendezvous is not None and self._file is not None:
            files.remove(Path(self._rendezvous))
        self._rendezvous = None

    async def _on_all(
        self, method: str, args: Callable[[int], tuple[Any, ...]], limit: float | None
    ) -> list[CallResult]:
        calls = [
            asyncio.ensure_future(worker.call(method, *args(rank), timeout=limit))
            for rank, worker in enumerate(self._ranks)
        ]
        for call in calls:
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        await _until_settled(calls, self._grace)
        errors = [error for call in calls if call.done() and (error := call.exception())]
        lost = next((error for error in errors if isinstance(error, WorkerLostError)), None)
        if lost is not None or not all(call.done() for call in calls):
            self._lost = f"a rank of {self._name} was lost, so its group ended: {lost or errors[0]}"
        if errors:
            raise lost or errors[0]
        return [call.result() for call in calls]


async def _until_settled(calls: Sequence[asyncio.Future[CallResult]], grace: float) -> None:
    """Wait for all calls; after a failure at most `grace` seconds more, after a loss no longer."""
    timeout: float | None = None
    pending = set(calls)
    while pending:
        done, pending = await asyncio.wait(
            pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )
        errors = [error for call in done if (error := call.exception())]
        if not done or any(isinstance(error, WorkerLostError) for error in errors):
            return
        timeout = grace if errors else timeout

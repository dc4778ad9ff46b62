"""Workers as actors on a Ray cluster: one process each, wherever Ray finds room for it.

Promises those of `npd.runtime.base`. Ray starts an actor again when its process or its machine is
lost; the worker counts as lost all the same, until `restart` has met the actor's new life. Members
of a team share one placement group. Actors are not detached: they end with this process.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from npd.config import RayConfig
from npd.errors import RunError, WorkerLostError
from npd.runtime.base import NOTHING, Environment, Factory, Needs, Reply, SerialWorker
from npd.runtime.cluster import Cluster
from npd.runtime.local import THREAD_VARIABLES
from npd.runtime.seat import Life, Seat
from npd.runtime.wire import opened

# Time to close files and free a device after being asked to end; then it is killed.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05


class RayWorker(SerialWorker):
    """One object in one actor; `start` asks Ray for a new actor."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Any],
        log_file: Path,
        call_timeout: float,
        start_timeout: float,
        place: Callable[[], str],
    ) -> None:
        super().__init__(name, call_timeout)
        self._start, self._log_file, self._start_timeout = start, log_file, start_timeout
        self._place = place
        self._actor = start()
        self._met: Life | None = None
        self._former: Life | None = None
        self._is_alive, self._is_doubtful = True, False

    @property
    def pid(self) -> int | None:
        """Process id on its machine; None before the first call, and once it has ended."""
        return self._met.pid if self._met is not None and self._is_alive else None

    async def restart(self) -> None:
        """End what is left of the actor's life; its next one is met by the next call."""
        self._gone = f"worker {self.name} was restarted while it held a call: ask again"
        if self._is_doubtful:
            await self._make_sure()
        elif self._is_alive:
            self._kill(for_ever=False)
        await self._settle()
        self._former, self._met = self._met or self._former, None
        self._life += 1
        self._is_alive, self._gone = True, None

    async def close(self) -> None:
        """Let an idle object close itself; end the actor."""
        is_idle = not self._turn.locked() and self._met is not None and self._gone is None
        self._gone = self._closed
        if is_idle:
            with suppress(_errors().RayError, TimeoutError):
                await _within(_GRACE_SECONDS, self._actor.close.remote())
        self._kill(for_ever=True)
        with suppress(_errors().RayError, TimeoutError):  # until Ray knows that it is no more
            await _within(_GRACE_SECONDS, self._actor.life.remote())
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> Reply:
        life = self._met = self._met or await self._meet()
        request = self._actor.answer.remote(life.name, pickle.dumps((method, args)))
        try:
            reply = await _within(limit, request)
        except TimeoutError:
            raise self._overran(method, limit) from None
        except _errors().RayError as error:
            self._is_doubtful = not isinstance(error, _errors().ActorDiedError)
            raise self._died(f"while it held {method}()") from None
        if not reply:
            raise self._died("while it was idle")
        return opened(reply)

    async def _make_sure(self) -> None:
        """Out of reach is not dead: what Ray only lost sight of must not write on unseen."""
        self._is_doubtful = False
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                life = await _within(_GRACE_SECONDS, self._actor.life.remote())
            except _errors().ActorUnavailableError:
                await asyncio.sleep(_POLL_SECONDS)  # it is being started again
            except TimeoutError:
                break  # busy, with what it was lost over
            except _errors().RayError:
                return
            else:
                if life != self._met:
                    return
                break
        self._kill(for_ever=False)

    async def _meet(self) -> Life:
        """The actor's present life, once Ray has found it a place; not the one that was ended."""
        deadline = time.monotonic() + self._start_timeout
        while (left := deadline - time.monotonic()) > 0:
            if self._gone is not None:
                raise WorkerLostError(self._gone)
            try:
                life: Life = await _within(left, self._actor.life.remote())
            except _errors().ActorUnavailableError:
                await asyncio.sleep(_POLL_SECONDS)
            except TimeoutError:
                break
            except _errors().RayError as error:
                if self._gone is not None:
                    raise WorkerLostError(self._gone) from None
                self._actor = self._start()
                raise self._lose(
                    f"worker {self.name} could not be started by Ray: {_cause(error)}"
                ) from None
            else:
                if self._gone is not None:
                    raise WorkerLostError(self._gone)
                if life != self._former:
                    return life
                self._kill(for_ever=False)
                await asyncio.sleep(_POLL_SECONDS)
        raise RunError(
            f"worker {self.name} got no place in the Ray cluster within {self._start_timeout:g} s "
            f"({self._place()}): add machines, ask for less (runtime.ray.gpus, *.workers, "
            "train.ranks), or raise runtime.ray.start_timeout"
        )

    def _overran(self, method: str, limit: float) -> Exception:
        self._kill(for_ever=False)
        return self._lose(
            f"worker {self.name} ({self._met}) gave no answer to {method}() within {limit:g} s and "
            f"was killed: raise runtime.call_timeout, or see {self._log_file}"
        )

    def _died(self, when: str) -> Exception:
        self._is_alive = False
        return self._lose(
            self._gone
            or f"worker {self.name} ({self._met}) was ended {when}, killed or out of memory: see "
            f"{self._log_file}"
        )

    def _kill(self, *, for_ever: bool) -> None:
        self._is_alive = False
        with suppress(_errors().RayError, ValueError):
            _ray().kill(self._actor, no_restart=for_ever)


class RayRuntime:
    """Starts actors; what they print goes to `log_dir/<name>.log` where they see that folder."""

    def __init__(
        self, log_dir: Path, config: RayConfig | None = None, *, call_timeout: float = 3600.0
    ) -> None:
        self._config = config or RayConfig()
        self._log_dir, self._call_timeout = log_dir.absolute(), call_timeout
        self._cluster = Cluster(self._config)
        self._workers: dict[str, RayWorker] = {}
        self._teams: dict[str, Any] = {}
        self._joined: dict[str, int] = {}

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: Environment = None,
        needs: Needs = NOTHING,
    ) -> RayWorker:
        """Ask Ray for a worker; see `Runtime.spawn`. It has one CPU, so to speak: what is shared
        out among machines is GPUs and memory."""
        assert name not in self._workers, f"worker {name} exists"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_file = self._log_dir / f"{name}.log"
        resources = {"num_cpus": 1.0, "num_gpus": self._gpus(needs)}
        variables = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **(environment or {})}
        options = {
            **resources,
            "max_restarts": -1,
            "runtime_env": {"env_vars": variables},
            **self._place_in_team(needs, resources),
        }
        shipped = pickle.dumps(factory)

        def start() -> Any:
            seat = _ray().remote(Seat).options(**options)
            return seat.remote(name, shipped, str(log_file), os.getcwd())

        def place() -> str:
            gpus = f" and {resources['num_gpus']:g} GPU" if resources["num_gpus"] else ""
            return f"it asks for 1 CPU{gpus}; {self._room()}"

        timeouts = (self._call_timeout, self._config.start_timeout)
        worker = RayWorker(name, start, log_file, *timeouts, place)
        self._workers[name] = worker
        return worker

    async def close(self) -> None:
        """End every worker, and leave the cluster or end it, if it is ours."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))
        for group in self._teams.values():
            with suppress(_errors().RayError):
                _ray().util.remove_placement_group(group)
        self._teams.clear()
        await asyncio.to_thread(self._cluster.leave)

    def _gpus(self, needs: Needs) -> float:
        if needs.gpus is not None:
            return needs.gpus
        return 1.0 if self._cluster.resources().get("GPU", 0.0) >= 1.0 else 0.0

    def _place_in_team(self, needs: Needs, resources: Mapping[str, float]) -> dict[str, Any]:
        """The next bundle of the team's placement group, made with its first member."""
        if needs.team is None:
            return {}
        if needs.team not in self._teams:
            bundle = {"CPU": resources["num_cpus"]}
            if resources["num_gpus"]:
                bundle["GPU"] = resources["num_gpus"]
            bundles = [dict(bundle) for _ in range(needs.size)]
            self._teams[needs.team] = _ray().util.placement_group(bundles, strategy="PACK")
        index = self._joined[needs.team] = self._joined.get(needs.team, -1) + 1
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._teams[needs.team], index)
        return {"scheduling_strategy": strategy}

    def _room(self) -> str:
        has, free = self._cluster.resources(), self._cluster.free()
        parts = [f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
        return f"the cluster {self._cluster.name} has {' and '.join(parts)} free"


async def _within(seconds: float, reference: Any) -> Any:
    """What a Ray call returns. Raises TimeoutError; the call itself goes on."""
    future: Awaitable[Any] = asyncio.wrap_future(reference.future())
    async with asyncio.timeout(seconds):
        return await future


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-1:])[:300] if lines else type(error).__name__


def _ray() -> Any:
    import ray

    return ray


def _errors() -> Any:
    return _ray().exceptions

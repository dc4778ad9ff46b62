"""Workers as actors on a Ray cluster: one process each, on the machine that Ray schedules it to.

Has the promises of `npd.runtime.base`. Ray restarts an actor whose process or machine is lost, with
empty state. The worker still counts as lost until `restart` accepts the new incarnation. Members of
a team share one placement group. Actors are not detached, so they end with this process.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.config import RayConfig
from npd.errors import RunError, WorkerLostError
from npd.models.distributed import ADDRESS
from npd.runtime.base import NOTHING, CallResult, Environment, Factory, Resources, SerialWorker
from npd.runtime.local import THREAD_VARIABLES
from npd.runtime.ray_cluster import Cluster
from npd.runtime.rpc import ObjectServer, Shipped, configure_logging, handle_request, unpack_reply

# Grace period for closing files and freeing a device, after which an actor is killed.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05


class RayWorker(SerialWorker):
    """One object in one actor.

    `start` requests an actor. `room` describes the requested and the free resources, for messages.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Any],
        log_file: Path,
        call_timeout: float,
        start_timeout: float,
        room: Callable[[], str],
    ) -> None:
        super().__init__(name, call_timeout)
        self._start, self._log_file, self._start_timeout = start, log_file, start_timeout
        self._room = room
        self._actor = start()
        self._current: Incarnation | None = None
        self._previous: Incarnation | None = None
        self._is_alive, self._may_be_alive = True, False

    @property
    def pid(self) -> int | None:
        """The process id on its machine; None before the first call and after the actor's end."""
        return self._current.pid if self._current is not None and self._is_alive else None

    async def restart(self) -> None:
        """Kill the current incarnation; the next call finds the new one."""
        self._gone = f"worker {self.name} was restarted during a call: call it again"
        if self._may_be_alive:
            await self._ensure_dead()
        elif self._is_alive:
            self._kill(no_restart=False)
        await self._settle()
        self._previous, self._current = self._current or self._previous, None
        self._restarts += 1
        self._is_alive, self._gone = True, None

    async def close(self) -> None:
        """Close the object if it is idle, and end the actor."""
        is_idle = not self._turn.locked() and self._current is not None and self._gone is None
        self._gone = self._closed
        if is_idle:
            with suppress(_errors().RayError, TimeoutError):
                await _within(_GRACE_SECONDS, self._actor.close.remote())
        self._kill(no_restart=True)
        with suppress(_errors().RayError, TimeoutError):  # wait until Ray reports the actor's end
            await _within(_GRACE_SECONDS, self._actor.incarnation.remote())
        await self._settle()

    async def _exchange(self, method: str, args: tuple[Any, ...], limit: float) -> CallResult:
        incarnation = self._current = self._current or await self._find_incarnation()
        request = self._actor.handle.remote(incarnation.name, pickle.dumps((method, args)))
        try:
            reply = await _within(limit, request)
        except TimeoutError:
            raise self._overran(method, limit) from None
        except _errors().RayError as error:
            self._may_be_alive = not isinstance(error, _errors().ActorDiedError)
            raise self._died(f"during {method}()") from None
        if not reply:
            raise self._died("while it was idle")
        return unpack_reply(reply)

    async def _ensure_dead(self) -> None:
        """Kill an actor that Ray cannot reach, because it may still run and write files."""
        self._may_be_alive = False
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                found = await _within(_GRACE_SECONDS, self._actor.incarnation.remote())
            except _errors().ActorUnavailableError:
                await asyncio.sleep(_POLL_SECONDS)  # Ray is restarting it
            except TimeoutError:
                break  # still busy with the lost call
            except _errors().RayError:
                return
            else:
                if found != self._current:
                    return
                break
        self._kill(no_restart=False)

    async def _find_incarnation(self) -> Incarnation:
        """Wait until Ray has scheduled the actor; returns its incarnation, never a killed one."""
        deadline = time.monotonic() + self._start_timeout
        while (left := deadline - time.monotonic()) > 0:
            if self._gone is not None:
                raise WorkerLostError(self._gone)
            try:
                found: Incarnation = await _within(left, self._actor.incarnation.remote())
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
                if found != self._previous:
                    return found
                self._kill(no_restart=False)
                await asyncio.sleep(_POLL_SECONDS)
        raise RunError(
            f"worker {self.name} was not scheduled on the Ray cluster within "
            f"{self._start_timeout:g} s ({self._room()}): add machines, lower runtime.ray.gpus, "
            "*.workers or train.ranks, or raise runtime.ray.start_timeout"
        )

    def _overran(self, method: str, limit: float) -> Exception:
        self._kill(no_restart=False)
        return self._lose(
            f"worker {self.name} ({self._current}) gave no answer to {method}() within {limit:g} s "
            f"and was killed: raise runtime.call_timeout, or see {self._log_file}"
        )

    def _died(self, when: str) -> Exception:
        self._is_alive = False
        return self._lose(
            self._gone
            or f"worker {self.name} ({self._current}) was ended {when}, killed or out of memory: "
            f"see {self._log_file}"
        )

    def _kill(self, *, no_restart: bool) -> None:
        self._is_alive = False
        with suppress(_errors().RayError, ValueError):
            _ray().kill(self._actor, no_restart=no_restart)


class RayRuntime:
    """Starts actors; their output goes to `log_dir/<name>.log` if they see that folder."""

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
        needs: Resources = NOTHING,
    ) -> RayWorker:
        """Start a worker; see `Runtime.spawn`.

        Each requests one CPU, regardless of its `threads`; its GPUs determine its machine.
        """
        assert name not in self._workers, f"worker {name} exists"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_file = self._log_dir / f"{name}.log"
        resources = {"num_cpus": 1.0, "num_gpus": self._gpus(needs)}
        variables = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **(environment or {})}
        options = {
            **resources,
            "max_restarts": -1,
            "runtime_env": {"env_vars": variables},
            **self._schedule_in_team(needs, resources),
        }
        shipped = pickle.dumps(factory)

        def start() -> Any:
            actor = _ray().remote(RayActor).options(**options)
            return actor.remote(name, shipped, str(log_file), os.getcwd())

        def room() -> str:
            gpus = f" and {resources['num_gpus']:g} GPU" if resources["num_gpus"] else ""
            return f"it needs 1 CPU{gpus}; {self._free()}"

        timeouts = (self._call_timeout, self._config.start_timeout)
        worker = RayWorker(name, start, log_file, *timeouts, room)
        self._workers[name] = worker
        return worker

    async def close(self) -> None:
        """End every worker and leave the cluster."""
        workers, self._workers = self._workers, {}
        await asyncio.gather(*(worker.close() for worker in workers.values()))
        for group in self._teams.values():
            with suppress(_errors().RayError):
                _ray().util.remove_placement_group(group)
        self._teams.clear()
        await asyncio.to_thread(self._cluster.leave)

    def _gpus(self, needs: Resources) -> float:
        if needs.gpus is not None:
            return needs.gpus
        return 1.0 if self._cluster.resources().get("GPU", 0.0) >= 1.0 else 0.0

    def _schedule_in_team(self, needs: Resources, resources: Mapping[str, float]) -> dict[str, Any]:
        """The next bundle of the team's placement group; its first member creates the group."""
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

    def _free(self) -> str:
        has, free = self._cluster.resources(), self._cluster.free()
        parts = [f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
        return f"the cluster at {self._cluster.name} has {' and '.join(parts)} free"


async def _within(seconds: float, reference: Any) -> Any:
    """The result of a Ray call. Raises TimeoutError after `seconds`, without ending the call."""
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


# The actor's side.


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One process of an actor: its id, its machine, and its process id there."""

    name: str
    node: str
    pid: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node}"


class RayActor:
    """The Ray actor: one worker's object and its log. Calls are serial.

    Ray restarts a dead actor on its own, with empty state. So each request names an incarnation,
    and other incarnations reject it: a restarted trainer must not continue in place of the old one.
    """

    def __init__(self, name: str, factory: bytes, log_file: str, folder: str) -> None:
        # The controller handles Ctrl-C; Ray ends actors without signals.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if Path(folder).is_dir():
            os.chdir(folder)  # the controller's, so that relative paths are the same
        _print_to(Path(log_file))
        configure_logging()
        os.environ[ADDRESS] = _address()
        self._incarnation = Incarnation(uuid.uuid4().hex, socket.gethostname(), os.getpid())
        self._server = ObjectServer(name, Shipped(factory), Path(log_file))

    def incarnation(self) -> Incarnation:
        """The incarnation of this process."""
        return self._incarnation

    def handle(self, incarnation: str, request: bytes) -> bytes:
        """A pickled CallResult or Failure; empty if the request is for another incarnation."""
        return (
            handle_request(self._server, request) if incarnation == self._incarnation.name else b""
        )

    def close(self) -> None:
        """Close the object."""
        self._server.close()


def _address() -> str:
    """This machine's address within the cluster."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def _print_to(log_file: Path) -> None:
    """Redirect stdout and stderr to the run's log; if its folder is missing here, Ray logs them.

    Redirects the file descriptors, to include output of native libraries and of crashes.
    """
    if not log_file.parent.is_dir():
        return
    with log_file.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

"""What only actors can do: die and be started again by Ray, wait for room, live on another node."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from npd.config import RayConfig
from npd.errors import ModelError, RunError, WorkerLostError
from npd.models.distributed import ADDRESS
from npd.runtime.base import Resources
from npd.runtime.ray import RayRuntime
from worker_factories import BrokenFactory, ToyFactory

pytestmark = pytest.mark.usefixtures("ray_address")


def drive(log_dir, story, **config):
    """Run `story(runtime)` on the cluster of the tests, and close the runtime after it."""

    async def whole():
        ray = RayConfig(address=os.environ["RAY_ADDRESS"], **config)
        runtime = RayRuntime(log_dir, ray, call_timeout=600.0)
        try:
            return await story(runtime)
        finally:
            await runtime.close()

    return asyncio.run(whole())


async def replaced(worker, pid):
    """Wait until Ray has put another process in the place of `pid`."""
    from ray.exceptions import ActorUnavailableError

    while True:
        try:
            if (await asyncio.wrap_future(worker._actor.incarnation.remote().future())).pid != pid:
                return
        except ActorUnavailableError:
            await asyncio.sleep(0.05)


def test_a_new_life_is_never_taken_for_the_old_one(tmp_path):
    """Ray puts a fresh object in the place of the lost one, which must not be trained on."""

    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        assert (await worker.call("add", 5)).value == 5
        for number, when in ((signal.SIGKILL, "during die"), (signal.SIGTERM, "ended")):
            old = worker.pid
            with pytest.raises(WorkerLostError, match=when) as caught:
                await worker.call("die", number)
            assert str(tmp_path / "toy.log") in str(caught.value)
            assert "\n" not in str(caught.value)
            assert worker.pid is None
            with pytest.raises(WorkerLostError, match=when):
                await worker.call("add", 1)
            await worker.restart()
            assert (await worker.call("add", 1)).value == 1
            assert worker.pid != old
        old = worker.pid
        os.kill(old, signal.SIGKILL)
        await replaced(worker, old)
        with pytest.raises(WorkerLostError, match="was ended while"):
            await worker.call("add", 1)
        await worker.restart()
        return (await worker.call("add", 7)).value

    assert drive(tmp_path, story) == 7


def test_threads_folder_and_log_are_those_of_the_run(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=3)
        assert (await worker.call("folder")).value == os.getcwd()
        await worker.call("notify", "first life")
        await worker.restart()
        await worker.call("notify", "second life")
        return (await worker.call("environment", "OMP_NUM_THREADS", "MKL_NUM_THREADS")).value

    assert drive(tmp_path, story) == ["3", "3"]
    lines = (tmp_path / "toy.log").read_text().splitlines()
    assert lines == ["first life", "first life", "second life", "second life"]


def test_a_log_folder_that_the_machine_does_not_see_is_no_reason_to_fail(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1)
        (tmp_path / "logs").rename(tmp_path / "elsewhere")
        with pytest.raises(RunError, match="ValueError: bad shape"):
            await worker.call("raise_value_error", "bad shape")
        with pytest.raises(ModelError, match="not there"):
            await worker.call("raise_model_error", "not there")

    drive(tmp_path / "logs", story)


def test_no_room_is_said_with_what_is_asked_and_what_there_is(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1, needs=Resources(gpus=2.0))
        with pytest.raises(RunError) as caught:
            await worker.call("add", 1)
        return str(caught.value)

    message = drive(tmp_path, story, start_timeout=2.0)
    for part in (
        "toy was not scheduled",
        "1 CPU and 2 GPU",
        "of 5 CPU and 0 of 0 GPU free",
        "runtime",
    ):
        assert part in message


def test_a_cluster_that_this_process_has_joined_is_used_and_not_left(tmp_path, monkeypatch):
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)
    monkeypatch.delenv("RAY_ADDRESS")

    async def story():
        runtime = RayRuntime(tmp_path, RayConfig(), call_timeout=600.0)
        try:
            return (await runtime.spawn("toy", ToyFactory(), threads=1).call("add", 1)).value
        finally:
            await runtime.close()

    try:
        assert asyncio.run(story()) == 1
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_the_address_is_in_the_environment_where_none_is_set(tmp_path):
    async def story():
        runtime = RayRuntime(tmp_path, call_timeout=600.0)
        try:
            return (await runtime.spawn("toy", ToyFactory(), threads=1).call("add", 2)).value
        finally:
            await runtime.close()

    assert asyncio.run(story()) == 2


def test_gpus_that_there_may_be_are_asked_for_only_where_there_are_any(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", ToyFactory(), threads=1, needs=Resources(gpus=None))
        return (await worker.call("add", 1)).value

    assert drive(tmp_path, story) == 1


def test_a_team_has_a_place_for_each_and_may_lie_on_several_nodes(tmp_path):
    async def story(runtime):
        team = [
            runtime.spawn(f"toy-{i}", ToyFactory(), threads=1, needs=Resources(0.0, "all", 5))
            for i in range(5)
        ]
        asked = (worker.call("environment", ADDRESS) for worker in team)
        addresses = [reply.value[0] for reply in await asyncio.gather(*asked)]
        return addresses, {(await worker.call("parent")).value for worker in team}

    addresses, raylets = drive(tmp_path, story)
    assert all(addresses)
    assert len(raylets) == 2, "five CPUs are on two nodes"


def test_a_factory_that_fails_is_reported_by_each_call(tmp_path):
    async def story(runtime):
        worker = runtime.spawn("toy", BrokenFactory(tmp_path / "cure"), threads=1)
        for _ in range(2):
            with pytest.raises(ModelError, match="/nowhere does not exist"):
                await worker.call("add", 1)

    drive(tmp_path, story)

"""A generator with several shards at once: their order, its snapshots, its loss, its spans."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from npd.control.dispatcher import SharedGenerator
from npd.errors import WorkerLostError
from npd.runtime import CallResult
from npd.workers import GenerateTask
from npd.workers.tasks import ShardResult


class Worker:
    """A worker whose shards are written when the test says so. It notes what is called."""

    name = "generator-0"

    def __init__(self):
        self.calls, self.written, self.restarts, self.is_lost = [], set(), 0, False

    async def call(self, method, *args, timeout=None):  # noqa: ASYNC109
        await asyncio.sleep(0)
        if self.is_lost:
            raise WorkerLostError("it was lost")
        if method == "begin":
            self.calls.append(f"begin {args[0].shard}")
            return CallResult(None, 0.0, 0.0)
        assert method == "collect"
        is_written = args[0] in self.written
        if is_written:
            self.calls.append(f"collect {args[0]}")
        return CallResult(ShardResult(()) if is_written else None, 0.0, 0.0)

    async def restart(self):
        self.restarts += 1
        await asyncio.sleep(0)
        self.is_lost = False


class Monitor:
    """Keeps what it is told."""

    def __init__(self):
        self.spans, self.states = [], []

    def started(self, worker, doing):
        self.states.append(doing)

    def span(self, span):
        self.spans.append(span)


class Bench:
    def __init__(self):
        self.worker, self.monitor, self.refreshed = Worker(), Monitor(), []
        self.generator = SharedGenerator(self.worker, self.monitor, self.refresh)

    async def refresh(self, worker, version):
        if self.worker.is_lost:
            raise WorkerLostError("it was lost")
        self.refreshed.append(version)
        self.worker.calls.append(f"refresh {version}")

    def write(self, shard, version=0):
        return asyncio.create_task(self.generator.write(GenerateTask(shard, version, ())))

    async def until_called(self, count):
        """Wait until so many calls were made, other than looks in vain."""
        while len(self.worker.calls) < count:  # noqa: ASYNC110 - nothing tells of a call
            await asyncio.sleep(0)


def drive(story):
    bench = Bench()
    asyncio.run(asyncio.wait_for(story(bench), 30.0))
    return bench


def test_two_shards_are_in_flight_and_end_in_any_order():
    async def story(bench):
        tasks = [bench.write(0), bench.write(1)]
        await bench.until_called(3)
        bench.worker.written.add(1)
        await tasks[1]
        assert bench.monitor.states[-1] == "generate", "the other one is being written"
        tasks.append(bench.write(2))
        bench.worker.written |= {0, 2}
        await asyncio.gather(*tasks)

    bench = drive(story)
    assert bench.worker.calls[:4] == ["refresh 0", "begin 0", "begin 1", "collect 1"]
    assert set(bench.refreshed) == {0}
    assert bench.monitor.states[-1] == "idle"
    spans = bench.monitor.spans
    assert len(spans) == 3
    assert spans[0].args == {"shard": 1}
    assert all(one.end <= other.start for one, other in pairwise(spans))
    assert all(span.start <= span.end for span in spans)


def test_another_snapshot_waits_until_none_is_in_flight():
    async def story(bench):
        tasks = [bench.write(0), bench.write(1), bench.write(2, version=1), bench.write(3)]
        await bench.until_called(3)
        bench.worker.written |= {0, 2, 3}
        await tasks[0]
        for _ in range(20):
            await asyncio.sleep(0)
        assert "refresh 1" not in bench.worker.calls
        bench.worker.written.add(1)
        await asyncio.gather(*tasks)

    bench = drive(story)
    order = [c for c in bench.worker.calls if not c.startswith("collect")]
    assert order == ["refresh 0", "begin 0", "begin 1", "refresh 1", "begin 2", "refresh 0",
                     "begin 3"]  # fmt: skip
    assert bench.worker.calls.index("collect 1") < bench.worker.calls.index("refresh 1")


def test_a_lost_worker_fails_both_and_is_restarted_once():
    async def story(bench):
        tasks = [bench.write(0), bench.write(1)]
        await bench.until_called(3)
        bench.worker.is_lost = True
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in ended] == [WorkerLostError] * 2
        assert bench.worker.restarts == 1
        bench.worker.written |= {0, 1}
        again = [bench.write(0), bench.write(1)]
        await asyncio.gather(*again)
        bench.worker.is_lost = True
        with pytest.raises(WorkerLostError):
            await bench.write(2)
        assert bench.worker.restarts == 2

    bench = drive(story)
    assert bench.refreshed[:2] == [0, 0], "the new worker gets the snapshot"

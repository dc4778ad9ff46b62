"""Weight sync by itself: what an update returns, in which order it acts, and what a check finds."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from fake_servers import FakeVllm, make_snapshot
from npd.config import GenerateConfig
from npd.engines import build_server
from npd.engines.client import Client
from npd.engines.verify_weights import WrongWeights
from npd.engines.weight_sync import WeightSync
from npd.errors import WorkerLostError


class Bench:
    """Two fake servers with snapshot v0, and a `WeightSync` whose lines are in `said`."""

    def __init__(self, tmp_path, fakes):
        self.fakes, self.said = fakes, []
        self.paths = [tmp_path / "v0", make_snapshot(tmp_path / "v1", 1, step=0.96)]
        urls = tuple(fake.url for fake in fakes)
        self.sync = WeightSync(
            GenerateConfig(engine="vllm", urls=urls, patience=0.0),
            trust_remote_code=False,
            run="abc",
            fingerprints=None,
            notify=self.said.append,
        )

    def run(self, work):
        """The result of `work(sync, servers)`, a coroutine."""

        async def connected():
            client = Client(None, connections=8)
            links = [client.connect(fake.url, timeout=30.0) for fake in self.fakes]
            servers = [build_server("vllm", link, refresh_timeout=30.0) for link in links]
            try:
                return await work(self.sync, servers)
            finally:
                await client.aclose()

        return asyncio.run(connected())

    def update(self, version, **kwargs):
        async def work(sync, servers):
            new = await sync.prepare(self.paths[version], version, is_policy=True)
            return await sync.update(servers, new, **kwargs)

        return self.run(work)


@pytest.fixture
def bench(tmp_path):
    first = make_snapshot(tmp_path / "v0", 1)
    with ExitStack() as stack:
        yield Bench(tmp_path, [stack.enter_context(FakeVllm(first)) for _ in range(2)])


def calls_of(fake):
    """The calls that change a server, in their order, with the readings between them."""
    names = {"/v1/completions": "read", "/collective_rpc": "load", "/update_weight_version": "tag"}
    paths = [path.partition("?")[0] for path, _ in fake.engine.bodies]
    calls = [names.get(path, path.strip("/")) for path in paths]
    wanted = {*names.values(), "pause", "resume"}
    kept = [call for call in calls if call in wanted]
    return [call for i, call in enumerate(kept) if kept[i - 1 : i] != [call]]


def test_an_update_returns_and_says_the_verification_of_each_server(bench):
    for version in (0, 1):
        found = bench.update(version)
        assert list(found) == [fake.url for fake in bench.fakes]
        lines = [f"{name} serves snapshot v{version}: {each}" for name, each in found.items()]
        assert bench.said[-2:] == lines
    assert all(each.old_share is not None and each.can_tell for each in found.values())
    assert bench.sync.served.version == 1


def test_an_update_loads_verifies_and_tags_in_this_order(bench):
    bench.update(0)
    for fake in bench.fakes:
        assert calls_of(fake) == ["pause", "load", "resume", "read", "tag"]


def test_what_a_server_was_started_with_is_verified_and_not_loaded(bench):
    bench.update(0, is_loaded=True)
    assert [calls_of(fake) for fake in bench.fakes] == [["read", "tag"]] * 2


def test_an_update_to_the_same_snapshot_is_no_alarm(bench):
    for version in (0, 1, 1):
        assert len(bench.update(version)) == 2


def test_an_update_that_fails_leaves_nothing_to_generate_with(bench):
    bench.update(0)
    good, bad = bench.fakes
    bad.faults.forgets_reload = True
    for _ in range(2):
        with pytest.raises(WrongWeights, match=rf"{bad.url} does not serve snapshot v1"):
            bench.update(1)
        assert bench.sync.served is None
        assert len(bench.said) == 2, "nothing is said of a part of an update"
        assert (good.engine.tag == bad.engine.tag, bad.engine.is_paused) == (False, False)
    bad.faults.forgets_reload = False
    assert len(bench.update(1)) == 2


def test_a_check_finds_other_weights_and_returns_who_does_not_answer(bench):
    bench.update(0)
    assert bench.run(lambda sync, servers: sync.check(servers)) == []
    bench.fakes[1].close()
    (silent,) = bench.run(lambda sync, servers: sync.check(servers))
    assert bench.fakes[1].url in str(silent)
    bench.fakes[0].restart(bench.paths[1])
    with pytest.raises(WorkerLostError, match=bench.fakes[0].url):
        bench.run(lambda sync, servers: sync.check(servers))

"""The generator by servers: what becomes of each way in which they can go wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

import fakes
from fake_servers import CONTEXT, FAKES, VOCAB, FakeVllm, make_snapshot, read_lm
from npd.config import GenerateConfig
from npd.engines.verify_weights import WrongWeights
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.generate.served import ServedGenerator, ServingContext
from npd.types import Failed, Rollout

ENGINES = sorted(FAKES)


class Bench:
    """Fake servers that hold a first snapshot, and generators over them; ends them all."""

    def __init__(self, tmp_path):
        self._tmp_path, self._stack = tmp_path, ExitStack()
        self.snapshots = [make_snapshot(tmp_path / "v0", 1)]

    def publish(self, seed, **kwargs):
        """Another snapshot."""
        path = self._tmp_path / f"v{len(self.snapshots)}"
        self.snapshots.append(make_snapshot(path, seed, **kwargs))
        return self.snapshots[-1]

    def enter(self, server):
        return self._stack.enter_context(server)

    def server(self, engine="vllm", **faults):
        return self.enter(FAKES[engine](self.snapshots[0], **faults))

    def generator(self, *servers, engine="vllm", around=None, stop_ids=(fakes.END,), **kwargs):
        """A generator over `servers`, quick to give up; `around` is more of its context."""
        vocab_size = kwargs.pop("vocab_size", None)
        settings = {"max_new_tokens": 6, "batch_size": 4, "patience": 0.0}
        settings |= {"urls": tuple(server.url for server in servers), **kwargs}
        generator = ServedGenerator(
            GenerateConfig(engine=engine, **settings),
            ServingContext(self._tmp_path / "server.log", CONTEXT, **(around or {})),
            stop_ids=stop_ids,
            vocab_size=vocab_size,
        )
        self._stack.callback(generator.close)
        return generator

    def close(self):
        self._stack.close()


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def check_logprobs(rollout, snapshot):
    """The rollout's log-probs are those of the model in `snapshot`."""
    expected = read_lm(snapshot).token_logprobs(rollout.prompt_ids, rollout.response_ids)
    assert np.allclose(rollout.logprobs, expected, atol=1e-6)


ASKS = fakes.make_requests(10)


# Refusals and failures of requests.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_refused_prompt_fails_alone(bench, engine):
    bad = ASKS[4].prompt.prompt_ids.tolist()
    servers = [bench.server(engine, refuses=lambda prompt: prompt == bad) for _ in range(2)]
    generator = bench.generator(*servers, engine=engine)
    generator.load(bench.snapshots[0], 0)
    found = generator.generate(ASKS)
    assert [item.sample_id for item in found] == [ask.sample_id for ask in ASKS]
    (failed,) = [item for item in found if isinstance(item, Failed)]
    assert failed.sample_id == ASKS[4].sample_id
    assert "refuses (400): this prompt is too long" in failed.reason
    for rollout in found:
        if isinstance(rollout, Rollout):
            check_logprobs(rollout, bench.snapshots[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_busy_server_is_asked_again(bench, engine):
    server = bench.server(engine)
    generator = bench.generator(server, engine=engine, patience=5.0)
    generator.load(bench.snapshots[0], 0)
    server.faults.unavailable, server.faults.drops = 2, 1
    assert all(isinstance(item, Rollout) for item in generator.generate(ASKS))


@pytest.mark.parametrize("engine", ENGINES)
def test_others_take_over_from_a_dead_server(bench, engine):
    servers = [bench.server(engine) for _ in range(3)]
    generator = bench.generator(*servers, engine=engine, patience=1e6)
    generator.load(bench.snapshots[0], 0)
    servers[1].close()
    assert all(isinstance(item, Rollout) for item in generator.generate(ASKS))


def test_a_server_that_dies_at_its_work_loses_nothing(bench):
    servers = [bench.server(token_seconds=0.01) for _ in range(2)]
    generator = bench.generator(*servers, max_new_tokens=20, stop_ids=())
    generator.load(bench.snapshots[0], 0)
    so_far = servers[0].engine.num_tokens
    killer = threading.Thread(
        target=lambda: (servers[0].engine.await_tokens(so_far + 5), servers[0].close())
    )
    killer.start()
    found = generator.generate(ASKS)
    killer.join()
    assert [len(item.response_ids) for item in found] == [20] * len(ASKS)


def test_all_servers_dead_is_one_line_that_names_them(bench):
    servers = [bench.server() for _ in range(2)]
    generator = bench.generator(*servers)
    generator.load(bench.snapshots[0], 0)
    for server in servers:
        server.close()
    with pytest.raises(RunError, match="no server is left that responds") as caught:
        generator.generate(ASKS)
    assert not isinstance(caught.value, WorkerLostError)
    assert all(server.url in str(caught.value) for server in servers)
    assert "\n" not in str(caught.value)


def test_a_server_that_always_fails_its_requests_fails_the_samples(bench):
    server = bench.server()
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)
    server.faults.unavailable = 1000
    (failed,) = generator.generate(ASKS[:1])
    assert "503" in failed.reason
    assert server.url in failed.reason


def test_a_broken_server_is_given_up(bench):
    server = bench.server()
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)
    server.faults.is_broken = True
    with pytest.raises(RunError, match=r"no server is left .*500 EngineDeadError"):
        generator.generate(ASKS)


def test_a_hanging_server_is_given_up_at_its_time_limit(bench):
    server = bench.server()
    generator = bench.generator(server, request_timeout=0.2)
    generator.load(bench.snapshots[0], 0)
    server.faults.hangs = True
    with pytest.raises(
        RunError, match=r"no answer to /v1/completions within 0\.2 s.*request_timeout"
    ):
        generator.generate(ASKS[:1])


def test_a_server_that_is_down_at_the_start(bench):
    server = bench.server()
    server.close()
    generator = bench.generator(server)
    with pytest.raises(RunError, match=rf"{server.url} .*does not answer"):
        generator.load(bench.snapshots[0], 0)
    assert generator.version is None


def test_the_key_comes_from_the_environment(bench, monkeypatch):
    server = bench.server(key="sesame")
    monkeypatch.setenv("MY_KEY", "sesame")
    generator = bench.generator(server, api_key_env="MY_KEY")
    generator.load(bench.snapshots[0], 0)
    assert all(isinstance(item, Rollout) for item in generator.generate(ASKS))
    with pytest.raises(RunError, match=r"401.*api_key_env"):
        bench.generator(server, api_key_env="NO_KEY").load(bench.snapshots[0], 0)


# Whose weights.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_refresh_changes_what_is_written(bench, engine):
    servers = [bench.server(engine) for _ in range(2)]
    generator = bench.generator(*servers, engine=engine)
    bench.publish(2)
    for version, snapshot in enumerate(bench.snapshots):
        generator.load(snapshot, version)
        for rollout in generator.generate(ASKS):
            assert (rollout.version, rollout.versions) == (version, None)
            check_logprobs(rollout, snapshot)
    assert not any(server.engine.is_paused for server in servers)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("fault", "said"), [("forgets_reload", "an earlier snapshot"), ("loads_partly", "only a part")]
)
def test_a_reload_that_did_not_take_names_the_server(bench, engine, fault, said):
    good, bad = bench.server(engine), bench.server(engine)
    generator = bench.generator(good, bad, engine=engine)
    generator.load(bench.snapshots[0], 0)
    setattr(bad.faults, fault, True)
    # Near enough that only the direction of the difference tells.
    near = bench.publish(1, step=0.96)
    with pytest.raises(WrongWeights, match=rf"{bad.url} does not serve snapshot v1.*{said}"):
        generator.load(near, 1)
    assert generator.version is None
    assert not any(server.engine.is_paused for server in (good, bad))
    with pytest.raises(AssertionError, match="load"):
        generator.generate(ASKS)
    setattr(bad.faults, fault, False)
    generator.load(near, 1)
    assert {rollout.version for rollout in generator.generate(ASKS)} == {1}


def test_a_server_with_other_weights_is_found_at_once(bench):
    server = bench.server(forgets_reload=True)
    far = bench.publish(2)
    with pytest.raises(WrongWeights, match=r"differ from the expected ones by \d.*probe_tolerance"):
        bench.generator(server).load(far, 1)


def test_rounding_of_another_engine_is_no_alarm(bench):
    generator = bench.generator(bench.server(noise=0.02))
    for version in range(4):
        generator.load(bench.publish(1, step=1.0 - 0.02 * version), version)


@pytest.mark.parametrize("engine", ENGINES)
def test_another_tag_before_or_behind_loses_the_worker(bench, engine):
    server = bench.server(engine)
    generator = bench.generator(server, engine=engine)
    generator.load(bench.snapshots[0], 0)
    server.restart(bench.snapshots[0])
    with pytest.raises(WorkerLostError, match=rf"{server.url} reports weights 'default'.*npd-v0"):
        generator.generate(ASKS)
    generator = bench.generator(server, engine=engine)
    generator.load(bench.snapshots[0], 0)

    def restart(prompt):
        server.restart(bench.snapshots[0])
        return False

    server.faults.refuses = restart  # in the middle of the work
    with pytest.raises(WorkerLostError, match="requested again"):
        generator.generate(ASKS)


def test_a_server_that_reports_no_tag_reads_the_texts_again(bench):
    """One that comes back with the first snapshot between two shards is found all the same."""
    lacks = ("/weight_info", "/update_weight_version")
    server = bench.server(lacks=lacks)
    generator = bench.generator(server)
    for version, snapshot in enumerate((bench.snapshots[0], bench.publish(1, step=0.9))):
        generator.load(snapshot, version)
        assert all(isinstance(item, Rollout) for item in generator.generate(ASKS))
    server.restart(bench.snapshots[0])
    with pytest.raises(WorkerLostError, match=r"does not serve snapshot v1.*requested again"):
        generator.generate(ASKS)


def test_a_server_that_cannot_be_refreshed_may_hold_the_first_snapshot(bench):
    generator = bench.generator(bench.server(is_locked=True))
    generator.load(bench.snapshots[0], 0)
    assert all(isinstance(item, Rollout) for item in generator.generate(ASKS))
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        generator.load(bench.publish(2), 1)


def test_a_snapshot_it_cannot_read_says_what_must_be(bench):
    for engine in ENGINES:
        server = bench.server(engine)
        generator = bench.generator(server, engine=engine)
        hollow = bench.publish(2)
        (hollow / "model.safetensors").unlink()
        with pytest.raises(RunError, match=rf"{server.url} could not load .*same path"):
            generator.load(hollow, 1)
        assert not server.engine.is_paused


def test_a_load_balancer_is_asked_and_each_server_managed(bench):
    """Requests go to one URL; weights, readings and tags to every server behind it."""
    front, behind = bench.server(), bench.server()
    generator = bench.generator(front, admin_urls=(front.url, behind.url))
    for version, snapshot in enumerate((bench.snapshots[0], bench.publish(2))):
        generator.load(snapshot, version)
        assert len({server.engine.tag for server in (front, behind)}) == 1
    generator.generate(ASKS)
    written = [
        [body for body in server.sent("/v1/completions") if "logprobs" in body]
        for server in (front, behind)
    ]
    assert [len(bodies) for bodies in written] == [len(ASKS), 0]
    behind.restart(bench.snapshots[0])
    with pytest.raises(WorkerLostError, match=behind.url):
        generator.generate(ASKS)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_are_swapped_by_name(bench, engine):
    server = bench.server(engine)
    generator = bench.generator(server, engine=engine)
    base = bench.snapshots[0]
    for version, seed in ((1, 2), (2, 3)):
        adapter = bench.publish(seed, base=base)
        generator.load(adapter, version)
        for rollout in generator.generate(ASKS):
            assert rollout.version == version
            check_logprobs(rollout, adapter)
        assert len(server.engine.adapters) == 1
    assert np.array_equal(server.engine.lm.first, read_lm(base).first)


def test_a_teacher_is_served_as_it_is(bench):
    server = bench.server(is_locked=True)
    generator = bench.generator(server, source="teacher")
    generator.load(bench.publish(2), 0)  # what it holds is the other one, and nobody minds
    found = generator.generate(ASKS)
    assert all(rollout.logprobs is None for rollout in found)
    assert {rollout.version for rollout in found} == {0}


def test_padding_of_the_vocabulary_is_never_drawn(tmp_path, bench):
    bench.snapshots = [make_snapshot(tmp_path / "padded", 1, vocab=VOCAB + 40)]
    generator = bench.generator(bench.server(), vocab_size=VOCAB, stop_ids=())
    generator.load(bench.snapshots[0], 0)
    found = generator.generate(ASKS)
    assert max(int(rollout.response_ids.max()) for rollout in found) < VOCAB
    for rollout in found:
        check_logprobs(rollout, bench.snapshots[0])  # over the whole distribution


def written_for(bench, server, **kwargs):
    """What a generator writes twice for each request; the seeds it sent."""
    generator = bench.generator(server, stop_ids=(), **kwargs)
    generator.load(bench.snapshots[0], 0)
    twice = [[r.response_ids.tolist() for r in generator.generate(ASKS)] for _ in range(2)]
    sent = [body for body in server.sent("/v1/completions") if "logprobs" in body]
    return twice, [body.get("seed") for body in sent]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_is_sent_only_if_asked_for(bench, engine):
    (first, again), seeds = written_for(bench, bench.server(engine), engine=engine)
    assert seeds == [None] * 2 * len(ASKS)
    assert first != again
    (first, again), seeds = written_for(bench, bench.server(engine), engine=engine, seeded=True)
    assert sorted(seeds) == sorted(2 * [ask.seed for ask in ASKS])
    assert first == again


# Refreshes in the middle of a response.


def flipping(bench, servers, policy, engine, num_tokens=40, num_requests=6, lacks=()):
    """Rollouts of responses that a refresh to version 1 cuts; and the snapshots, old and new."""
    old, new = bench.snapshots[0], bench.publish(2)
    published = threading.Event()
    around = {"in_flight": policy, "newest": lambda: (new, 1) if published.is_set() else (old, 0)}
    generator = bench.generator(
        *servers,
        engine=engine,
        around=around,
        max_new_tokens=num_tokens,
        stop_ids=(),
    )
    generator.load(old, 0)
    servers[-1].faults.lacks = lacks
    for server in servers:
        server.faults.stalls_at = None if policy == "finish" else 4
    starts = [server.engine.num_tokens for server in servers]

    def publish():
        for server, start in zip(servers, starts, strict=True):
            server.engine.await_tokens(start + 4)
        published.set()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        found = generator.generate(ASKS[:num_requests])
    finally:
        thread.join()
    return generator, found, (old, new)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_flight_finish_ends_with_the_old_weights(bench, engine):
    servers = [bench.server(engine, token_seconds=0.005)]
    generator, found, (old, _) = flipping(bench, servers, "finish", engine)
    assert generator.version == 0
    for rollout in found:
        assert (rollout.version, rollout.versions) == (0, None)
        check_logprobs(rollout, old)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_flight_mix_says_of_each_token_who_drew_it(bench, engine):
    servers = [bench.server(engine) for _ in range(2)]
    _, found, snapshots = flipping(bench, servers, "mix", engine)
    mixed = [rollout for rollout in found if rollout.versions is not None]
    assert mixed
    for rollout in found:
        assert len(rollout.response_ids) == 40
        assert rollout.finish == "length"
        versions = rollout.versions
        if versions is None:
            check_logprobs(rollout, snapshots[rollout.version])
            continue
        assert versions.dtype == np.int32
        assert (np.diff(versions) >= 0).all()
        assert (rollout.version, set(versions.tolist())) == (0, {0, 1})
        both = [
            read_lm(path).token_logprobs(rollout.prompt_ids, rollout.response_ids)
            for path in snapshots
        ]
        assert np.allclose(rollout.logprobs, np.choose(versions, both), atol=1e-6)


def at_once(generator, *groups):
    """What a generator writes for groups of requests that threads ask of it together."""
    with ThreadPoolExecutor(len(groups)) as threads:
        return [found for made in threads.map(generator.generate, groups) for found in made]


def test_calls_of_two_threads_share_the_servers(bench):
    """A server has no more requests at once than for one call."""
    seen = []
    server = bench.server(token_seconds=0.002)
    server.faults.refuses = lambda prompt: bool(seen.append(server.engine.num_running))
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)
    for rollout, ask in zip(at_once(generator, ASKS[:5], ASKS[5:]), ASKS, strict=True):
        assert rollout.sample_id == ask.sample_id
        check_logprobs(rollout, bench.snapshots[0])
    assert max(seen) <= 3, "four at once, each seen before it counts"


def test_in_flight_mix_interrupts_the_responses_of_every_call(bench):
    server, published = bench.server(), threading.Event()
    old, new = bench.snapshots[0], bench.publish(2)
    around = {"in_flight": "mix", "newest": lambda: (new, 1) if published.is_set() else (old, 0)}
    generator = bench.generator(server, around=around, max_new_tokens=20, stop_ids=(), batch_size=8)
    generator.load(old, 0)
    server.faults.stalls_at = 4
    start = server.engine.num_tokens

    def publish():
        server.engine.await_tokens(start + 4 * 6)  # all six are in flight
        published.set()

    thread = threading.Thread(target=publish)
    thread.start()
    found = at_once(generator, ASKS[:3], ASKS[3:6])
    thread.join()
    models = [read_lm(path) for path in (old, new)]
    for rollout in found:
        assert rollout.versions.tolist() == [0] * 4 + [1] * 16
        both = [lm.token_logprobs(rollout.prompt_ids, rollout.response_ids) for lm in models]
        assert np.allclose(rollout.logprobs, np.choose(rollout.versions, both), atol=1e-6)
    generator.load(old, 0)
    assert generator.version == 1, "a shard requested before does not bring the old one back"


def test_a_server_that_was_restarted_loses_every_call(bench):
    server = bench.server()
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)

    def restart(prompt):
        server.restart(bench.snapshots[0])
        return False

    server.faults.refuses = restart
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(generator.generate, asks) for asks in (ASKS[:5], ASKS[5:])]
        for call in calls:
            with pytest.raises(WorkerLostError, match="requested again"):
                call.result()


def test_what_is_being_written_ends_when_the_generator_is_closed(bench):
    server = bench.server(hangs=True)
    generator = bench.generator(server)
    server.faults.hangs = False
    generator.load(bench.snapshots[0], 0)
    server.faults.hangs = True
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(generator.generate, ASKS)
        while len(server.sent("/v1/completions")) < 4:
            time.sleep(0.01)
        generator.close()
        with pytest.raises(CancelledError):
            call.result()


def test_in_flight_a_verification_that_fails_ends_the_call(bench):
    servers = [bench.server()]
    servers[0].faults.forgets_reload = True
    with pytest.raises(WrongWeights, match=servers[0].url):
        flipping(bench, servers, "mix", "vllm")


class Late(FakeVllm):
    """A server on which all responses have ended by the time it pauses."""

    def _pause(self, mode):
        return super()._pause("wait")


def test_a_refresh_begun_is_finished_when_nothing_is_left_to_write(bench):
    """The last response may end while servers are paused: they must not stay so."""
    server = bench.enter(Late(bench.snapshots[0]))
    generator, found, snapshots = flipping(bench, [server], "mix", "vllm", num_requests=4)
    assert {rollout.version for rollout in found} == {0}
    assert generator.version == 1
    assert not server.engine.is_paused
    for rollout in generator.generate(ASKS[:2]):
        assert rollout.version == 1
        check_logprobs(rollout, snapshots[1])


def test_a_refresh_that_fails_leaves_no_server_paused(bench):
    servers = [bench.server() for _ in range(2)]
    with pytest.raises(ConfigError, match=servers[1].url):
        flipping(bench, servers, "mix", "vllm", lacks=("/pause",))
    assert not servers[0].engine.is_paused


def test_cuts_by_somebody_else_are_mended(bench):
    server = bench.server()
    for policy in ("finish", "mix"):
        generator = bench.generator(server, around={"in_flight": policy}, stop_ids=())
        generator.load(bench.snapshots[0], 0)
        server.faults.cuts = 3
        for rollout in generator.generate(ASKS):
            assert (len(rollout.response_ids), rollout.versions) == (6, None)
            check_logprobs(rollout, bench.snapshots[0])


def test_cuts_without_end_are_a_failure(bench):
    server = bench.server()
    generator = bench.generator(server, stop_ids=())
    generator.load(bench.snapshots[0], 0)
    server.faults.cuts = 10**6
    (failed,) = generator.generate(ASKS[:1])
    assert "keeps aborting responses" in failed.reason


def test_a_generator_can_be_closed_before_it_loads(bench):
    assert bench.generator(bench.server()).version is None


def test_loading_what_is_held_asks_nothing(bench):
    server = bench.server()
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)
    before = len(server.engine.bodies)
    generator.load(bench.snapshots[0], 0)
    assert len(server.engine.bodies) == before
    assert generator.generate([]) == []
    assert isinstance(server, FakeVllm)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_restarted_worker_still_sees_old_weights(bench, engine, tmp_path):
    """Fingerprints of earlier snapshots are kept in the run directory."""
    server = bench.server(engine)
    around = {"fingerprints": tmp_path / "probes"}
    bench.generator(server, engine=engine, around=around).load(bench.snapshots[0], 0)
    server.faults.forgets_reload = True
    near = bench.publish(1, step=0.96)
    with pytest.raises(WrongWeights, match=f"{server.url} does not serve snapshot v1"):
        bench.generator(server, engine=engine, around=around).load(near, 1)


def test_a_key_that_stops_working_ends_the_run_and_fails_no_sample(bench, monkeypatch):
    monkeypatch.setenv("NPD_API_KEY", "right")
    server = bench.server(key="right")
    generator = bench.generator(server)
    generator.load(bench.snapshots[0], 0)
    server.faults.key = "another"
    with pytest.raises(RunError, match="api_key_env"):
        generator.generate(ASKS)


def test_a_server_that_tells_tempered_logprobs_is_refused(bench):
    """vLLM with --logprobs-mode processed_logprobs: what is told is not the policy's."""
    server = bench.server(tells_tempered=True)
    bench.generator(server).load(bench.snapshots[0], 0)  # at temperature 1 they are the same
    with pytest.raises(ConfigError, match=r"log-probs .*--logprobs-mode raw_logprobs"):
        bench.generator(server, temperature=0.5).load(bench.snapshots[0], 0)
    server.faults.tells_tempered = False
    bench.generator(server, temperature=0.5).load(bench.snapshots[0], 0)

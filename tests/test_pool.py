"""The engines behind HTTP: the contract of all, what each is asked, how each fails, the pool."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import fakes
from fake_servers import CONTEXT, FAKES, FakeVllm, make_snapshot, read_lm
from npd.config import RunConfig
from npd.config.base import ServedConfig
from npd.engines import Refused, Unavailable, build_server
from npd.engines.base import SamplingSettings
from npd.engines.client import Client
from npd.engines.pool import Places, ServerPool
from npd.engines.server_process import ServerSpec
from npd.errors import ConfigError, RunError

PROMPT = [5, 9, 3]
SAMPLING = SamplingSettings(max_new_tokens=8, stop_ids=(fakes.END,))


@asynccontextmanager
async def talking(fake, *, key=None, limit=30.0):
    """npd's side of a fake server, over a client that is closed."""
    client = Client(key, connections=16)
    try:
        connection = client.connect(fake.url, timeout=limit)
        yield build_server(engine_of(fake), connection, refresh_timeout=limit)
    finally:
        await client.aclose()


def ask(fake, do, **kwargs):
    """`do(server)`, to its end."""

    async def run():
        async with talking(fake, **kwargs) as server:
            return await do(server)

    return asyncio.run(run())


def engine_of(fake):
    return next(name for name, kind in FAKES.items() if isinstance(fake, kind))


def complete(server, prompt=PROMPT, sampling=SAMPLING, seed=1, model=None):
    return server.complete(prompt, sampling, seed=seed, model=model)


@pytest.fixture
def snapshot(tmp_path):
    return make_snapshot(tmp_path / "v1", 1)


@pytest.fixture(params=sorted(FAKES))
def fake(request, snapshot):
    with FAKES[request.param](snapshot) as server:
        yield server


# The contract of every engine.


def test_contract_facts(fake):
    facts = ask(fake, lambda server: server.facts())
    assert (facts.models, facts.max_context, facts.can_refresh) == (("base",), CONTEXT, True)
    assert (facts.engine, facts.version) == ("vLLM", "0.32.0")


def test_contract_a_response_comes_with_its_own_logprobs(fake, snapshot):
    lm = read_lm(snapshot)
    endings = set()
    for seed in range(6):
        found = ask(fake, lambda server, seed=seed: complete(server, seed=seed))
        assert 1 <= len(found.ids) <= 8
        assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
        expected = lm.token_logprobs(np.array(PROMPT, np.int32), found.ids)
        assert np.allclose(found.logprobs, expected, atol=1e-6)
        assert (found.ids[-1] == fakes.END) == (found.ending == "stop")
        assert not (found.ids[:-1] == fakes.END).any()
        endings.add(found.ending)
    assert endings == {"stop", "length"}


def test_contract_the_seed_decides(fake):
    drawn = [
        ask(fake, lambda server, seed=seed: complete(server, seed=seed)).ids.tolist()
        for seed in (1, 2, 1, 2**63 - 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1] != drawn[3]


def test_contract_without_a_seed_the_server_draws_its_own(fake):
    drawn = {
        tuple(ask(fake, lambda server: complete(server, seed=None)).ids.tolist()) for _ in range(8)
    }
    assert len(drawn) > 1


def test_contract_greedy(fake, snapshot):
    lm, sampling = read_lm(snapshot), SamplingSettings(5, (), temperature=0.0)
    found = ask(fake, lambda server: complete(server, sampling=sampling))
    whole = list(PROMPT)
    for token in found.ids.tolist():
        assert token == lm.next_logprobs(np.array(whole, np.int32)).argmax()
        whole.append(token)
    assert (len(found.ids), found.ending) == (5, "length")


def test_contract_banned_ids_are_never_drawn(fake):
    banned = tuple(range(2, 30))
    sampling = SamplingSettings(8, (fakes.END,), banned_ids=banned)
    drawn = {
        token
        for seed in range(8)
        for token in ask(
            fake, lambda server, seed=seed: complete(server, sampling=sampling, seed=seed)
        ).ids.tolist()
    }
    assert drawn
    assert not drawn & set(banned)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_contract_reading_gives_own_and_top_logprobs(fake, snapshot, k):
    ids = [4, 8, 8, 2, 31]
    found = ask(fake, lambda server: server.read(ids, k))
    whole = np.array(ids, np.int32)
    rows = read_lm(snapshot).response_logprobs(whole[:1], whole[1:])
    assert np.allclose(found.logprobs, rows[range(4), ids[1:]], atol=1e-6)
    assert found.ids.shape == found.id_logprobs.shape == (4, k)
    assert np.array_equal(found.ids, np.argsort(-rows)[:, :k])
    assert np.allclose(found.id_logprobs, -np.sort(-rows)[:, :k], atol=1e-6)


def test_contract_weights_change_in_place_and_carry_a_tag(fake, snapshot, tmp_path):
    other = make_snapshot(tmp_path / "v2", 2)

    async def refresh(server):
        seen = [(await server.read([4, 8, 2], 0)).logprobs, await server.tag()]
        await server.pause(drain=True)
        await server.load_weights(other)
        await server.resume()
        await server.set_tag("npd-v2-x")
        return [*seen, (await server.read([4, 8, 2], 0)).logprobs, await server.tag()]

    before, old_tag, after, tag = ask(fake, refresh)
    assert (old_tag, tag) == ("default", "npd-v2-x")
    for logprobs, path in ((before, snapshot), (after, other)):
        expected = read_lm(path).token_logprobs(np.array([4]), np.array([8, 2]))
        assert np.allclose(logprobs, expected, atol=1e-6)


def test_contract_setting_the_tag_cuts_nothing_off(fake):
    async def retag(server):
        await server.set_tag("npd-v0-y")
        return await server.tag()

    assert ask(fake, retag) == "npd-v0-y"


def test_contract_holding_cuts_off_and_keeps_what_was_written(fake, snapshot):
    fake.faults.token_seconds = 0.02
    endless = SamplingSettings(400, ())

    async def cut(server):
        writing = asyncio.create_task(complete(server, sampling=endless))
        await asyncio.to_thread(fake.engine.await_tokens, 2)
        await server.pause(drain=False)
        piece = await writing
        waiting = asyncio.create_task(complete(server))
        await asyncio.sleep(0.1)
        was_held_up = not waiting.done()
        await server.resume()
        return piece, was_held_up, await waiting

    piece, was_held_up, later = ask(fake, cut)
    assert piece.ending == "abort"
    assert 2 <= len(piece.ids) < 400
    expected = read_lm(snapshot).token_logprobs(np.array(PROMPT, np.int32), piece.ids)
    assert np.allclose(piece.logprobs, expected, atol=1e-6)
    assert was_held_up
    assert later.ending in ("stop", "length")


def test_contract_adapters_are_served_by_name(fake, snapshot, tmp_path):
    adapter = make_snapshot(tmp_path / "lora", 2, base=snapshot)

    async def use(server):
        await server.load_adapter(adapter, "npd-v1")
        await server.load_adapter(adapter, "npd-v1")  # again is fine
        both = [await server.read([4, 8, 2], 0, model=name) for name in (None, "npd-v1")]
        written = await complete(server, model="npd-v1")
        await server.unload_adapter("npd-v1")
        await server.unload_adapter("npd-v1")
        return both, written

    both, written = ask(fake, use)
    for found, path in zip(both, (snapshot, adapter), strict=True):
        expected = read_lm(path).token_logprobs(np.array([4]), np.array([8, 2]))
        assert np.allclose(found.logprobs, expected, atol=1e-6)
    expected = read_lm(adapter).token_logprobs(np.array(PROMPT, np.int32), written.ids)
    assert np.allclose(written.logprobs, expected, atol=1e-6)
    assert fake.engine.adapters == {}


def test_contract_a_refused_prompt_says_why(fake):
    fake.faults.refuses = lambda prompt: prompt == PROMPT
    with pytest.raises(Refused, match=rf"{fake.url} refuses \(400\): this prompt is too long"):
        ask(fake, complete)


@pytest.mark.parametrize("fault", [{"unavailable": 1}, {"drops": 2}, {"is_broken": True}])
def test_contract_what_may_pass_is_unavailable(fake, fault):
    vars(fake.faults).update(fault)
    with pytest.raises(Unavailable, match=fake.url) as caught:
        ask(fake, complete)
    assert not caught.value.timed_out
    assert "\n" not in str(caught.value)


def test_contract_a_connection_closed_by_the_server_is_no_failure(fake):
    """After an error of its own a server closes the connection, as the next request is sent."""
    fake.faults.drops = 1
    assert len(ask(fake, complete).ids)
    assert len(fake.sent("/v1/completions")) == 2


def test_contract_silence_is_told_from_a_refusal(fake):
    fake.faults.hangs = True
    with pytest.raises(Unavailable, match=r"no answer to /.* within 0\.2 s") as caught:
        ask(fake, complete, limit=0.2)
    assert caught.value.timed_out


def test_contract_health(fake):
    assert ask(fake, lambda server: server.is_healthy())
    fake.faults.is_broken = True
    assert not ask(fake, lambda server: server.is_healthy())
    fake.close()
    assert not ask(fake, lambda server: server.is_healthy())


def test_contract_a_wrong_key_names_the_remedy(fake):
    fake.faults.key = "right"
    assert len(ask(fake, complete, key="right").ids)
    for key in (None, "wrong"):
        with pytest.raises(Refused, match=r"\(401\): .*api_key_env"):
            ask(fake, complete, key=key)


def test_contract_no_weight_calls_is_a_config_error(fake, snapshot):
    fake.faults.is_locked = True
    with pytest.raises(ConfigError, match=rf"{fake.url} .*no /.*: "):
        ask(fake, lambda server: server.pause(drain=False))

    async def rest(server):
        await server.set_tag("x")
        return await server.tag()

    assert ask(fake, rest) is None


def test_contract_no_adapters_is_a_config_error(fake, snapshot):
    fake.faults.has_loras = False
    with pytest.raises(ConfigError, match="--enable-lora"):
        ask(fake, lambda server: server.load_adapter(snapshot, "npd-v1"))


def spoilt(content, value):
    """An answer with `value` for every number with a fraction: its log-probs."""
    if isinstance(content, dict):
        return {key: spoilt(item, value) for key, item in content.items()}
    if isinstance(content, list):
        return [spoilt(item, value) for item in content]
    return value if isinstance(content, float) else content


CALLS = {
    "complete": complete,
    "read": lambda server: server.read([4, 8, 2], 3),
    "facts": lambda server: server.facts(),
}


@pytest.mark.parametrize("call", ["complete", "read"])
@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), 1e300, "x", [], {"a": 1}])
def test_contract_logprobs_that_are_none_are_no_answer(fake, call, value):
    fake.faults.spoils = lambda content: spoilt(content, value)
    with pytest.raises(Unavailable, match=rf"{fake.url} sends a response that npd cannot parse: "):
        ask(fake, CALLS[call])


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("content", [{}, [], 7, "words", {"data": 1, "choices": []}])
def test_contract_an_answer_of_another_shape_is_none(fake, call, content):
    fake.faults.spoils = lambda _: json.dumps(content)
    with pytest.raises(Unavailable, match=rf"{fake.url} sends a response that npd cannot parse: "):
        ask(fake, CALLS[call])


@pytest.mark.parametrize("ids", [[1.5], [None], ["x"], [[1]], [-1], [2**40], [1, 2], [], {}, 3])
def test_vllm_token_ids_that_are_none_are_no_answer(snapshot, ids):
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
    with FakeVllm(snapshot) as fake:
        fake.faults.spoils = lambda content: {**content, "choices": [choice]}
        with pytest.raises(Unavailable, match="cannot parse: "):
            ask(fake, lambda server: server.complete(PROMPT, SAMPLING, seed=1, model="base"))


@pytest.mark.parametrize("ending", [None, "tool_calls", ["stop"], 3])
def test_vllm_an_ending_that_is_none_is_no_answer(snapshot, ending):
    choice = {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": ending}
    with FakeVllm(snapshot) as fake:
        fake.faults.spoils = lambda content: {**content, "choices": [choice]}
        with pytest.raises(Unavailable, match="cannot parse: "):
            ask(fake, lambda server: server.complete(PROMPT, SAMPLING, seed=1, model="base"))


def test_vllm_without_weight_calls_may_be_locked_or_too_old(snapshot):
    said = r"no /collective_rpc.*DEV_MODE=1.*upgrade.* 0\.32"
    with (
        FakeVllm(snapshot, lacks=("/collective_rpc",)) as fake,
        pytest.raises(ConfigError, match=said),
    ):
        ask(fake, lambda server: server.load_weights(snapshot))


def test_contract_weights_that_are_not_there(fake, tmp_path):
    with pytest.raises((Refused, Unavailable), match="nowhere"):
        ask(fake, lambda server: server.load_weights(tmp_path / "nowhere"))


# What only one of them has.


def test_vllm_is_asked_for_the_policy_itself(snapshot):
    with FakeVllm(snapshot) as fake:
        ask(fake, complete)
        (body,) = fake.sent("/v1/completions")
    off = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **off, "seed": 1}
    assert wanted.items() <= body.items()
    assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [fakes.END])
    assert "logit_bias" not in body


def test_vllm_forgets_prefixes_or_fails(snapshot):
    with FakeVllm(snapshot, keeps_prefixes=True) as fake:
        with pytest.raises(Unavailable, match="prefixes"):
            ask(fake, lambda server: server.load_weights(snapshot))
        assert fake.engine.tag == "default"


def test_an_old_vllm_without_weight_versions(snapshot):
    lacks = ("/weight_info", "/update_weight_version", "/version")
    with FakeVllm(snapshot, lacks=lacks) as fake:

        async def look(server):
            await server.set_tag("x")
            return await server.tag(), (await server.facts()).version

        assert ask(fake, look) == (None, None)


# Over several servers.


def pool_of(*fakes_, engine="vllm", patience=0.0, timeout=30.0, log=Path("server.log"), **kwargs):
    config = ServedConfig(
        urls=tuple(fake.url for fake in fakes_),
        request_timeout=timeout,
        patience=patience,
        **kwargs,
    )
    return ServerPool(engine, config, log=log)


def ask_pool(pool, prompts, at_once=4):
    """A completion of each prompt, or its error, by the pool."""

    async def run():
        await pool.open(ServerSpec("x", "float32", CONTEXT), connections=at_once)
        try:
            return await pool.run_jobs(
                prompts, lambda server, p: complete(server, p), at_once=at_once
            )
        finally:
            await pool.close()

    return asyncio.run(run())


PROMPTS = [[i, 7] for i in range(12)]


@pytest.fixture
def pair(snapshot):
    with FakeVllm(snapshot) as one, FakeVllm(snapshot) as other:
        yield one, other


def test_pool_spreads_jobs_and_keeps_their_order(pair, snapshot):
    for fake in pair:
        fake.faults.token_seconds = 0.002
    found = ask_pool(pool_of(*pair), PROMPTS)
    lm = read_lm(snapshot)
    for prompt, item in zip(PROMPTS, found, strict=True):
        expected = lm.token_logprobs(np.array(prompt, np.int32), item.ids)
        assert np.allclose(item.logprobs, expected, atol=1e-6)
    assert all(fake.engine.num_written for fake in pair)
    assert ask_pool(pool_of(*pair), []) == []


def test_pool_fails_a_refused_job_alone(pair):
    for fake in pair:
        fake.faults.refuses = lambda prompt: prompt == PROMPTS[3]
    found = ask_pool(pool_of(*pair), PROMPTS)
    assert [i for i, item in enumerate(found) if isinstance(item, Refused)] == [3]
    assert sum(len(fake.sent("/v1/completions")) for fake in pair) == len(PROMPTS)


def test_pool_asks_again_after_a_passing_failure(pair):
    pair[0].faults.unavailable, pair[1].faults.drops = 2, 4
    found = ask_pool(pool_of(*pair, patience=5.0), PROMPTS)
    assert not [item for item in found if isinstance(item, Exception)]


def test_pool_leaves_a_dead_server_to_the_others(pair):
    pair[0].close()
    found = ask_pool(pool_of(*pair, patience=1e6), PROMPTS)  # which nobody waits for
    assert not [item for item in found if isinstance(item, Exception)]
    assert pair[1].engine.num_written == len(PROMPTS)


def test_pool_without_any_server_names_them_all(pair):
    for fake in pair:
        fake.close()
    with pytest.raises(RunError, match="no server is left that responds") as caught:
        ask_pool(pool_of(*pair), PROMPTS)
    message = str(caught.value)
    assert all(fake.url in message for fake in pair)
    assert "\n" not in message
    assert "--resume" in message


def test_pool_gives_up_a_job_that_fails_on_a_healthy_server(snapshot):
    with FakeVllm(snapshot, unavailable=1000) as fake:
        (found,) = ask_pool(pool_of(fake), [PROMPT])
        assert isinstance(found, Unavailable)
        assert len(fake.sent("/v1/completions")) == 3


def with_pool(pool, use, at_once=4):
    """What `use` finds with the pool open."""

    async def run():
        await pool.open(ServerSpec("x", "float32", CONTEXT), connections=at_once)
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_pool_deals_the_first_jobs_out_evenly(pair):
    async def use(pool):
        asked, go = [], asyncio.Event()

        async def do(server, job):
            asked.append(server.name)
            if len(asked) == 6:
                go.set()
            await go.wait()

        await pool.run_jobs(range(6), do, at_once=6)
        return asked

    asked = with_pool(pool_of(*pair), use)
    assert [asked.count(fake.url) for fake in pair] == [3, 3]


def test_pool_calls_share_the_places_and_the_older_goes_first(snapshot):
    async def use(pool):
        running, most, begun, is_begun = 0, 0, [], asyncio.Event()

        async def do(server, job):
            nonlocal running, most
            begun.append(job)
            is_begun.set()
            running += 1
            most = max(most, running)
            for _ in range(5):
                await asyncio.sleep(0)
            running -= 1
            return job

        def call(name):
            jobs = [(name, i) for i in range(40)]
            return asyncio.create_task(pool.run_jobs(jobs, do, at_once=4))

        older = call("older")
        await is_begun.wait()
        found = await asyncio.gather(older, call("newer"))
        return most, begun, found

    with FakeVllm(snapshot) as fake:
        most, begun, found = with_pool(pool_of(fake), use)
    assert most == 4
    assert [name for name, _ in begun] == ["older"] * 40 + ["newer"] * 40
    assert found == [[(name, i) for i in range(40)] for name in ("older", "newer")]


def test_pool_places_outlive_calls_that_are_cancelled():
    async def story():
        places, begun = Places(1), []
        until, never, is_last = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def work(order, until):
            async with places.taken(order):
                begun.append(order)
                if order == 3:
                    is_last.set()
                await until.wait()

        holder = asyncio.create_task(work(0, until))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(work(order, never)) for order in (3, 1, 2)]
        await asyncio.sleep(0)
        waiting[1].cancel()  # while it waits
        until.set()
        await holder
        waiting[2].cancel()  # at the moment in which it is given the place
        await is_last.wait()
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        async with places.taken(9):
            return begun

    assert asyncio.run(story()) == [0, 3]


def test_pool_has_a_survivor_do_all_with_all_its_slots(pair):
    pair[0].close()

    async def use(pool):
        running, go = [], asyncio.Event()

        async def do(server, job):
            if server.name == pair[0].url:
                raise Unavailable(server.name, "does not answer")
            running.append(job)
            if len(running) == 8:
                go.set()
            await go.wait()
            return job

        # Were there fewer slots than jobs at once, none would end.
        return await asyncio.wait_for(pool.run_jobs(range(8), do, at_once=8), 20.0)

    assert with_pool(pool_of(*pair, patience=1e6), use) == list(range(8))


def test_pool_asks_a_server_that_let_the_time_pass_nothing_more(pair, caplog):
    """For the rest of its life, though the server says that it is well."""

    async def use(pool):
        asked = []

        async def do(server, job):
            asked.append(server.name)
            if server.name == pair[0].url:
                raise Unavailable(server.name, "gave no answer", timed_out=True)
            return job

        for _ in range(2):
            assert await pool.run_jobs(range(6), do, at_once=2) == list(range(6))
        managed = [admin.name for admin in pool.admins]
        await pool.close()
        await pool.open(ServerSpec("x", "float32", CONTEXT), connections=4)
        return asked, managed, [server.name for server in pool.servers]

    asked, managed, opened = with_pool(pool_of(*pair), use)
    assert asked[0] == pair[0].url
    assert asked[-6:] == [pair[1].url] * 6
    assert managed == opened == [pair[1].url]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith(f"{pair[0].url} gave no answer")


def test_pool_names_the_servers_that_let_the_time_pass(pair):
    async def use(pool):
        async def do(server, job):
            raise Unavailable(server.name, "gave no answer", timed_out=True)

        for _ in range(2):
            with pytest.raises(RunError, match=r"raise request_timeout .*--resume") as caught:
                await pool.run_jobs([1], do, at_once=2)
            assert all(fake.url in str(caught.value) for fake in pair)
        assert pool.is_open

    with_pool(pool_of(*pair), use)


def test_pool_survives_a_restart_within_its_patience(snapshot):
    first = FakeVllm(snapshot)
    first.close()
    port = int(first.url.rpartition(":")[2])
    pool = pool_of(first, patience=10.0)

    def restart():
        time.sleep(0.3)
        with FakeVllm(snapshot, port=port) as again:
            back.append(again)
            while not ended:
                time.sleep(0.02)

    back, ended = [], []
    thread = Thread(target=restart)
    thread.start()
    try:
        found = ask_pool(pool, PROMPTS)
    finally:
        ended.append(True)
        thread.join()
    assert not [item for item in found if isinstance(item, Exception)]
    assert back[0].engine.num_written == len(PROMPTS)


def test_pool_manages_each_server_behind_a_load_balancer(pair):
    pool = pool_of(pair[0])

    async def run():
        urls = [fake.url for fake in pair]
        await pool.open(ServerSpec("x", "float32", CONTEXT), connections=2, admin_urls=urls)
        names = [s.name for s in pool.servers], [s.name for s in pool.admins]
        await pool.close()
        return names, pool.is_open

    (asked, managed), is_open = asyncio.run(run())
    assert asked == [pair[0].url]
    assert managed == [fake.url for fake in pair]
    assert not is_open


def test_pool_takes_its_key_from_the_environment(snapshot, monkeypatch):
    with FakeVllm(snapshot, key="sesame") as fake:
        monkeypatch.setenv("MY_KEY", "sesame")
        assert len(ask_pool(pool_of(fake, api_key_env="MY_KEY"), [PROMPT])[0].ids)
        with pytest.raises(Refused, match="api_key_env"):
            ask_pool(pool_of(fake, api_key_env="NO_KEY"), [PROMPT])


# What a config may say of them.

URL = "http://10.0.0.5:8000"


def config(**generate):
    return RunConfig.model_validate(
        {"student": "s", "teacher": "t", "schedule": {"epochs": 10}, "generate": generate}
    )


@pytest.mark.parametrize(
    ("generate", "remedy"),
    [
        ({"engine": "vllm"}, "set exactly one of generate.urls .* and generate.launch"),
        ({"engine": "vllm", "urls": [URL], "launch": {}}, "exactly one of"),
        ({"urls": [URL]}, "set generate.engine: vllm, or leave them out"),
        ({"launch": {}}, "set generate.engine: vllm"),
        (
            {"engine": "vllm", "urls": [URL], "workers": 2},
            r"the servers of generate.urls \(1\)",
        ),
        ({"engine": "vllm", "urls": ["10.0.0.5:8000"]}, "generate.urls must be URLs like"),
        ({"engine": "vllm", "launch": {"gpus": ["0"]}, "workers": 2}, "one entry per worker"),
        (
            {"engine": "vllm", "launch": {"venv": "v", "command": ["c"]}},
            "only one of venv and command",
        ),
        ({"engine": "vllm", "urls": [URL], "source": "dataset"}, "leave generate.engine out"),
        ({"engine": "sglang", "urls": [URL]}, r"'sglang' is not supported: .*engine: vllm"),
    ],
)
def test_a_config_that_cannot_be_served_says_what_to_do(generate, remedy):
    with pytest.raises(ConfigError, match=remedy):
        config(**generate)


@pytest.mark.parametrize(
    "generate",
    [
        {"engine": "vllm", "urls": [URL, f"{URL}/prefix/"], "workers": 2, "temperature": 0.7},
        {"engine": "vllm", "launch": {"gpus": ["0", "1"]}, "workers": 2, "temperature": 0.0},
    ],
)
def test_a_config_that_can_be_served(generate):
    assert config(**generate).generate.engine == generate["engine"]

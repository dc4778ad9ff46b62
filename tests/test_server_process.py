"""Servers that npd starts: they come up behind a key, and nothing of them outlives npd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import fakes
import npd
from fake_servers import CONTEXT, make_snapshot, read_lm
from npd.config import GenerateConfig, ScoreConfig
from npd.config.base import LaunchConfig, ServedConfig
from npd.engines import Unavailable
from npd.engines.auth_middleware.npd_auth import RequireKey
from npd.engines.base import SamplingSettings
from npd.engines.client import Client
from npd.engines.pool import ServerPool
from npd.engines.server_process import (
    ServerProcess,
    ServerSpec,
    generator_spec,
    last_error,
    private_settings,
    program_of,
    server_command,
    teacher_spec,
)
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.generate.served import ServedGenerator, ServingContext
from npd.types import Rollout

ENGINE = (sys.executable, str(Path(__file__).parent / "fake_engine.py"))


@pytest.fixture
def snapshot(tmp_path):
    return make_snapshot(tmp_path / "v0", 1)


@pytest.fixture
def started(tmp_path, snapshot):
    """Builds servers and starts them; ends those that are left."""
    processes = []

    def start(*args, engine="vllm", timeout=600.0, spec=None, **kwargs):
        pids = tmp_path / f"pids{len(processes)}"
        launch = LaunchConfig(
            command=ENGINE,
            args=("--pids", str(pids), *args),
            start_timeout=timeout,
            **kwargs,
        )
        spec = spec or ServerSpec(str(snapshot), "float32", CONTEXT)
        process = ServerProcess(engine, launch, spec, tmp_path / "logs" / "server.log")
        processes.append(process)
        process.start()
        return process, json.loads(pids.read_text())

    yield start
    for process in processes:
        process.stop()


def is_there(pid):
    """Whether a process runs (one that has ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pids):
    """Return when none of them runs; the test's own time limit bounds it."""
    while any(map(is_there, pids)):
        time.sleep(0.02)


def status(url, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def flags_of(process):
    line = next(x for x in process.log.read_text().splitlines() if x.startswith("FLAGS"))
    return json.loads(line.removeprefix("FLAGS"))


def test_a_server_has_room_for_what_it_is_asked(tmp_path, snapshot):
    settings = (tmp_path / "v0" / "config.json", {"vocab_size": 32})
    for limit, longest, written, read in (
        (512, 200, 200, 201),
        (512, 60, 129, 61),  # a generator's server reads the fingerprint
        (512, 512, 512, 512),
        (100, 60, 100, 61),
    ):
        settings[0].write_text(json.dumps(settings[1] | {"max_position_embeddings": limit}))
        assert generator_spec(GenerateConfig(), snapshot, longest, False) == ServerSpec(
            str(snapshot), "bfloat16", written
        )
        config = ScoreConfig(top_k=10, dtype="float32")
        assert teacher_spec(config, snapshot, longest, 64, True) == ServerSpec(
            str(snapshot), "float32", read, 64, trust_remote_code=True
        )
        assert teacher_spec(config, snapshot, longest, 0, True).max_logprobs == 10
    adapter = make_snapshot(tmp_path / "v1", 2, base=snapshot)
    found = generator_spec(GenerateConfig(), adapter, 60, False)
    assert (found.model, found.lora_rank) == (str(snapshot), 8)


def test_a_server_comes_up_behind_a_key_and_goes(started):
    process, pids = started("--do", "spawn")
    assert process.is_running
    process.check()
    assert process.url.startswith("http://127.0.0.1:")
    assert len(process.key) > 20
    assert status(f"{process.url}/v1/models", process.key) == 200
    assert status(f"{process.url}/v1/models") == 401
    assert status(f"{process.url}/v1/models", "another") == 401
    port = process.url.rpartition(":")[2]
    assert process.log.name == f"server-{port}.log"
    assert "AUTH True" in process.log.read_text()
    process.stop()
    await_end(pids)
    assert not process.is_running
    process.stop()  # again is fine


def test_two_servers_have_ports_keys_and_logs_of_their_own(started):
    (one, _), (other, _) = started(), started()
    assert len({one.url, other.url}) == len({one.key, other.key}) == len({one.log, other.log}) == 2


def value(flags, name):
    return flags[flags.index(name) + 1]


def test_vllm_is_told_what_it_needs_and_never_its_key(started, snapshot):
    spec = ServerSpec(str(snapshot), "float32", 300, max_logprobs=10, lora_rank=12)
    process, _ = started("--max-num-seqs", "7", spec=spec, tensor_parallel=2)
    flags = flags_of(process)
    wanted = {"--model": str(snapshot), "--host": "127.0.0.1", "--max-model-len": "300"}
    wanted |= {"--dtype": "float32", "--max-logprobs": "10", "--max-lora-rank": "16"}
    wanted |= {"--tensor-parallel-size": "2", "--middleware": "npd_auth.RequireKey"}
    wanted |= {"--served-model-name": "npd", "--generation-config": "vllm"}
    assert {name: value(flags, name) for name in wanted} == wanted
    assert "--enable-lora" in flags
    assert flags[-2:] == ["--max-num-seqs", "7"]  # the user's have the last word
    assert process.key not in " ".join(flags)


def test_a_share_of_the_gpu_is_passed_on_where_it_is_decided():
    spec, flag = ServerSpec("m", "float32", 64), "--gpu-memory-utilization"
    assert flag not in server_command("vllm", LaunchConfig(command=ENGINE), spec, port=1)
    decided = LaunchConfig(command=ENGINE, memory=0.26, args=("--max-num-seqs", "7"))
    command = server_command("vllm", decided, spec, port=1)
    assert value(command, flag) == "0.26"
    assert command[-2:] == ["--max-num-seqs", "7"]


def test_no_key_is_taken_for_an_option(tmp_path, snapshot):
    spec, launch = ServerSpec(str(snapshot), "float32", CONTEXT), LaunchConfig(command=ENGINE)
    made = [ServerProcess("vllm", launch, spec, tmp_path / "server.log") for _ in range(2000)]
    assert all(process.key.isalnum() and len(process.key) >= 43 for process in made)
    assert len({process.key for process in made}) == 2000


CANARIES = {
    "HF_TOKEN": "canary-hf", "DB_PASSWD": "canary-db", "X_AUTH": "canary-auth",
    "MY_CREDENTIALS": "canary-cred", "DATABASE": "postgres://me:canary-url@host/db",
}  # fmt: skip


def test_secrets_reach_a_server_unseen(started, monkeypatch):
    """Neither on a command line nor in its log, which has all that it was started with."""
    monkeypatch.setenv("LATIN_PASS", "caf\udce9-secret")  # bytes that are no UTF-8
    flags = ("--hf-token", "canary-flag", "--admin-api-key=canary-admin", "--pad-token", "--x")
    process, pids = started(*flags, "--show-secrets", env=CANARIES)
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in (*pids, process._popen.pid)]
    log = process.log.read_text()
    for text in (*lines, log):
        assert "canary" not in text
        assert process.key not in text
    assert "--pad-token" in lines[0]  # has no value
    assert log.count("***") >= 2 + len(CANARIES)  # it had them all, and printed them
    assert "HF_TOKEN *** " in log


def test_a_config_file_of_the_users_own_stays_where_it_is():
    launch = LaunchConfig(command=ENGINE, args=("--config", "x.yaml", "--hf-token", "t"))
    spec = ServerSpec("m", "float32", 64)
    assert server_command("vllm", launch, spec, port=1)[-4:] == list(launch.args)
    assert private_settings(launch).settings == {}


@pytest.mark.parametrize("status", ["HTTP/1.1 503 No\r\n\r\n", "HTTP/1.1 2", "HTTP/1.1 2000", ""])
def test_a_server_that_is_not_well_is_not_ready(tmp_path, status):
    """Whatever answers in its place, an answer is waited for a second at most."""
    process = ServerProcess("vllm", LaunchConfig(), ServerSpec("x", "float32", 64), tmp_path / "l")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answering = threading.Thread(target=lambda: answer_slowly(listener, status))
        answering.start()
        started = time.monotonic()
        assert not process._answers()
        answering.join()
        assert time.monotonic() - started < 30


def answer_slowly(listener, status):
    channel = listener.accept()[0]
    with channel, suppress(OSError):
        channel.sendall(status.encode())
        time.sleep(1.5)


def test_a_command_may_place_the_model_itself(tmp_path, snapshot):
    launch = LaunchConfig(command=(*ENGINE, "--model", "{model}"), start_timeout=600.0)
    spec = ServerSpec(str(snapshot), "float32", CONTEXT)
    process = ServerProcess("vllm", launch, spec, tmp_path / "server.log")
    try:
        process.start()
        assert flags_of(process).count("--model") == 1
        assert value(flags_of(process), "--model") == str(snapshot)
    finally:
        process.stop()


def test_a_killed_server_is_a_lost_worker_and_takes_its_children_along(started):
    process, pids = started("--do", "spawn")
    os.kill(pids[0], signal.SIGKILL)
    await_end(pids)
    while process.is_running:
        time.sleep(0.02)
    with pytest.raises(WorkerLostError, match=r"ended by signal 9.*: see .*server-\d+\.log"):
        process.check()


def test_a_server_may_end_by_itself_or_at_once(started):
    for at_once, number in ((False, signal.SIGTERM), (True, signal.SIGKILL)):
        process, _ = started()
        process.stop(at_once=at_once)
        with pytest.raises(WorkerLostError, match=f"ended by signal {number:d}"):
            process.check()


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_is_left_of_a_server_once_it_has_stopped(started, at_once):
    process, pids = started("--do", "stay")
    process.stop(at_once=at_once)
    assert len(pids) == 2
    assert not any(map(is_there, pids))


@pytest.mark.parametrize("at_once", [False, True])
def test_what_hides_in_sessions_of_its_own_is_ended_too(started, at_once):
    process, pids = started("--do", "hide")
    assert len(pids) == 3
    assert all(map(is_there, pids))
    process.stop(at_once=at_once)
    assert not any(map(is_there, pids))


def test_what_hides_is_ended_with_a_server_that_ends_by_itself(started):
    process, pids = started("--do", "hide")
    os.kill(pids[0], signal.SIGKILL)
    await_end(pids)
    process.stop()


def test_what_hides_is_ended_where_the_supervisor_is_killed(started):
    process, pids = started("--do", "hide")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with stranger:
        try:
            process._popen.kill()
            process.stop()
            assert not any(map(is_there, pids))
            assert stranger.poll() is None
        finally:
            stranger.kill()


OWNER = """
import json, sys, time
from pathlib import Path
from npd.config.base import LaunchConfig
from npd.engines.server_process import ServerProcess, ServerSpec
command, model, log, pids = json.loads(sys.argv[1])
launch = LaunchConfig(command=command, args=("--do", "hide", "--pids", pids))
ServerProcess("vllm", launch, ServerSpec(model, "float32", 64), Path(log)).start()
print("up", flush=True)
time.sleep(600)
"""


def test_nothing_outlives_an_owner_that_is_killed(tmp_path, snapshot):
    pids = tmp_path / "pids"
    given = [ENGINE, str(snapshot), str(tmp_path / "server.log"), str(pids)]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, json.dumps(given)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(npd.__file__).parents[1])},
    )
    with owner:
        try:
            assert owner.stdout.readline() == b"up\n"
        finally:
            owner.kill()
    found = json.loads(pids.read_text())
    assert len(found) == 3
    await_end(found)


def test_a_server_that_ends_at_once_says_why(started):
    with pytest.raises(RunError, match=r"exited with code 3 \(ValueError: no room for it\): see"):
        started("--do", "exit")


def test_a_server_that_is_killed_before_it_is_ready_is_a_lost_worker(started):
    with pytest.raises(WorkerLostError, match=r"ended by signal 9: see"):
        started("--do", "die")


@pytest.mark.parametrize(("do", "how"), [("odd", "exited with code 255"), ("crash", "code 134")])
def test_a_server_that_crashes_at_once_is_not_tried_again(started, do, how):
    with pytest.raises(RunError, match=how) as caught:
        started("--do", do)
    assert not isinstance(caught.value, WorkerLostError)


def test_a_killed_supervisor_is_a_lost_worker(started):
    process, pids = started()
    process._popen.kill()
    # Its children are told of its death just before the system says that it has ended.
    await_end([process._popen.pid, *pids])
    with pytest.raises(WorkerLostError, match="ended by signal 9"):
        process.check()


def test_a_server_that_is_not_ready_in_time_is_ended(started, tmp_path):
    with pytest.raises(RunError, match=r"not ready within 1\.5 s: see .*launch\.start_timeout"):
        started("--do", "wait", timeout=1.5)
    await_end(json.loads((tmp_path / "pids0").read_text()))


def test_what_cannot_be_started_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nowhere is not a virtual environment.*install vllm"):
        program_of("vllm", LaunchConfig(venv=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"no vllm to start: set launch\.venv"):
        program_of("vllm", LaunchConfig())
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = program_of("vllm", LaunchConfig(venv=str(tmp_path / "venv")))
    assert list(found) == [str(python), "-m", "vllm.entrypoints.openai.api_server"]


def test_a_program_that_is_not_there_is_one_line(tmp_path):
    launch = LaunchConfig(command=(str(tmp_path / "nothing"),))
    process = ServerProcess("vllm", launch, ServerSpec("x", "float32", 64), tmp_path / "log")
    with pytest.raises(
        RunError, match=r"the vllm server for x exited with code .*nothing"
    ) as caught:
        process.start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ("all is well\n", ""),
        ("ValueError: first\nRuntimeError: last\nbye\n", "RuntimeError: last"),
        (
            "(APIServer pid=12) ERROR 11-25 10:00:00 [core.py:7] torch.OutOfMemoryError: CUDA\n"
            "(APIServer pid=12) INFO 11-25 10:00:01 [x.py:1] ok\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        ("api_server.py: error: unrecognized arguments: --x\n", None),
        ("OSError: a\nTraceback (most recent call last):\n", "OSError: a"),
        ("RuntimeError: " + "x" * 1000, "RuntimeError: " + "x" * 286),
    ],
)
def test_the_last_error_of_a_log(tmp_path, log, cause):
    path = tmp_path / "log"
    path.write_text(log)
    assert last_error(path) == (log.strip() if cause is None else cause)
    assert last_error(tmp_path / "none") == ""


# A generator with a server of its own.


def make_generator(tmp_path, *args, **kwargs):
    launch = LaunchConfig(command=ENGINE, args=args, start_timeout=600.0)
    config = GenerateConfig(engine="vllm", launch=launch, max_new_tokens=6, **kwargs)
    around = ServingContext(tmp_path / "server.log", CONTEXT)
    return ServedGenerator(config, around, stop_ids=(fakes.END,))


def num_started(tmp_path):
    return len(list(tmp_path.glob("server-*.log")))


def test_a_generator_starts_refreshes_and_loses_its_server(tmp_path, snapshot):
    pids = tmp_path / "pids"
    generator = make_generator(tmp_path, "--pids", str(pids))
    try:
        for version, path in enumerate((snapshot, make_snapshot(tmp_path / "v1", 2))):
            generator.load(path, version)
            found = generator.generate(fakes.make_requests(5))
            assert {rollout.version for rollout in found} == {version}
            assert all(isinstance(item, Rollout) for item in found)
        assert num_started(tmp_path) == 1
        os.kill(json.loads(pids.read_text())[0], signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"the vllm server at .* signal 9"):
            generator.generate(fakes.make_requests(5))
    finally:
        generator.close()


def test_a_forgetful_server_of_ours_is_begun_again(tmp_path, snapshot):
    generator = make_generator(tmp_path, "--faults", json.dumps({"forgets_reload": True}))
    try:
        generator.load(snapshot, 0)
        generator.load(make_snapshot(tmp_path / "v1", 2), 1)
        assert {rollout.version for rollout in generator.generate(fakes.make_requests(5))} == {1}
        assert num_started(tmp_path) == 2
    finally:
        generator.close()


def test_a_hanging_server_of_ours_is_a_lost_worker(tmp_path, snapshot):
    faults = json.dumps({"hangs": True})
    generator = make_generator(tmp_path, "--faults", faults, request_timeout=1.0)
    try:
        with pytest.raises(WorkerLostError, match="hangs and is restarted"):
            generator.load(snapshot, 0)
    finally:
        generator.close()


# A pool with a server of its own.


def make_pool(tmp_path, *args, **kwargs):
    launch = LaunchConfig(
        command=ENGINE, args=("--pids", str(tmp_path / "pids"), *args), start_timeout=600.0
    )
    return ServerPool("vllm", ServedConfig(launch=launch, **kwargs), log=tmp_path / "server.log")


def pids_of(tmp_path):
    return json.loads((tmp_path / "pids").read_text())


def with_pool(pool, snapshot, use):
    """What `use` finds with the pool open on a snapshot."""

    async def run():
        await pool.open(ServerSpec(str(snapshot), "float32", CONTEXT), connections=4)
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_a_pool_that_waits_for_its_server_can_be_cancelled(tmp_path, snapshot):
    pool = make_pool(tmp_path, "--do", "wait")

    async def cancel():
        opening = asyncio.create_task(
            pool.open(ServerSpec(str(snapshot), "float32", CONTEXT), connections=4)
        )
        while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text()):
            assert not opening.done()
            await asyncio.sleep(0.02)
        assert all(map(is_there, pids_of(tmp_path)))
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(cancel())
    assert not any(map(is_there, pids_of(tmp_path)))
    assert not pool.is_open


@pytest.mark.parametrize("is_hung", [True, False])
def test_nothing_is_left_of_a_server_that_is_lost(tmp_path, snapshot, is_hung):
    async def lose(pool):
        pids, (server,) = pids_of(tmp_path), pool.servers
        if not is_hung:
            os.kill(pids[0], signal.SIGKILL)

        async def do(server, job):
            raise Unavailable(server.name, "does not answer", timed_out=is_hung)

        with pytest.raises(WorkerLostError, match="hangs" if is_hung else "signal 9"):
            await pool.run_jobs([1], do, at_once=1)
        assert not any(map(is_there, pids))
        with pytest.raises(WorkerLostError, match="ended by signal 9"):  # without any grace
            pool.check(Unavailable(server.name, "is gone"))

    with_pool(make_pool(tmp_path, "--do", "stay"), snapshot, lose)


def test_a_server_that_stays_silent_is_ended_too(tmp_path, snapshot):
    async def lose(pool):
        async def do(server, job):
            os.kill(pids_of(tmp_path)[0], signal.SIGSTOP)
            raise Unavailable(server.name, "fails")

        with pytest.raises(WorkerLostError, match="fails: it is restarted"):
            await pool.run_jobs([1], do, at_once=1)
        assert not any(map(is_there, pids_of(tmp_path)))

    with_pool(make_pool(tmp_path, patience=0.0), snapshot, lose)


def test_a_pool_ends_its_server_even_if_its_client_does_not_close(tmp_path, snapshot, monkeypatch):
    close = Client.aclose

    async def fail(client):
        await close(client)
        raise OSError("no")

    async def nothing(pool):
        monkeypatch.setattr(Client, "aclose", fail)

    pool = make_pool(tmp_path)
    with pytest.raises(OSError, match="no"):
        with_pool(pool, snapshot, nothing)
    assert not any(map(is_there, pids_of(tmp_path)))
    assert not pool.is_open


def test_a_server_is_started_anew_under_those_who_ask_it(tmp_path, snapshot):
    """What is being asked meanwhile fails, waits for the new server and is asked of that."""
    other = make_snapshot(tmp_path / "v1", 2)
    sampling = SamplingSettings(10, ())
    prompts = [[token, 7] for token in range(5)]

    async def renew(pool):
        (server,), asked, old = pool.servers, asyncio.Event(), pids_of(tmp_path)
        url = server.name

        async def do(server, prompt):
            asked.set()
            return await server.complete(prompt, sampling, seed=1, model=None)

        asking = asyncio.create_task(pool.run_jobs(prompts, do, at_once=2))
        await asked.wait()
        await pool.reopen(ServerSpec(str(other), "float32", CONTEXT), connections=4)
        assert not any(map(is_there, old))
        assert pool.servers == pool.admins == [server]
        assert server.name != url
        assert await server.is_healthy()
        return await asking

    faults = ("--faults", json.dumps({"token_seconds": 0.1}))
    # No patience: waiting for a server of ours that is being started takes none.
    found = with_pool(make_pool(tmp_path, *faults, patience=0.0), snapshot, renew)
    for prompt, item in zip(prompts, found, strict=True):
        expected = read_lm(other).token_logprobs(np.array(prompt, np.int32), item.ids)
        assert np.allclose(item.logprobs, expected, atol=1e-6)


def test_a_server_that_cannot_be_started_anew_leaves_nothing(tmp_path, snapshot):
    async def renew(pool):
        old, (server,) = pids_of(tmp_path), pool.servers
        with pytest.raises(RunError, match=r"server for .*nowhere exited with code"):
            await pool.reopen(
                ServerSpec(str(tmp_path / "nowhere"), "float32", CONTEXT), connections=4
            )
        assert not any(map(is_there, old + pids_of(tmp_path)))
        assert not pool.is_open
        assert not await server.is_healthy()

    with_pool(make_pool(tmp_path), snapshot, renew)


# The key before every path.


def through(guard, scope):
    """What the guard sends, and whether it let the request pass."""
    sent = []

    async def receive():
        return {}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent


@pytest.fixture
def guard(monkeypatch):
    async def app(scope, receive, send):
        await send("passed")

    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    return RequireKey(app)


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/health", "/"])
def test_the_guard_asks_for_the_key_at_every_path(guard, path):
    def ask(*headers):
        return through(guard, {"type": "http", "path": path, "headers": list(headers)})

    assert ask((b"authorization", b"Bearer sesame")) == ["passed"]
    for headers in ([], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"sesame")]):
        start, body = ask(*headers)
        assert start["status"] == 401
        assert "passed" not in (start, body)


def test_the_guard_asks_for_the_key_of_web_sockets(guard):
    """Closed before they are accepted, so that the handshake itself is refused."""
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    (closed,) = through(guard, scope)
    assert closed["type"] == "websocket.close"
    scope["headers"] = [(b"authorization", b"Bearer sesame")]
    assert through(guard, scope) == ["passed"]


def test_the_guard_lets_the_servers_own_life_pass(guard):
    assert through(guard, {"type": "lifespan"}) == ["passed"]


def test_the_guard_does_not_work_without_a_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(KeyError):
        RequireKey(None)


def environment_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)


def test_what_a_worker_set_for_itself_is_not_its_servers(started, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NPD_SET", "PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")  # the user's own
    _, pids = started(gpus=("2,3",))
    environment = environment_of(pids[0])
    assert not {b"PYTORCH_ALLOC_CONF", b"NPD_SET"} & set(environment)
    assert environment[b"NCCL_DEBUG"] == b"WARN"
    assert environment[b"CUDA_VISIBLE_DEVICES"] == b"2,3"


@pytest.mark.parametrize("killed", [False, True])
def test_what_an_engine_leaves_behind_goes_with_it(started, killed):
    """Its sockets and temporary files lie in a folder of its own, gone once it has ended."""
    process, pids = started()
    environment = environment_of(pids[0])
    place = Path(environment[b"VLLM_RPC_BASE_PATH"].decode())
    (place / "left-behind").touch()
    assert environment[b"TMPDIR"].decode() == str(place)
    assert place not in Path(environment[b"TORCHINDUCTOR_CACHE_DIR"].decode()).parents
    if killed:
        os.kill(pids[0], signal.SIGKILL)
    process.stop()
    assert not place.exists()

"""Servers that send without end, too much, or what is no answer: bounded in time and in memory."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager, suppress

import pytest

import fakes
from npd.engines import Refused, Unavailable, build_server
from npd.engines.base import SamplingSettings
from npd.engines.client import ANSWER_BYTES, Client, key_of
from npd.engines.responses import max_response_bytes
from npd.errors import ConfigError

SAMPLING = SamplingSettings(max_new_tokens=8, stop_ids=(fakes.END,))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LIMIT = 0.5


@contextmanager
def serving(script):
    """The URL of a server that reads a request and then does `script(send, request)`."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.02)
    is_over = threading.Event()

    def serve(channel):
        with channel, suppress(OSError):
            channel.settimeout(5)
            script(channel.sendall, whole_request(channel))

    def accept():
        while not is_over.is_set():
            with suppress(TimeoutError):
                serving = threading.Thread(target=serve, args=(listener.accept()[0],))
                serving.start()
                threads.append(serving)

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        listener.close()


def whole_request(channel):
    """Closing a socket with something unread in it would take the answer back."""
    found = b""
    while True:
        found += channel.recv(65536)
        head, _, body = found.partition(b"\r\n\r\n")
        sizes = [x.split()[1] for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")]
        if b"\r\n\r\n" in found and len(body) >= int((sizes or [b"0"])[0]):
            return found


def ask(url, do, *, key=None, limit=LIMIT, engine="vllm"):
    async def run():
        client = Client(key, connections=2)
        try:
            connection = client.connect(url, timeout=limit)
            return await do(build_server(engine, connection, refresh_timeout=limit))
        finally:
            await client.aclose()

    return asyncio.run(run())


def answer(body, *headers):
    return HEAD + b"".join(h + b"\r\n" for h in headers) + b"\r\n" + body


def forever(part, head=b""):
    def script(send, _):
        send(head)
        while True:
            send(part)

    return script


def drip(send, _):
    for byte in HEAD + b"\r\n" + b" " * 10_000:
        send(bytes([byte]))
        time.sleep(0.02)


CALLS = {
    "complete": lambda server: server.complete([5, 9], SAMPLING, seed=1, model="m"),
    "read": lambda server: server.read([5, 9, 3], 4, model="m"),
    "facts": lambda server: server.facts(),
    "pause": lambda server: server.pause(drain=False),
    "tag": lambda server: server.tag(),
    "adapter": lambda server: server.load_adapter("/x", "a"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("engine", ["vllm"])
def test_a_byte_at_a_time_is_given_up_at_the_limit(call, engine):
    with serving(drip) as url:
        started = time.monotonic()
        with pytest.raises(Unavailable, match=rf"{url} gave no answer to /.* within 0\.5 s") as e:
            ask(url, CALLS[call], engine=engine)
        assert e.value.timed_out
        assert time.monotonic() - started < 20 * LIMIT


def test_health_is_looked_at_within_its_limit():
    with serving(drip) as url:
        assert not ask(url, lambda server: server.is_healthy())


def gzip_bomb(size):
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size >> 20)) + packer.flush()


ENDLESS = {
    "body": forever(b"[1, 2, 3, " * 1000, answer(b"")),
    "chunks": forever(b"a\r\n[1, 2, 3, \r\n" * 1000, answer(b"", b"Transfer-Encoding: chunked")),
    "one chunk": forever(b" " * 9999, answer(b"fffffffff\r\n", b"Transfer-Encoding: chunked")),
    "announced": forever(b" " * 9999, answer(b"", b"Content-Length: 99999999999")),
    "headers": forever(b"X-A: " + b"a" * 1000 + b"\r\n", HEAD),
    "header": forever(b"a" * 1000, HEAD + b"X-A: "),
    "status": forever(b"a" * 1000, b"HTTP/1.1 200 "),
    "interim": forever(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "bomb": lambda send, _: send(answer(gzip_bomb(2**29), b"Content-Encoding: gzip")),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_without_end_costs_little(what):
    with serving(ENDLESS[what]) as url:
        tracemalloc.start()
        try:
            with pytest.raises(Unavailable, match=f"{url} (sends|does not answer|gave no)"):
                ask(url, CALLS["complete"], limit=20.0 if what != "interim" else LIMIT)
            assert tracemalloc.get_traced_memory()[1] < 4 * ANSWER_BYTES
        finally:
            tracemalloc.stop()


def test_what_was_asked_for_bounds_the_answer():
    with serving(ENDLESS["body"]) as url:
        few = max_response_bytes(scored=2, generated=8)
        with pytest.raises(Unavailable, match=f"more than the {few:,} bytes"):
            ask(url, CALLS["complete"], limit=30.0)
    assert max_response_bytes(scored=1000, generated=1, k=64) > 1000 * 65 * 120
    assert few < 2**21


def test_the_refusal_of_a_server_is_cut_not_waited_for():
    head = b"HTTP/1.1 400 Bad\r\n\r\n" + b"no "
    with (
        serving(forever(b"room " * 100, head)) as url,
        pytest.raises(Refused, match="no room room") as e,
    ):
        ask(url, CALLS["complete"], limit=20.0)
    assert len(str(e.value)) < 600


def completion(**changes):
    found = {"token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}
    return json.dumps({"choices": [found | changes]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"a":' * 300_000,
        b"9" * 500_000,
        b'"\xff\xfe"',
        b"\x00",
        completion(token_ids=[float("inf")]),
        completion(token_ids=[10**400]),
        completion(logprobs={"token_logprobs": [float("nan")]}),
        completion(logprobs={"token_logprobs": [10**400]}),
        completion(logprobs={"token_logprobs": [[-1.0]]}),
        completion(finish_reason=["stop"]),
    ],
)
def test_what_is_no_answer_is_one_line_that_names_the_server(body):
    with (
        serving(lambda send, _: send(answer(body))) as url,
        pytest.raises(Unavailable, match=rf"^{url} sends [^\n]*$") as e,
    ):
        ask(url, CALLS["complete"], limit=30.0)
    assert len(str(e.value)) < 600


def test_limits_that_are_no_numbers_are_no_facts():
    for limit in ("1e400", "NaN", '"x"', "[1]"):
        body = b'{"data": [{"id": "m", "max_model_len": %s}], "is_paused": false, "version": 1}'
        found = answer(body % limit.encode())
        with (
            serving(lambda send, _, found=found: send(found)) as url,
            pytest.raises(Unavailable, match=f"{url} .*npd cannot parse"),
        ):
            ask(url, CALLS["facts"], limit=30.0)


def test_a_compressed_answer_is_read():
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    body = packer.compress(completion()) + packer.flush()
    with serving(lambda send, _: send(answer(body, b"Content-Encoding: gzip"))) as url:
        assert ask(url, CALLS["complete"], limit=30.0).ids.tolist() == [3]


def test_terminal_escapes_of_a_server_are_written_out():
    body = json.dumps({"error": "\x1b]0;owned\x07 \u202e no \ud800\r"}).encode()
    head = b"HTTP/1.1 400 Bad\r\n\r\n"
    with (
        serving(lambda send, _: send(head + body)) as url,
        pytest.raises(Refused, match=r"\\x1b\]0;owned\\x07 \\u202e no \\ud800") as e,
    ):
        ask(url, CALLS["complete"], limit=30.0)
    str(e.value).encode()


# Keys and passwords.


@pytest.mark.parametrize("shape", ["{}", '{{"error": {{"message": "wrong key {}"}}}}', "a{}b"])
@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_echoes_what_it_was_sent_is_masked(shape, status):
    def echo(send, request):
        line = next(x for x in request.decode().split("\r\n") if x.startswith("Authorization"))
        body = shape.format(line.partition(": ")[2])
        send(f"HTTP/1.1 {status} Bad\r\n\r\n{body} {line.split()[-1]} {forms}".encode())

    for login, key, forms in (  # noqa: B007 - in what is echoed
        ("", "k-canary-1", "k-canary-1"),
        ("me:%70w-canary-%211@", "k-canary-2", "%70w-canary-%211 pw-canary-!1 pw-canary-%211"),
    ):
        with (
            serving(echo) as url,
            pytest.raises((Refused, Unavailable), match=r"\*\*\*") as caught,
        ):
            ask(url.replace("://", f"://{login}"), CALLS["complete"], key=key, limit=30.0)
        assert "canary" not in str(caught.value)
        assert url in str(caught.value)


def test_the_password_of_a_url_is_sent_and_not_named():
    seen = []

    def script(send, request):
        seen.append(request.decode())
        send(answer(completion()))

    with serving(script) as url:

        async def name(server):
            await CALLS["complete"](server)
            return server.name

        found = ask(url.replace("://", "://me:p%40ss-canary@"), name, key="other", limit=30.0)
    assert found == url
    assert "Authorization: Basic bWU6cEBzcy1jYW5hcnk=" in seen[0]


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    for bad in ("canary\nX-Evil: 1", "canary\x00", "canäry"):
        monkeypatch.setattr("os.environ", {"K": bad})
        with pytest.raises(ConfigError, match=r"the key in \$K contains characters") as caught:
            key_of("K")
        assert "can" not in str(caught.value).replace("cannot carry", "")
    monkeypatch.setattr("os.environ", {"K": " canary \n", "E": ""})
    assert key_of("K") == "canary"
    assert key_of("E") is key_of("NONE") is None

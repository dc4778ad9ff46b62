"""Real vLLM servers for tests: small, started by npd's own launcher, found by their command line.

Every start imports vLLM in each of its processes, which is nearly all a start costs (10 s of CPU
time a process): the engine runs its model in its own process, and tests share servers.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from npd.config import LaunchConfig
from npd.engines import auth_middleware
from npd.engines.server_process import ServerProcess, ServerSpec
from npd.types import Rollout
from run_process import LIMIT, is_alive

# A bf16 log-prob has rounding of its own in every engine: on ordinary text 0.02 to 0.05 on average.
NOISE = 0.1
CONTEXT = 400
# A machine that others use too may take minutes for a start.
START_SECONDS = 1800.0


def launch(venv: Path, *args: str, **env: str) -> LaunchConfig:
    """A server small enough for two cores: one thread, 128 MiB for 32 sequences, two processes."""
    small = ("--enforce-eager", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(2**27))
    in_one = ("--distributed-executor-backend", "uni")
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else `uni` is not taken
        "TORCHDYNAMO_DISABLE": "1",  # else its first log-probs wait for a C++ compiler
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return LaunchConfig(
        venv=str(venv),
        args=(*small, *in_one, *args),
        env=settings | env,
        start_timeout=START_SECONDS,
    )


def forgetful(venv: Path) -> LaunchConfig:
    """A server that says it has loaded weights, and has not."""
    found = [Path(auth_middleware.__file__).parent, Path(__file__).parent / "vllm_middleware"]
    return launch(
        venv,
        *("--middleware", "forgets_reloads.ForgetsReloads"),
        PYTHONPATH=os.pathsep.join(map(str, found)),
    )


@contextmanager
def running_server(
    venv: Path, model: Path, folder: Path, *, dtype: str, lora_rank: int = 0
) -> Iterator[ServerProcess]:
    """A server that runs already, as far as generators know: with its key in the environment."""
    spec = ServerSpec(str(model), dtype, CONTEXT, lora_rank=lora_rank)
    process = ServerProcess("vllm", launch(venv), spec, folder / "server.log")
    process.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NPD_API_KEY", process.key)
            yield process
    finally:
        process.stop()


def own_logits(model, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own log-probs [L, V] at the response's tokens, in process, and the tokens [L]."""
    whole = torch.from_numpy(
        np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
    )
    with torch.no_grad():
        logits = model(input_ids=whole[None]).logits[0].float()
    start = len(rollout.prompt_ids)
    return logits[start - 1 : -1].log_softmax(-1), whole[start:]


def own_logprobs(model, rollout: Rollout) -> np.ndarray:
    """log p of the response's tokens by the model in process."""
    logprobs, tokens = own_logits(model, rollout)
    return logprobs.gather(-1, tokens[:, None])[:, 0].numpy()


def server_process(folder: Path) -> int:
    """The process id of the API server whose log is the newest in `folder`, by its command line."""
    newest = max(folder.glob("server*-*.log"), key=lambda log: log.stat().st_mtime_ns)
    pid = _server_at(newest.stem.rpartition("-")[2])
    assert pid is not None, f"no server of {newest}"
    return pid


def _server_at(port: str) -> int | None:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if port.encode() in command and b"vllm.entrypoints.openai.api_server" in command[:4]:
                return int(entry.name)
    return None


def kill_server(folder: Path) -> None:
    """`kill -9` the API server whose log is in `folder`; returns when its supervisor has ended."""
    pid = server_process(folder)
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not is_alive(supervisor), "the supervisor outlived its server")


def assert_gone(folder: Path) -> None:
    """No server whose log is in `folder` is running, or will be in a moment."""
    ports = [log.stem.rpartition("-")[2] for log in folder.glob("server*-*.log")]
    assert ports
    _wait_until(lambda: not any(map(_server_at, ports)), "a server outlived its owner")


def _wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def num_generated(server: ServerProcess) -> int:
    """Tokens that the server has drawn since it started."""
    request = urllib.request.Request(server.url + "/metrics")
    request.add_header("Authorization", f"Bearer {server.key}")
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        lines = answer.read().decode().splitlines()
    counts = [line.split()[-1] for line in lines if line.startswith("vllm:generation_tokens_total")]
    return int(sum(map(float, counts)))


class Proxy:
    """A server before another that answers every reload, but passes on only the first `passes` of
    them: one that says it loaded, and did not. Later ones load `instead`, where that is given."""

    def __init__(self, server: ServerProcess, *, passes: int, instead: Path | None = None) -> None:
        self._target, self._left, self.log = server.url, passes, server.log
        self._instead = instead
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                proxy.forward(self, None)

            def do_POST(self):
                proxy.forward(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.block_on_close = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        if handler.path == "/collective_rpc":
            self._left -= 1
            if self._left < 0 and self._instead is None:
                self._answer(handler, 200, b'{"results": [null]}')
                return
            if self._left < 0:
                call = json.loads(body)
                call["kwargs"]["weights_path"] = str(self._instead)
                body = json.dumps(call).encode()
        request = urllib.request.Request(self._target + handler.path, body, method=handler.command)
        for name in ("Authorization", "Content-Type"):
            if handler.headers.get(name):
                request.add_header(name, handler.headers[name])
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                self._answer(handler, answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self._answer(handler, error.code, error.read())

    def _answer(self, handler, status: int, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Connection", "close")
        handler.close_connection = True
        handler.end_headers()
        handler.wfile.write(body)

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

"""Engine servers over a FakeLM: real HTTP on the loopback, in the paths and shapes of the engines.

Log-probs are exactly known, and weights are what a snapshot directory of `make_snapshot` holds, so
that a reload really changes what is written. What goes wrong is switched on by the test, in
`Faults`. Does not imitate speed, batching or numerics.

Written against vLLM 0.32.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from safetensors.numpy import load_file, save_file

from fakes import FakeLM
from npd.models import fingerprint
from npd.models.fingerprint import Fingerprint

VOCAB = 32
CONTEXT = 512
_PROBE_LENGTHS = (24, 17, 30, 9, 20)


def make_snapshot(
    path: Path, seed: int, *, vocab: int = VOCAB, base: Path | None = None, step: float = 1.0
) -> Path:
    """A model directory of a FakeLM, with its probe; an adapter of `base` where that is given.

    `step` is how far it is from the model of seed 0 (1: as far as that of `seed` is).
    """
    path.mkdir(parents=True)
    start, end = FakeLM(vocab, 0), FakeLM(vocab, seed)
    weights = {
        name: getattr(start, name) + step * (getattr(end, name) - getattr(start, name))
        for name in ("first", "previous")
    }
    save_file(weights, path / "model.safetensors")
    if base is None:
        (path / "config.json").write_text(
            json.dumps({"vocab_size": vocab, "max_position_embeddings": CONTEXT})
        )
    else:
        adapter = {"base_model_name_or_path": str(base), "r": 8}
        (path / "adapter_config.json").write_text(json.dumps(adapter))
    fingerprint.write(probe_of(read_lm(path)), path)
    return path


def read_lm(directory: Path | str) -> FakeLM:
    """The model of a directory."""
    weights = load_file(Path(directory) / "model.safetensors")
    lm = FakeLM(len(weights["first"]))
    lm.first, lm.previous = weights["first"], weights["previous"]
    return lm


def probe_of(lm: FakeLM) -> Fingerprint:
    """What it says of fixed sequences."""
    rng = np.random.default_rng(5)
    sequences = [rng.integers(0, 30, length).astype(np.int32) for length in _PROBE_LENGTHS]
    logprobs = [lm.token_logprobs(ids[:1], ids[1:]).astype(np.float32) for ids in sequences]
    return Fingerprint(tuple(sequences), tuple(logprobs))


@dataclass
class Faults:
    """What goes wrong; counts are of requests to come, and go down as they are met."""

    refuses: Callable[[list[int]], bool] = lambda prompt: False
    """Prompts answered with 400."""
    unavailable: int = 0
    """Completions answered with 503."""
    drops: int = 0
    """Completions whose connection is closed without an answer."""
    is_broken: bool = False
    """Completions are answered with 500, health with 503."""
    hangs: bool = False
    """Completions are never answered."""
    cuts: int = 0
    """Completions cut off by somebody else's pause, after two tokens."""
    forgets_reload: bool = False
    """A reload is answered as if done, and is not."""
    loads_partly: bool = False
    """A reload changes one of the two tensors only."""
    keeps_prefixes: bool = False
    """The prefix cache is not forgotten."""
    is_locked: bool = False
    """The calls that change weights are not there (404)."""
    has_loras: bool = True
    """Whether adapters are taken."""
    key: str = ""
    """What requests must carry."""
    stalls_at: int | None = None
    """Responses wait at so many tokens for the first pause."""
    token_seconds: float = 0.0
    """How long each token takes."""
    noise: float = 0.0
    """Standard deviation of what log-probs are off by."""
    tells_tempered: bool = False
    """Log-probs of what is drawn are those of the tempered distribution."""
    lacks: tuple[str, ...] = ()
    """Paths that this version does not know."""
    spoils: Callable[[Any], Any] = lambda content: content
    """What answers with 200 become."""


@dataclass
class _Written:
    ids: list[int]
    logprobs: list[float]
    ending: str


@dataclass
class Engine:
    """What is behind the HTTP: weights, adapters, what is being written, and whether it pauses."""

    lm: FakeLM
    faults: Faults
    tag: str = "default"
    adapters: dict[str, FakeLM] = field(default_factory=dict)
    bodies: list[tuple[str, Any]] = field(default_factory=list)
    """Every request: its path and its JSON."""
    num_written: int = 0

    def __post_init__(self) -> None:
        self._moved = threading.Condition()
        self.num_running = 0
        self.num_tokens = 0
        self.is_paused = False
        self.is_closing = False
        self._num_cuts = self._num_unseeded = 0
        self._rng = np.random.default_rng(0)

    def named(self, name: str | None) -> FakeLM | None:
        """The model a request wants; None where there is none of that name."""
        return self.lm if name in (None, "base") else self.adapters.get(str(name))

    def write(
        self,
        name: str | None,
        prompt: list[int],
        *,
        limit: int,
        stop: Sequence[int],
        temperature: float,
        top_p: float,
        bias: dict[str, float],
        seed: int | None,
    ) -> _Written:
        """A response; a pause that aborts cuts it off, and one that is on holds it up."""
        rng, ids, logprobs = self._drawing_by(seed), [], []
        cuts = self._begin()
        try:
            is_foreign_cut = self._count("cuts")
            while len(ids) < limit:
                if self._waits_and_is_cut(cuts, len(ids)) or (is_foreign_cut and len(ids) == 2):
                    return _Written(ids, logprobs, "abort")
                lm = self.named(name)
                assert lm is not None
                raw = lm.next_logprobs(np.array([*prompt, *ids], np.int32))
                token = _draw(raw, temperature, top_p, bias, rng)
                ids.append(token)
                told = _tempered(raw, temperature or 1.0) if self.faults.tells_tempered else raw
                logprobs.append(float(told[token] + self._noise()))
                with self._moved:
                    self.num_tokens += 1
                    self._moved.notify_all()
                if token in stop:
                    return _Written(ids, logprobs, "stop")
            return _Written(ids, logprobs, "length")
        finally:
            with self._moved:
                self.num_running -= 1
                self.num_written += 1
                self._moved.notify_all()

    def _drawing_by(self, seed: int | None) -> np.random.Generator:
        """Random numbers by the seed of a request, or by how many were asked without one."""
        with self._moved:
            self._num_unseeded += seed is None
            own = (self._num_unseeded, 1)
        return np.random.default_rng(own if seed is None else seed)

    def _begin(self) -> int:
        """Wait while it pauses; how many cuts there were when it was asked."""
        with self._moved:
            cuts = self._num_cuts
            self._moved.wait_for(lambda: not self.is_paused or self._is_cut(cuts))
            self.num_running += 1
            return cuts

    def _waits_and_is_cut(self, cuts: int, length: int) -> bool:
        """Take the time of a token; whether the response is cut off instead."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_cut(cuts), self.faults.token_seconds)
            self._moved.wait_for(lambda: self.faults.stalls_at != length or self._is_cut(cuts))
            return self._is_cut(cuts)

    def _is_cut(self, cuts: int) -> bool:
        return self._num_cuts > cuts or self.is_closing

    def read(self, name: str | None, ids: list[int]) -> np.ndarray:
        """Log-probs [P - 1, V] of what follows each token but the last."""
        lm = self.named(name)
        assert lm is not None
        whole = np.array(ids, np.int32)
        found = lm.response_logprobs(whole[:1], whole[1:])
        return found + self.faults.noise * self._rng.normal(size=found.shape)

    def hold(self, *, cut: bool) -> None:
        """Take up nothing more; cut what runs off, or wait for it."""
        with self._moved:
            self.is_paused, self.faults.stalls_at = True, None
            self._num_cuts += cut
            self._moved.notify_all()
        self.drain()

    def await_tokens(self, count: int) -> None:
        """Wait until so many tokens have been written in all."""
        with self._moved:
            self._moved.wait_for(lambda: self.num_tokens >= count or self.is_closing)

    def drain(self) -> None:
        """Wait for what runs."""
        with self._moved:
            self._moved.wait_for(lambda: self.num_running == 0 or self.is_closing)

    def release(self) -> None:
        with self._moved:
            self.is_paused = False
            self._moved.notify_all()

    def load(self, directory: str) -> None:
        """Take the weights of a directory, as far as the faults let it."""
        new = read_lm(directory)
        if self.faults.forgets_reload:
            return
        if self.faults.loads_partly:
            new.first = self.lm.first
        self.lm = new

    def hang(self) -> None:
        """Do nothing until the server is closed."""
        with self._moved:
            self._moved.wait_for(lambda: self.is_closing)

    def close(self) -> None:
        with self._moved:
            self.is_closing = True
            self._moved.notify_all()

    def takes_one(self, fault: str) -> bool:
        """Whether this completion meets a fault that is counted."""
        return self._count(fault)

    def _count(self, fault: str) -> bool:
        with self._moved:
            left = getattr(self.faults, fault)
            setattr(self.faults, fault, max(0, left - 1))
            return bool(left > 0)

    def _noise(self) -> float:
        return self.faults.noise * float(self._rng.normal()) if self.faults.noise else 0.0


def _draw(
    raw: np.ndarray, temperature: float, top_p: float, bias: dict[str, float], rng: Any
) -> int:
    logits = raw.copy()
    for token, value in bias.items():
        logits[int(token)] += value
    if temperature == 0.0:
        return int(logits.argmax())
    p = np.exp(_tempered(logits, temperature))
    order = np.argsort(-p, kind="stable")
    kept = order[: 1 + int(np.searchsorted(p[order].cumsum(), top_p))]
    weights = np.zeros_like(p)
    weights[kept] = p[kept]
    return int(rng.choice(len(p), p=weights / weights.sum()))


def _tempered(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probs at a temperature."""
    return logits / temperature - np.logaddexp.reduce(logits / temperature)


class _Answer(Exception):
    """An answer other than 200, from anywhere in a handler."""

    def __init__(self, status: int, content: Any) -> None:
        super().__init__(status)
        self.status, self.content = status, content


class FakeServer:
    """One server; a context manager. `url` is where it is, `engine` and `faults` what it does."""

    def __init__(self, directory: Path, *, port: int = 0, **faults: Any) -> None:
        self.faults = Faults(**faults)
        self.engine = Engine(read_lm(directory), self.faults)
        self.errors: list[BaseException | None] = []
        self._http = _Http(self, port)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, with all that is being written; may be called again, and before it began."""
        self.engine.close()
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.cut_connections()
        self._http.server_close()
        assert not self.errors, f"asked for what an engine would not do: {self.errors}"

    def restart(self, directory: Path) -> None:
        """Forget everything, as a process that was started again with `directory` would."""
        self.engine.lm, self.engine.tag = read_lm(directory), "default"
        self.engine.adapters.clear()

    def sent(self, path: str) -> list[Any]:
        """What was asked of `path`."""
        return [body for found, body in list(self.engine.bodies) if found == path]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The JSON (or text) to answer with; an _Answer for another status than 200."""
        raise NotImplementedError

    def meet(self, prompt: list[int]) -> None:
        """The faults of completions."""
        if self.faults.hangs:
            self.engine.hang()
        if self.faults.is_broken:
            raise _Answer(500, self.error("EngineDeadError", 500))
        if self.engine.takes_one("unavailable"):
            raise _Answer(503, self.error("busy", 503))
        if self.engine.takes_one("drops"):
            raise ConnectionAbortedError
        if self.faults.refuses(prompt):
            raise _Answer(400, self.error("this prompt is too long for me", 400))

    @staticmethod
    def error(message: str, status: int) -> Any:
        """An error in the engine's own shape."""
        return {"error": {"message": message, "type": "Error", "param": None, "code": status}}


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, owner: FakeServer, port: int) -> None:
        self.owner = owner
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """End what waits for a next request that will not come."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what is the test's business; clients may go away in the middle."""
        error = sys.exception()
        if not isinstance(error, OSError) and not self.owner.engine.is_closing:
            self.owner.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    server: _Http
    is_stale = False
    """Whether it answers nothing more: uvicorn closes a connection after a 500, as it may cross
    with the next request on it."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        owner, url = self.server.owner, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.is_stale:
            self.close_connection = True
            return
        body = json.loads(raw) if raw else None
        owner.engine.bodies.append((self.path, body))
        try:
            self._check_key(url.path)
            if url.path in owner.faults.lacks:
                raise _Answer(404, {"detail": "Not Found"})
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            content = owner.answer(self.command, url.path, query, body)
            if owner.engine.is_closing:
                raise ConnectionAbortedError
            self._send(200, owner.faults.spoils(content))
        except _Answer as answer:
            self._send(answer.status, answer.content)
        except ConnectionAbortedError:
            self.close_connection = True

    def _check_key(self, path: str) -> None:
        key = self.server.owner.faults.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            raise _Answer(401, {"error": "Unauthorized"})

    def _send(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        if content is None:
            data = b""
        self.is_stale = status == 500
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class FakeVllm(FakeServer):
    """vLLM's paths, as `npd.engines.vllm` uses them."""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if path == "/health" and self.faults.is_broken:
            raise _Answer(503, None)
        calls: dict[str, Callable[[], Any]] = {
            "/health": lambda: None,
            "/version": lambda: {"version": "0.32.0"},
            "/v1/models": self._models,
            "/v1/completions": lambda: self._complete(body),
            "/v1/load_lora_adapter": lambda: self._load_adapter(body),
            "/v1/unload_lora_adapter": lambda: self._unload_adapter(body),
        }
        if not self.faults.is_locked:
            calls |= {
                "/is_paused": lambda: {"is_paused": self.engine.is_paused},
                "/pause": lambda: self._pause(query.get("mode", "abort")),
                "/resume": self._resume,
                "/collective_rpc": lambda: self._rpc(body),
                "/reset_prefix_cache": lambda: {"success": not self.faults.keeps_prefixes},
                "/weight_info": lambda: {"weight_version": self.engine.tag},
                "/update_weight_version": lambda: self._set_tag(body["new_version"]),
            }
        if path not in calls:
            raise _Answer(404, {"detail": "Not Found"})
        return calls[path]()

    def _models(self) -> Any:
        base = {"id": "base", "max_model_len": CONTEXT, "parent": None}
        loras = [{"id": name, "parent": "base"} for name in self.engine.adapters]
        return {"object": "list", "data": [base, *loras]}

    def _complete(self, body: Any) -> Any:
        prompt, name = body["prompt"], body["model"]
        self.meet(prompt)
        if self.engine.named(name) is None:
            raise _Answer(404, self.error(f"The model `{name}` does not exist.", 404))
        assert body["max_tokens"] >= 1
        choice: dict[str, Any] = {"index": 0, "text": "", "prompt_logprobs": None}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(name, prompt, body["prompt_logprobs"])
        written = self.engine.write(
            name,
            prompt,
            limit=body["max_tokens"],
            stop=body.get("stop_token_ids", ()),
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            bias=body.get("logit_bias") or {},
            seed=body.get("seed"),
        )
        choice["finish_reason"] = written.ending
        if body.get("return_token_ids"):
            choice["token_ids"] = written.ids
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in written.ids],
                "token_logprobs": written.logprobs,
            }
        return {"object": "text_completion", "model": name, "choices": [choice]}

    def _prompt_logprobs(self, name: str, prompt: list[int], k: int) -> list[Any]:
        positions: list[Any] = [None]
        for own, row in zip(prompt[1:], self.engine.read(name, prompt), strict=True):
            top = np.argsort(-row, kind="stable")[:k].tolist()
            ranks = {token: rank + 1 for rank, token in enumerate(top)}
            ranks.setdefault(own, int((row >= row[own]).sum()))
            positions.append(
                {
                    str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": "?"}
                    for token, rank in ranks.items()
                }
            )
        return positions

    def _pause(self, mode: str) -> Any:
        assert mode in ("abort", "wait")
        self.engine.hold(cut=mode == "abort")
        return {"status": "paused"}

    def _resume(self) -> Any:
        self.engine.release()
        return {"status": "resumed"}

    def _rpc(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        assert self.engine.num_running == 0, "weights change under a response"
        try:
            self.engine.load(body["kwargs"]["weights_path"])
        except OSError as error:
            raise _Answer(500, {"error": {"message": str(error)}}) from error
        return {"results": [None]}

    def _set_tag(self, tag: str) -> Any:
        self.engine.tag = tag
        return {"success": True, "new_version": tag}

    def _load_adapter(self, body: Any) -> Any:
        if not self.faults.has_loras:
            raise _Answer(404, {"detail": "Not Found"})
        name = body["lora_name"]
        if name in self.engine.adapters:
            message = f"The lora adapter '{name}' has already been loaded."
            raise _Answer(400, self.error(message, 400))
        self.engine.adapters[name] = read_lm(body["lora_path"])
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload_adapter(self, body: Any) -> Any:
        if self.engine.adapters.pop(body["lora_name"], None) is None:
            raise _Answer(404, self.error("The lora adapter cannot be found.", 404))
        return "Success: LoRA adapter removed successfully."


FAKES: dict[str, type[FakeServer]] = {"vllm": FakeVllm}

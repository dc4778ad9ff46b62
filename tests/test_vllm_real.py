"""Against a real vLLM server on CPU with the real 135M model: generation, refreshes and faults."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from npd import lora, probe
from npd.chat import Chat
from npd.config import GenerateConfig, LaunchConfig, LoraConfig
from npd.errors import RunError, WorkerLostError
from npd.generate import build_generator
from npd.generate.served import ServedGenerator, Surroundings
from npd.modeling import load_model
from npd.servers.launch import ServerProcess, ServerSpec
from npd.servers.proof import StaleWeights
from npd.types import Ask, Prompt, Rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A bf16 log-prob has rounding of its own in every engine: on ordinary text 0.02 to 0.05 on average.
NOISE = 0.1
# So much below the most probable token a greedy choice may be, by the other engine's numbers.
CLOSE = 0.4
# Tokens from which a mean is to be trusted.
MANY = 50


def launch(venv: Path, **kwargs) -> LaunchConfig:
    """A server small enough for two cores."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    args = ("--enforce-eager", "--max-num-seqs", "32")
    return LaunchConfig(venv=str(venv), args=args, env=env, **kwargs)


def served(venv: Path, folder: Path, chat: Chat, tell=print, **kwargs) -> ServedGenerator:
    settings = {"max_new_tokens": 24, "temperature": 0.0, "batch_size": 16, **kwargs}
    config = GenerateConfig(engine="vllm", launch=launch(venv), **settings)
    return ServedGenerator(
        config,
        Surroundings(folder / "server.log", 400, tell=tell),
        stop_ids=chat.stop_ids,
        vocab_size=chat.vocab_size,
    )


def make_asks(chat: Chat, count: int = 8) -> list[Ask]:
    texts = ["Tell me about the moon.", "What is 2 + 2?", "Name three birds.", "Who was Homer?"]
    prompts = [Prompt(i, text=f"{texts[i % 4]} ({i})") for i in range(count)]
    return [Ask(i, 17 * i + 3, prompt) for i, prompt in enumerate(chat.encode_all(prompts))]


def shifted(model_dir: Path, out: Path, seed: int, size: float = 0.05) -> Path:
    """The model with noise on every matrix, as training might have moved it, tied as it was."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * size)
    shutil.copytree(model_dir, out, ignore=shutil.ignore_patterns("*.safetensors"))
    model.to(torch.bfloat16).save_pretrained(out)
    return out


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
    """The process id of the API server whose log lies in `folder`: found by its command line."""
    port = next(folder.glob("server*-*.log")).stem.rpartition("-")[2]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if port.encode() in command and b"vllm.entrypoints.openai.api_server" in command[:4]:
            return int(entry.name)
    raise AssertionError(f"no server at port {port}")


def assert_gone(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            server_process(folder)
        except (AssertionError, StopIteration):
            return
        time.sleep(0.1)
    raise AssertionError("a server outlived its owner")


@pytest.fixture(scope="module")
def chat(smol_dir):
    return Chat.load(smol_dir)


@pytest.fixture(scope="module")
def models(smol_dir, tmp_path_factory):
    """The 135M model and two that training might have made of it, LM heads written out."""
    folder = tmp_path_factory.mktemp("models")
    moved = [shifted(smol_dir, folder / f"tied-{i}", i) for i in (1, 2)]
    paths = [_untied(path, folder / f"v{i}") for i, path in enumerate([smol_dir, *moved])]
    for path in paths:
        probe.write(probe.of_directory(path), path)  # measured once for all tests
    return paths


@pytest.fixture(scope="module")
def server(vllm_venv, smol_dir, tmp_path_factory):
    """A server that runs already, as far as generators know: with its key in the environment."""
    log = tmp_path_factory.mktemp("logs") / "server.log"
    spec = ServerSpec(str(smol_dir), "bfloat16", 400, lora_rank=8)
    process = ServerProcess("vllm", launch(vllm_venv), spec, log)
    process.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPD_API_KEY", process.key)
        yield process
    process.stop()


class Proxy:
    """A server before another that answers every reload, but passes on only the first `swallows`
    of them: one that says it loaded, and did not."""

    def __init__(self, server: ServerProcess, *, swallows: int) -> None:
        self._target, self._left, self.log = server.url, swallows, server.log
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
            if self._left < 0:
                self._answer(handler, 200, b'{"results": [null]}')
                return
        request = urllib.request.Request(self._target + handler.path, body, method=handler.command)
        for name in ("Authorization", "Content-Type"):
            if handler.headers.get(name):
                request.add_header(name, handler.headers[name])
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
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


def reaching(server: ServerProcess | Proxy, chat: Chat, around: dict | None = None, **kwargs):
    """A generator by the server that runs."""
    settings = {"max_new_tokens": 24, "temperature": 0.0, "batch_size": 16, **kwargs}
    config = GenerateConfig(engine="vllm", urls=(server.url,), **settings)
    surroundings = Surroundings(server.log, 400, **(around or {}))
    return ServedGenerator(config, surroundings, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size)


def test_a_refreshed_server_writes_what_the_snapshot_writes(server, models, chat):
    """After each load in place, greedy text and log-probs are the snapshot's own in process."""
    notes: list[str] = []
    generator = reaching(server, chat, {"tell": notes.append})
    asks = make_asks(chat)
    for version, path in enumerate(models):
        generator.load(path, version)
        rollouts = generator.generate(asks)
        assert {rollout.version for rollout in rollouts} == {version}
        _assert_is_written_by(rollouts, path, asks, chat)
    generator.close()
    assert sum("holds snapshot" in note for note in notes) == 3


def test_a_head_that_a_reload_forgot_is_found(server, models, chat, smol_dir):
    """vLLM 0.32 keeps the old LM head when a checkpoint with tied embeddings is reloaded."""
    generator = reaching(server, chat)
    generator.load(models[1], 1)
    with pytest.raises(StaleWeights, match=f"{server.url} does not hold snapshot v2"):
        generator.load(smol_dir, 2)
    generator.close()


def test_a_small_step_of_training_is_no_false_alarm_and_a_load_that_did_nothing_is_seen(
    server, models, chat, smol_dir, tmp_path
):
    """Two snapshots that differ by about what bfloat16 rounds off: where bounds say nothing."""
    near = _untied(shifted(smol_dir, tmp_path / "near", 5, size=1e-3), tmp_path / "near-untied")
    notes: list[str] = []
    generator = reaching(server, chat, {"tell": notes.append})
    generator.load(models[0], 0)
    generator.load(near, 1)
    assert "holds snapshot v1" in notes[-1]
    with Proxy(server, swallows=1) as proxy:
        forgetful = reaching(proxy, chat, {"probes": tmp_path / "probes"})
        forgetful.load(models[0], 0)
        with pytest.raises(StaleWeights, match="still holds the snapshot before it"):
            forgetful.load(near, 1)
        forgetful.close()
        again = reaching(proxy, chat, {"probes": tmp_path / "probes"})
        again.load(models[0], 0)  # whatever it held, it is given this one now
        again.close()
    generator.close()


def test_a_server_given_other_weights_meanwhile_is_found(server, models, chat):
    ours, other = reaching(server, chat), reaching(server, chat)
    ours.load(models[0], 0)
    other.load(models[1], 1)
    with pytest.raises(WorkerLostError, match="npd-v1-"):
        ours.generate(make_asks(chat))
    ours.close()
    other.close()


def test_a_response_cut_by_a_refresh_goes_on_with_the_new_weights_token_by_token(
    server, models, chat
):
    newest: list[tuple[Path, int]] = []
    around = {"in_flight": "mix", "newest": lambda: newest[-1] if newest else None}
    generator = reaching(server, chat, around, max_new_tokens=250, temperature=1.0)
    generator.load(models[0], 0)
    timer = threading.Timer(3.0, lambda: newest.append((models[1], 1)))
    timer.start()
    rollouts = generator.generate(make_asks(chat, 12))
    timer.join()
    generator.close()
    cut = [rollout for rollout in rollouts if rollout.versions is not None]
    assert cut, "no response was being written when the refresh came"
    old, new = (load_model(path, dtype="bfloat16", packed=False) for path in models[:2])
    for rollout in cut:
        assert (rollout.version, set(rollout.versions.tolist())) == (0, {0, 1})
        assert (np.diff(rollout.versions) >= 0).all()
    # All responses together: where the cut falls is chance, and few tokens have much noise.
    is_new = np.concatenate([rollout.versions == 1 for rollout in cut])
    off_old, off_new = (
        np.concatenate([np.abs(r.logprobs - own_logprobs(model, r)) for r in cut])
        for model in (old, new)
    )
    assert off_old[~is_new].mean() < NOISE
    assert off_new[is_new].mean() < NOISE
    assert off_old[is_new].mean() > 2 * off_new[is_new].mean(), "the test can tell the two apart"


def test_an_adapter_is_loaded_beside_the_base_and_proven(server, models, chat, smol_dir, tmp_path):
    """A LoRA snapshot is the adapter alone; the server's base weights stay."""
    adapters = [make_adapter(smol_dir, tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    generator = reaching(server, chat)
    generator.load(models[0], 0)
    asks = make_asks(chat)
    before = generator.generate(asks)
    for version, adapter in enumerate(adapters, 1):
        assert sum(f.stat().st_size for f in adapter.iterdir()) < 8 * 2**20
        generator.load(adapter, version)
        rollouts = generator.generate(asks)
        assert {rollout.version for rollout in rollouts} == {version}
        _assert_is_written_by(rollouts, adapter, asks, chat)
        assert [r.response_ids.tolist() for r in rollouts] != [
            r.response_ids.tolist() for r in before
        ]
    generator.close()


def make_adapter(base: Path, out: Path, seed: int) -> Path:
    """An adapter with weights of its own, as a LoRA student's snapshot holds it."""
    model = load_model(base)
    lora.attach(model, LoraConfig(rank=8), base=str(base), seed=seed, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    lora.save(model, out, "bfloat16")
    return out


def test_a_reload_that_forgets_is_mended_by_starting_our_server_anew(
    vllm_venv, smol_dir, chat, tmp_path
):
    notes: list[str] = []
    generator = served(vllm_venv, tmp_path, chat, tell=notes.append)
    moved = shifted(smol_dir, tmp_path / "moved", 3)
    asks = make_asks(chat)
    try:
        generator.load(smol_dir, 0)
        generator.load(moved, 1)
        _assert_is_written_by(generator.generate(asks), moved, asks, chat)
    finally:
        generator.close()
    assert sum("started anew" in note for note in notes) == 1
    assert len(list(tmp_path.glob("server-*.log"))) == 2
    assert_gone(tmp_path)


def _untied(path: Path, out: Path) -> Path:
    from npd.train.checkpoint import save_pretrained

    model = load_model(path, dtype="bfloat16")
    save_pretrained(
        model, out, dtype="bfloat16", source=str(path), trust_remote_code=False, untie=True
    )
    return out


def _assert_is_written_by(rollouts, path: Path, asks, chat: Chat) -> None:
    """Greedy text and log-probs are those of the model at `path` in process, to rounding.

    Token by token: two tokens of nearly one probability may change places in another engine, and
    from there two greedy texts have nothing in common although both are right.
    """
    model = load_model(path, dtype="bfloat16", packed=False)
    for rollout in rollouts:
        logprobs, tokens = own_logits(model, rollout)
        own = logprobs.gather(-1, tokens[:, None])[:, 0]
        assert np.abs(rollout.logprobs - own.numpy()).mean() < NOISE
        assert (logprobs.amax(-1) - own).max() < CLOSE, "not the most probable token"
    config = GenerateConfig(max_new_tokens=24, temperature=0.0, batch_size=16)
    local = build_generator(
        config, stop_ids=chat.stop_ids, pad_id=chat.pad_id, vocab_size=chat.vocab_size
    )
    local.load(path, 0)
    expected = local.generate(asks)
    local.close()
    first = [
        a.response_ids[0] == b.response_ids[0] for a, b in zip(rollouts, expected, strict=True)
    ]
    assert np.mean(first) > 0.7, "the two engines do not even begin alike"


def test_a_snapshot_that_is_not_there_is_named_and_ours_is_ended(
    vllm_venv, smol_dir, chat, tmp_path
):
    generator = served(vllm_venv, tmp_path, chat)
    try:
        generator.load(smol_dir, 0)
        gone = shutil.copytree(smol_dir, tmp_path / "gone")
        probe.write(probe.of_directory(gone), gone)
        (gone / "model.safetensors").unlink()
        with pytest.raises(RunError, match="gone"):
            generator.load(gone, 1)
    finally:
        generator.close()
    assert_gone(tmp_path)


def test_a_server_killed_in_the_middle_of_a_shard_is_a_lost_worker(
    vllm_venv, smol_dir, chat, tmp_path
):
    generator = served(vllm_venv, tmp_path, chat, max_new_tokens=300, temperature=1.0)
    try:
        generator.load(smol_dir, 0)
        killer = threading.Timer(2.0, lambda: os.kill(server_process(tmp_path), signal.SIGKILL))
        killer.start()
        with pytest.raises(WorkerLostError, match="signal 9"):
            generator.generate(make_asks(chat, 32))
        killer.join()
    finally:
        generator.close()
    assert_gone(tmp_path)

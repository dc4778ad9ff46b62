"""Against a real vLLM server on CPU with the real 135M model: generation, refreshes and faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from npd.config import GenerateConfig, LoraConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.engines.server_process import ServerProcess
from npd.engines.verify_weights import WrongWeights
from npd.errors import WorkerLostError
from npd.generate import build_generator
from npd.generate.served import ServedGenerator, ServingContext
from npd.models import fingerprint, lora
from npd.models.loading import load_model
from npd.types import Prompt, SampleRequest
from vllm_servers import (
    CONTEXT,
    NOISE,
    Proxy,
    num_generated,
    own_logits,
    own_logprobs,
    running_server,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Nats by which greedy tokens may lie below the most probable ones on average, by the numbers of
# another engine: where two tokens are nearly as probable, rounding chooses.
CLOSE = 0.05


def make_requests(chat: ChatTokenizer, count: int = 8) -> list[SampleRequest]:
    texts = ["Tell me about the moon.", "What is 2 + 2?", "Name three birds.", "Who was Homer?"]
    prompts = [Prompt(i, text=f"{texts[i % 4]} ({i})") for i in range(count)]
    return [
        SampleRequest(i, 17 * i + 3, prompt) for i, prompt in enumerate(chat.encode_all(prompts))
    ]


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


@pytest.fixture(scope="module")
def chat(smol_dir):
    return ChatTokenizer.load(smol_dir)


@pytest.fixture(scope="module")
def models(smol_dir, tmp_path_factory):
    """The 135M model and two that training might have made of it, LM heads written out."""
    folder = tmp_path_factory.mktemp("models")
    moved = [shifted(smol_dir, folder / f"tied-{i}", i) for i in (1, 2)]
    paths = [_untied(path, folder / f"v{i}") for i, path in enumerate([smol_dir, *moved])]
    for path in paths:
        fingerprint.write(fingerprint.of_directory(path), path)  # measured once for all tests
    return paths


@pytest.fixture(scope="module")
def server(vllm_venv, smol_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    with running_server(vllm_venv, smol_dir, folder, dtype="bfloat16", lora_rank=8) as process:
        yield process


@contextmanager
def reaching(
    server: ServerProcess | Proxy, chat: ChatTokenizer, around: dict | None = None, **kwargs
) -> Iterator[ServedGenerator]:
    """A generator by the server that runs."""
    settings = {"max_new_tokens": 24, "temperature": 0.0, "batch_size": 16, **kwargs}
    config = GenerateConfig(engine="vllm", urls=(server.url,), **settings)
    context = ServingContext(server.log, CONTEXT, **(around or {}))
    generator = ServedGenerator(config, context, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size)
    with closing(generator):
        yield generator


def test_a_refreshed_server_writes_what_the_snapshot_writes(server, models, chat):
    """After each load in place, greedy text and log-probs are the snapshot's own in process."""
    notes: list[str] = []
    requests = make_requests(chat)
    with reaching(server, chat, {"notify": notes.append}) as generator:
        for version, path in enumerate(models):
            generator.load(path, version)
            rollouts = generator.generate(requests)
            assert {rollout.version for rollout in rollouts} == {version}
            _assert_is_written_by(rollouts, path, requests, chat)
    assert sum("serves snapshot" in note for note in notes) == 3


def test_a_head_that_a_reload_forgot_is_found(server, models, chat, tmp_path):
    """All layers are the new snapshot's; the embedding, which is the LM head too, is the old's."""
    mixed = shutil.copytree(models[2], tmp_path / "mixed")
    tensors, old = (load_file(path / "model.safetensors") for path in (models[2], models[1]))
    tensors |= {name: old[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    with (
        Proxy(server, passes=1, instead=mixed) as proxy,
        reaching(proxy, chat) as generator,
    ):
        generator.load(models[1], 1)
        with pytest.raises(WrongWeights, match=f"{proxy.url} does not serve snapshot v2"):
            generator.load(models[2], 2)


def test_a_tied_checkpoint_is_held_whole_or_found(server, models, chat, smol_dir):
    """vLLM 0.32 keeps the old LM head on CPUs whose kernels use a packed copy of it."""
    requests = make_requests(chat)
    with reaching(server, chat) as generator:
        generator.load(models[1], 1)
        try:
            generator.load(smol_dir, 2)
        except WrongWeights:
            return
        _assert_is_written_by(generator.generate(requests), smol_dir, requests, chat)


def test_a_small_step_of_training_is_no_false_alarm_and_a_load_that_did_nothing_is_seen(
    server, models, chat, smol_dir, tmp_path
):
    """Two snapshots that differ by about what bfloat16 rounds off: where bounds say nothing."""
    near = _untied(shifted(smol_dir, tmp_path / "near", 5, size=1e-3), tmp_path / "near-untied")
    notes: list[str] = []
    with reaching(server, chat, {"notify": notes.append}) as generator:
        generator.load(models[0], 0)
        generator.load(near, 1)
    assert "serves snapshot v1" in notes[-1]
    kept = {"fingerprints": tmp_path / "probes"}
    with Proxy(server, passes=1) as proxy:
        with reaching(proxy, chat, kept) as forgetful:
            forgetful.load(models[0], 0)
            with pytest.raises(WrongWeights, match="an earlier snapshot"):
                forgetful.load(near, 1)
        with reaching(proxy, chat, kept) as again:
            again.load(models[0], 0)  # whatever it held, it is given this one now


def test_a_server_given_other_weights_meanwhile_is_found(server, models, chat):
    with reaching(server, chat) as ours, reaching(server, chat) as other:
        ours.load(models[0], 0)
        other.load(models[1], 1)
        with pytest.raises(WorkerLostError, match="npd-v1-"):
            ours.generate(make_requests(chat))


def test_a_response_cut_by_a_refresh_goes_on_with_the_new_weights_token_by_token(
    server, models, chat
):
    requests = make_requests(chat)
    before = num_generated(server) + 20 * len(requests)

    def newest() -> tuple[Path, int] | None:
        """The next snapshot, as soon as responses have some tokens of the first."""
        return (models[1], 1) if num_generated(server) > before else None

    around = {"in_flight": "mix", "newest": newest}
    with reaching(server, chat, around, max_new_tokens=120, temperature=1.0) as generator:
        generator.load(models[0], 0)
        rollouts = generator.generate(requests)
    cut = [rollout for rollout in rollouts if rollout.versions is not None]
    assert cut, "no response was being written when the refresh came"
    old, new = (load_model(path, dtype="float32", packed=False) for path in models[:2])
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


def test_an_adapter_is_loaded_beside_the_base_and_verified(
    server, models, chat, smol_dir, tmp_path
):
    """A LoRA snapshot is the adapter alone; the server's base weights stay."""
    adapters = [make_adapter(smol_dir, tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    requests = make_requests(chat)
    with reaching(server, chat) as generator:
        generator.load(models[0], 0)
        before = generator.generate(requests)
        for version, adapter in enumerate(adapters, 1):
            assert sum(f.stat().st_size for f in adapter.iterdir()) < 8 * 2**20
            generator.load(adapter, version)
            rollouts = generator.generate(requests)
            assert {rollout.version for rollout in rollouts} == {version}
            _assert_is_written_by(rollouts, adapter, requests, chat)
            assert [r.response_ids.tolist() for r in rollouts] != [
                r.response_ids.tolist() for r in before
            ]


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


def _untied(path: Path, out: Path) -> Path:
    from npd.models.saving import save_pretrained

    model = load_model(path, dtype="bfloat16")
    save_pretrained(model, out, dtype="bfloat16", source=path, untie=True)
    return out


def _assert_is_written_by(rollouts, path: Path, requests, chat: ChatTokenizer) -> None:
    """Greedy text and log-probs are those of the model at `path` in process, to rounding.

    Token by token: two tokens of nearly one probability may change places in another engine, and
    from there two greedy texts have nothing in common although both are right. In float32, because
    bfloat16 takes minutes on a processor without instructions for it.
    """
    model = load_model(path, dtype="float32", packed=False)
    for rollout in rollouts:
        logprobs, tokens = own_logits(model, rollout)
        own = logprobs.gather(-1, tokens[:, None])[:, 0]
        assert np.abs(rollout.logprobs - own.numpy()).mean() < NOISE
        assert (logprobs.amax(-1) - own).mean() < CLOSE, "not the most probable tokens"
    config = GenerateConfig(max_new_tokens=1, temperature=0.0, batch_size=16, dtype="float32")
    local = build_generator(
        config, stop_ids=chat.stop_ids, pad_id=chat.pad_id, vocab_size=chat.vocab_size
    )
    local.load(path, 0)
    expected = local.generate(requests)
    local.close()
    first = [
        a.response_ids[0] == b.response_ids[0] for a, b in zip(rollouts, expected, strict=True)
    ]
    assert np.mean(first) > 0.7, "the two engines do not even begin alike"

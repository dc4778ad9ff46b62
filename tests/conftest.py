"""Shared fixtures: a tiny real Llama with a real tokenizer, and one CPU thread for every test."""

import os
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts=()):
    """A byte-level BPE tokenizer with ChatML markers, trained on a few lines: about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [*texts, "what is two plus two? it is four. user assistant system"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed=0, *, layers=2, hidden=32, vocab=304, tied=True, std=0.2):
    """A tiny float32 Llama with grouped-query attention; `std` large enough to have opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_model(path: Path, **kwargs) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face directory."""
    make_model(**kwargs).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


# Processes that several tests share; the fixture that starts one ends it.
_LASTING: set[str] = set()


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test():
    """No thread and no process a test started is there after it (files: warnings are errors)."""
    threads, processes = set(threading.enumerate()), set(_children())
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [t for t in threading.enumerate() if t not in threads and not t.daemon]
        orphans = [pid for pid in _children() if pid not in processes | _LASTING]
        if not left and not orphans:
            return
        time.sleep(0.02)
    raise AssertionError(f"outlived its test: threads {left}, processes {orphans}")


def _children() -> list[str]:
    """Process ids of this process's children (Linux; elsewhere none are seen)."""
    found = Path("/proc/self/task").glob("*/children")
    return [pid for file in found for pid in file.read_text().split()]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A saved tiny student (seed 0)."""
    return save_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory):
    """A saved tiny teacher (seed 1, one layer more), same tokenizer as the student's."""
    return save_model(tmp_path_factory.mktemp("teacher"), seed=1, layers=3)


@pytest.fixture(scope="session")
def vllm_venv():
    """The virtual environment with vLLM: of NPD_VLLM_VENV, or what `make vllm` made."""
    venv = Path(os.environ.get("NPD_VLLM_VENV", Path(__file__).parents[1] / ".venv-vllm"))
    if not (venv / "bin" / "python").exists():
        assert os.environ.get("NPD_REQUIRE_VLLM") != "1", f"no vLLM at {venv}: make vllm"
        pytest.skip(f"no vLLM at {venv}: make vllm")
    return venv


@pytest.fixture(scope="session")
def smol_dir(tmp_path_factory):
    """The real SmolLM2-135M-Instruct as a Hugging Face directory (embeddings tied)."""
    from npd.prepare import import_gguf, smollm2_gguf

    return import_gguf(smollm2_gguf(), tmp_path_factory.mktemp("smol") / "model")


@pytest.fixture(scope="session")
def ray_address():
    """A real Ray cluster on this machine; its address is in RAY_ADDRESS too while tests run."""
    from ray_cluster import ENVIRONMENT, ray_cluster

    with ray_cluster() as (address, pids), pytest.MonkeyPatch.context() as patch:
        _LASTING.update(map(str, pids))
        for name, value in {**ENVIRONMENT, "RAY_ADDRESS": address}.items():
            patch.setenv(name, value)
        yield address

"""Shared fixtures: a tiny real Llama with a real tokenizer, and one CPU thread for every test."""

import os
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from process_tree import children
from tiny_model import save_model

# Before torch is imported: one CPU thread a test, and a child process's too.
os.environ["OMP_NUM_THREADS"] = "1"
# A busy machine is slow, which is no failure.
settings.register_profile("npd", deadline=None)
settings.load_profile("npd")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without bytecode, each of hundreds of processes would compile npd anew, in about a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


pytest_plugins = ["file_progress"]


def pytest_collection_modifyitems(items):
    """Unit tests first, to fail within a minute; then files with the most slow tests first.

    Workers of pytest-xdist take whole files, in this order: long ones at the end would run alone.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "unit", -slow[item.path]))


# Processes that several tests share; the fixture that starts one ends it.
_LASTING: set[str] = set()


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test():
    """No thread and no process a test started is there after it (files: warnings are errors)."""
    threads, processes = set(threading.enumerate()), children(os.getpid())
    yield
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = [t for t in threading.enumerate() if t not in threads and not t.daemon]
        orphans = children(os.getpid()) - processes - _LASTING
        if not left and not orphans:
            return
        time.sleep(0.02)
    raise AssertionError(f"outlived its test: threads {left}, processes {orphans}")


@pytest.fixture(autouse=True)
def _no_secret_outlives_a_test():
    """What a test gave as a secret is masked in its own messages, not in those of later tests."""
    from npd import redaction

    known = set(redaction._known)
    yield
    redaction._known.intersection_update(known)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What npd keeps in the user's cache directory is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A saved tiny student (seed 0)."""
    return save_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory):
    """A saved tiny teacher (seed 1, one layer more), same tokenizer as the student's."""
    return save_model(tmp_path_factory.mktemp("teacher"), seed=1, layers=3)


@pytest.fixture
def shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch):
    """A folder with `run.yaml`, to type commands in."""
    from cli_fixture import Shell

    monkeypatch.chdir(tmp_path)
    made = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    made.write()
    return made


@pytest.fixture
def make_run(tmp_path, tiny_model_dir, tiny_teacher_dir):
    """Makes a `run_process.Run` in `tmp_path`; what is left of it ends with the test."""
    from run_process import Run

    with ExitStack() as stack:
        yield lambda **sections: stack.enter_context(
            Run(tmp_path, tiny_model_dir, tiny_teacher_dir, **sections)
        )


@pytest.fixture(scope="session")
def vllm_venv():
    """The virtual environment with vLLM: of NPD_VLLM_VENV, or what `make vllm` made."""
    venv = Path(os.environ.get("NPD_VLLM_VENV", Path(__file__).parent / ".venv-vllm"))
    if not (venv / "bin" / "python").exists():
        assert os.environ.get("NPD_REQUIRE_VLLM") != "1", f"no vLLM at {venv}: make vllm"
        pytest.skip(f"no vLLM at {venv}: make vllm")
    return venv


@pytest.fixture(scope="session")
def smol_dir(tmp_path_factory):
    """The real SmolLM2-135M-Instruct as a Hugging Face directory (embeddings tied)."""
    from prepare import import_gguf, smollm2_gguf

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

"""torch.compile for the student: which layers are compiled, and what it requires.

Each layer is compiled in place, so names and checkpoints stay the same. One compilation serves all
layers and all row lengths and numbers of documents (except a row of a single token). Lengths are
always dynamic, so that a resumed run computes what an uninterrupted one did. Attention, evaluation
and decoding stay uncompiled.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from npd.errors import ConfigError, ModelError
from npd.train.fsdp import layers_of


def compile_layers(model: Any, device: str) -> None:
    """Compile each layer, at its first training step. Call before `shard`.

    Raises:
        ConfigError: there is no compiler for `device`.
        ModelError: the model does not name its layers.
    """
    check_compilers(device)
    layers = list(layers_of(model))
    if not layers:
        raise ModelError(
            f"train.compile compiles layers, but {type(model).__name__} does not name its layers: "
            "leave train.compile out"
        )
    for layer in layers:
        # Automatic dynamic shapes would compile the first length as static, then compile again.
        layer.compile(dynamic=True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers uncompiled within the block, for evaluation and decoding."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check_compilers(device: str, *, has_triton: bool | None = None) -> None:
    """Check the requirements of torch.compile: Python's headers, and C++ on a CPU, or C and Triton.

    Compiles nothing.

    Raises:
        ConfigError: a requirement is missing.
    """
    is_gpu = not device.startswith("cpu")
    variable, usual = ("CC", ("gcc", "clang", "cc")) if is_gpu else ("CXX", _usual_cxx())
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, (chosen,) if chosen else usual)):
        named = f"${variable} ({chosen})" if chosen else " or ".join(usual)
        raise _refusal(f"a {'C' if is_gpu else 'C++'} compiler, and there is no {named}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise _refusal("Python's headers (Python.h), which are not installed: python3-dev")
    if is_gpu and not (find_spec("triton") is not None if has_triton is None else has_triton):
        raise _refusal("triton, which is not installed")


def _usual_cxx() -> tuple[str, ...]:
    return ("clang++",) if sys.platform == "darwin" else ("g++",)


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"train.compile needs {what}: install it, or leave train.compile out")

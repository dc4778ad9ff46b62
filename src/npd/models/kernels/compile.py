"""torch.compile for a model: which layers are compiled, and what compiling requires.

Each layer is compiled in place, so names and checkpoints stay the same. One compilation serves all
layers and all row lengths and numbers of documents (except a row of a single token). Lengths are
always dynamic, so that a resumed run computes what an uninterrupted one did. Attention, evaluation
and decoding stay uncompiled. Also decides whether kernels can be built for a device at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npd.errors import ConfigError, ModelError
from npd.models.device import capability

# Triton has no kernels for GPUs before Volta.
_LEAST_CAPABILITY = 7


def compile_layers(model: Any, device: str, setting: str = "train.compile") -> None:
    """Compile each layer, when it first runs. Call before the model is sharded.

    `setting` is the config's name of the wish, for messages.

    Raises:
        ConfigError: there is no compiler for `device`.
        ModelError: the model does not name its layers.
    """
    check_compilers(device, setting)
    layers = list(layers_of(model))
    if not layers:
        raise ModelError(
            f"{setting} compiles layers, but {type(model).__name__} does not name its layers: "
            f"set {setting}: false"
        )
    for layer in layers:
        # Automatic dynamic shapes would compile the first length as static, then compile again.
        layer.compile(dynamic=True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers uncompiled within the block, for evaluation and decoding."""
    with torch.compiler.set_stance("force_eager"):
        yield


def layers_of(model: Any) -> Iterator[nn.Module]:
    """The layers of a transformer, last first: the units of compilation and sharding."""
    names = set(model._no_split_modules or ())
    for module in reversed(list(model.modules())):
        # FSDP makes a subclass of a layer that it shards.
        if names & {base.__name__ for base in type(module).__mro__}:
            yield module


@cache
def builds_kernels(device: str) -> bool:
    """Whether kernels can be built here: for CUDA, with a C compiler and Python's headers.

    `device` is its type, such as `cuda`.
    """
    try:
        check_compilers(device)
    except ConfigError:
        return False
    return (capability(device) or (0, 0))[0] >= _LEAST_CAPABILITY


def why_no_kernels(device: torch.device) -> str:
    """Why npd's Triton kernels cannot run on `device`; empty if they can."""
    try:
        from npd.models.kernels import row_stats
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return "" if row_stats.can_run(device) else f"triton has no kernels for {device.type}"


def check_compilers(
    device: str, setting: str = "train.compile", *, has_triton: bool | None = None
) -> None:
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
        raise _refusal(setting, f"a {'C' if is_gpu else 'C++'} compiler, and there is no {named}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        what = "Python's headers (Python.h), which are not installed: python3-dev"
        raise _refusal(setting, what)
    if is_gpu and not (find_spec("triton") is not None if has_triton is None else has_triton):
        raise _refusal(setting, "triton, which is not installed")


def _usual_cxx() -> tuple[str, ...]:
    return ("clang++",) if sys.platform == "darwin" else ("g++",)


def _refusal(setting: str, what: str) -> ConfigError:
    return ConfigError(f"{setting} needs {what}: install it, or set {setting}: false")

"""Whether this machine can build what torch.compile writes: C++ on a CPU, C and Triton on GPUs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from npd.errors import ConfigError


def check_compilers(device: str, *, has_triton: bool | None = None) -> None:
    """Look for the compiler, Python's headers and, for a GPU, Triton; compiles nothing.

    Raises:
        ConfigError: something is missing.
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

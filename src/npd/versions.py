"""The versions that a run's numbers depend on, for its record."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("npd", "torch", "transformers", "safetensors", "pyarrow", "numpy", "peft")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, the machine, and the commit if there is one."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return found if commit is None else found | {"commit": commit}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

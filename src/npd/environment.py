"""Versions of the libraries that a run depends on, and the newest versions npd was tested with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

_PACKAGES = ("npd", "torch", "transformers", "safetensors", "pyarrow", "numpy", "peft")
# The newest release of each library that a whole run was tested with; patch releases are ignored.
TESTED = {
    "torch": "2.15",
    "transformers": "5.24",
    "tokenizers": "0.23",
    "safetensors": "0.8",
    "pyarrow": "26.0",
    "pydantic": "2.14",
    "numpy": "2.5",
    "typer": "0.29",
    "httpx": "0.28",
}


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on, the machine, and the commit if there is one."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    found |= {name: known for name in _PACKAGES if (known := installed(name)) is not None}
    commit = _commit()
    return found if commit is None else found | {"commit": commit}


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def untested(found: Mapping[str, str | None] | None = None) -> list[str]:
    """A line for each library newer than the tested version; `found`: the installed versions."""
    from packaging.version import Version

    if found is None:
        found = {name: installed(name) for name in TESTED}
    return [
        f"{name} {known} is newer than the version npd was tested with ({TESTED[name]}); if "
        f"anything fails, pip install '{name}=={TESTED[name]}.*'"
        for name, known in found.items()
        if known is not None and Version(known).release[:2] > Version(TESTED[name]).release
    ]


def too_old(found: Mapping[str, str | None] | None = None) -> list[str]:
    """A line for each library that is missing or too old for npd."""
    from packaging.requirements import Requirement

    try:
        lines = requires("npd") or []
    except PackageNotFoundError:
        return []  # a source tree on the path has no metadata
    needed = [Requirement(line) for line in lines if "extra ==" not in line]
    if found is None:
        found = {each.name: installed(each.name) for each in needed}
    return [
        f"{each.name} {found[each.name] or 'is missing'}, but npd needs {each.name}"
        f"{each.specifier}: pip install '{each.name}{each.specifier}'"
        for each in needed
        if each.name in found
        and not each.specifier.contains(found[each.name] or "0", prereleases=True)
    ]


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

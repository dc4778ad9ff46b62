"""The command that goes on with a run, as it would be typed.

Made from the config and from where its values came from, so that it fits runs started by the
command line, runs of other sessions (their `config.json`), and runs started from Python.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from npd.layers import as_yaml, flat
from npd.served import looks_secret

_IN_PYTHON = "npd.run(config, resume=True)"
_PRESET = "preset "


def resume_command(config: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """`npd run run.yaml --set train.lr=2e-05 --resume`, or the call where there is no file.

    `config` as `dump_config` gives it; `origins` as `Settings` has them. Values that may be secret
    are not written out.
    """
    source = _source(set(origins.values()))
    if source is None:
        return _IN_PYTHON
    sets = [
        f"{key}={'...' if _is_secret(key) else as_yaml(value)}"
        for key, value in flat(config)
        if origins.get(key) == "--set"
    ]
    words = ["npd", "run", source, *(word for each in sets for word in ("--set", each))]
    return shlex.join([*words, "--resume"])


def _is_secret(key: str) -> bool:
    return ".env." in key and looks_secret(key.rpartition(".")[2])


def _source(origins: set[str]) -> str | None:
    """The CONFIG of the command line: its file, or else its preset."""
    named = origins - {"default", "--set"}
    files = sorted(origin for origin in named if not origin.startswith(_PRESET))
    presets = sorted(origin.removeprefix(_PRESET) for origin in named - set(files))
    return next(iter([*files, *presets]), None)

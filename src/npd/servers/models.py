"""What a server must know of a model directory before it loads it.

Reads the directory's own JSON files, nothing else; a hub's name says nothing here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.errors import ConfigError

ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What a server must know of a model directory before it loads it (0: not told)."""

    base: str
    context: int
    vocabulary: int
    lora_rank: int = 0


def model_settings(directory: Path) -> ModelSettings:
    """Settings of a model directory, of an adapter's base, or of a hub's name.

    Raises:
        ConfigError: an adapter that does not say what it adapts.
    """
    base, rank = str(directory), 0
    if (directory / ADAPTER).exists():
        adapter = read_settings(directory / ADAPTER)
        base, rank = str(adapter.get("base_model_name_or_path") or ""), int(adapter.get("r") or 0)
        if not base or not rank:
            raise ConfigError(f"{directory / ADAPTER} names no base model, or no rank")
    config = read_settings(Path(base) / "config.json")
    config = config.get("text_config") or config
    context, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    return ModelSettings(base, int(context or 0), int(vocabulary or 0), rank)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    assert isinstance(found, dict)
    return found

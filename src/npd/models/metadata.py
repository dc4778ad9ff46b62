"""The settings and the size of a model directory, without loading the model.

Reads the directory's JSON files and the headers of its weights. Does not look up hub names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from npd.errors import ConfigError, ModelError
from npd.models.files import read_object

ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The properties of a model directory that a server's command line needs (0: unknown)."""

    base: str
    context: int
    vocabulary: int
    lora_rank: int = 0


def model_settings(directory: Path) -> ModelSettings:
    """Settings of a model directory, an adapter's base, or a hub name.

    Raises:
        ConfigError: an adapter does not name its base.
        ModelError: one of its files is damaged.
    """
    base, rank = str(directory), 0
    if (directory / ADAPTER).exists():
        adapter = read_settings(directory / ADAPTER)
        base, rank = str(adapter.get("base_model_name_or_path") or ""), int(adapter.get("r") or 0)
        if not base or not rank:
            raise ConfigError(f"{directory / ADAPTER} names no base model, or no rank")
    config = _text_settings(Path(base))
    context, vocabulary = (_count(config, n) for n in ("max_position_embeddings", "vocab_size"))
    return ModelSettings(base, context, vocabulary, rank)


def _text_settings(directory: Path) -> dict[str, Any]:
    """The settings of a model's language part."""
    config = read_settings(directory / "config.json")
    text = config.get("text_config")
    return text if text and isinstance(text, dict) else config


def _count(config: dict[str, Any], name: str) -> int:
    """A whole number among the settings; 0 where it is missing, or something else."""
    found = config.get(name)
    if isinstance(found, float) and found.is_integer():
        return int(found)
    return found if isinstance(found, int) else 0


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. ModelError if it is damaged."""
    return read_object(path, "model") if path.is_file() else {}


def context_of(config: Any) -> int | None:
    """The context length, in tokens, in a transformers config; None if unknown."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else int(context)


GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters (tied ones once), and the sizes that determine activations (0: unknown)."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int = 0
    """Keys of one token in one layer, over all heads; values have as many."""


def size_of(model: str) -> ModelSize | None:
    """The size of a model directory; None for a hub name, or if its files cannot be read."""
    files = sorted(Path(model).glob("*.safetensors"))
    try:
        parameters = sum(_parameters(file) for file in files)
        config = _text_settings(Path(model))
    except (OSError, SafetensorError, ModelError):
        return None
    if not parameters:
        return None
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    layers, hidden, intermediate, vocabulary = (_count(config, name) for name in names)
    return ModelSize(parameters, layers, hidden, intermediate, vocabulary, _kv_width(config))


def _kv_width(config: dict[str, Any]) -> int:
    heads = _count(config, "num_attention_heads")
    width = _count(config, "head_dim") or _count(config, "hidden_size") // max(1, heads)
    return (_count(config, "num_key_value_heads") or heads) * width


def _parameters(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118

"""How large a model is, from the headers of its weights and its config; nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from npd.servers.models import read_settings

GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters (tied ones once), and what activations follow from (0 where not told)."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def size_of(model: str) -> ModelSize | None:
    """The size of a model directory; None of a hub's name, or where weights cannot be read."""
    files = sorted(Path(model).glob("*.safetensors"))
    try:
        parameters = sum(_parameters(file) for file in files)
    except (OSError, SafetensorError):
        return None
    if not parameters:
        return None
    config = read_settings(Path(model) / "config.json")
    config = config.get("text_config") or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    return ModelSize(parameters, *(int(config.get(name) or 0) for name in names))


def _parameters(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118

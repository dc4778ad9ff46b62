"""Weights of a snapshot into a model that is already built, without building it again.

Promises: either every parameter is overwritten with the snapshot's, or nothing was touched and the
answer is False. Does not verify checksums (the store does) and does not build models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# What a config says of how it was written, not of the architecture.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model directory: its architecture and its weight files (none: a hub name, not a folder)."""

    architecture: dict[str, Any]
    files: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """The snapshot at `path`; empty when there is no such folder."""
        config = path / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        architecture = {key: value for key, value in fields.items() if key not in _VOLATILE}
        return cls(architecture, tuple(sorted(path.glob("*.safetensors"))))


def copy_weights(model: Any, old: Snapshot, new: Snapshot) -> bool:
    """Copy `new` into `model`, which holds `old`; False when they do not fit tensor by tensor.

    Raises:
        safetensors.SafetensorError: a weight file cannot be read.
    """
    from safetensors import safe_open

    if not new.files or new.architecture != old.architecture:
        return False
    state: dict[str, torch.Tensor] = model.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in new.files:
        with safe_open(file, framework="pt") as tensors:
            names: list[str] = list(tensors.keys())
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    if not _fits(state, shapes):
        return False
    for file in new.files:
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            names = list(tensors.keys())
            for name in names:
                state[name].copy_(tensors.get_tensor(name))
    return True


def _fits(state: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the files name exactly the model's tensors (tied ones may be written once)."""
    if any(
        name not in state or tuple(state[name].shape) != shape for name, shape in shapes.items()
    ):
        return False
    written = {state[name].data_ptr() for name in shapes}
    return all(name in shapes or tensor.data_ptr() in written for name, tensor in state.items())

"""A student's layers through torch.compile, each in place: names and checkpoints stay as they are.

Promises: one compilation serves all layers and rows of every length and number of documents (a row
of a single token aside); attention stays what it is without; nothing is compiled but training, and
always for any length, so that a resumed run computes what an uninterrupted one did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from npd.errors import ModelError
from npd.train.compilers import check_compilers


def layers_of(model: Any) -> Iterator[nn.Module]:
    """The layers of a transformer, last first: what is compiled, and sharded, one by one."""
    names = set(model._no_split_modules or ())
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            yield module


def compile_layers(model: Any, device: str) -> None:
    """Have each layer compiled when it is first trained; before it is sharded, if it is.

    Raises:
        ConfigError: there is no compiler for `device`.
        ModelError: the model does not say what its layers are.
    """
    check_compilers(device)
    layers = list(layers_of(model))
    if not layers:
        raise ModelError(
            f"train.compile takes a model layer by layer, and {type(model).__name__} does not name "
            "its layers: leave train.compile out"
        )
    for layer in layers:
        # A length that is first taken for fixed, and then not, would compile twice.
        layer.compile(dynamic=True)


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled layers uncompiled for the time of the block: to evaluate, to decode."""
    with torch.compiler.set_stance("force_eager"):
        yield

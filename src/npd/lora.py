"""Adapters of low rank (LoRA, by peft): into a student, out as a directory, merged into a model.

Promises: the base's weights stay as they are while an adapter trains; a directory is in peft's own
format and names its base; merging is done in float32; only safetensors are read, never a pickle.
Does not load base models (`npd.modeling`) and does not train.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from npd.errors import ModelError
from npd.sections import LoraConfig

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = "default"
# Matrices that are looked up, and the LM head: no adapters there.
_TABLE = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head)\.")
# What peft's own wrapper puts before the name of every module.
_WRAPPED = "base_model.model."


def require(what: str) -> Any:
    """The peft library; `what` needs it.

    Raises:
        ModelError: it is not installed, or too old for this transformers.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{what} needs peft, which is not installed or too old ({error}): "
            "pip install 'npd[lora]'"
        ) from error
    return peft


def attach(model: Any, config: LoraConfig, *, base: str, seed: int, dtype: str) -> None:
    """Freeze `model`, loaded from `base`, and give it float32 adapters that change nothing yet.

    With `dtype` bfloat16 the frozen linear layers are kept in it: autocast would make the same
    numbers of them at every use. The rest stays float32, as when every weight is trained.

    Raises:
        ModelError: peft is not installed, or a target is no linear layer of the model.
    """
    peft = require("train.lora")
    layers = dict(_linear_layers(model))
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(config, list(layers), base),
        fan_in_fan_out=any(not isinstance(layer, nn.Linear) for layer in layers.values()),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        # peft draws on the CPU, wherever the model is.
        torch.default_generator.manual_seed(seed % 2**63)
        peft.inject_adapter_in_model(settings, model, _ADAPTER)
    if dtype == "bfloat16":
        for layer in layers.values():
            layer.to(torch.bfloat16)


def save(model: Any, directory: Path, dtype: str) -> None:
    """Write the adapter of `model`, and nothing else, to `directory` in peft's format."""
    directory.mkdir(parents=True, exist_ok=True)
    state = require("train.lora").get_peft_model_state_dict(model, save_embedding_layers=False)
    target = getattr(torch, dtype)
    tensors = {_WRAPPED + name: t.detach().to("cpu", target) for name, t in state.items()}
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    # peft keeps a set, whose order differs from process to process; a snapshot has a checksum.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(directory))


def base_of(path: str | Path) -> str | None:
    """The model that the adapter in `path` was trained on; None where `path` is no adapter.

    Raises:
        ModelError: it is an adapter that npd cannot merge, or its base is gone.
    """
    file = Path(path) / _CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} is damaged ({error!r}): copy or make the adapter again"
        ) from error
    if kind != "LORA" or not base:
        raise ModelError(
            f"{path} holds an adapter of kind {kind} on {base or 'an unnamed model'}: npd merges "
            "LoRA adapters that name their base; merge it with peft and give the result"
        )
    if not (Path(path) / _WEIGHTS).is_file():
        raise ModelError(f"{path} holds no {_WEIGHTS}: save the adapter in that format")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(f"{path} is an adapter of {base}, which is not there: bring it back")
    return str(base)


def merge(model: Any, adapter: Path, dtype: str) -> Any:
    """`model`, the adapter's base in float32, with the adapter in its weights, then in `dtype`.

    Raises:
        ModelError: peft is not installed, or the adapter is not of this model.
        safetensors.SafetensorError: the adapter's weights cannot be read.
    """
    peft = require(f"the LoRA adapter in {adapter}")
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"the LoRA adapter in {adapter} does not fit its base ({reason}): bring back the "
            "model it was trained on"
        ) from error
    # Parameters only: what a model keeps in buffers (rotary frequencies) is float32 in any type.
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
        parameter.requires_grad = True
    merged.config.dtype = dtype
    return merged


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every linear layer but the LM head, GPT-2's kind (`Conv1D`, transposed weights) included."""
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module is not model.get_output_embeddings():
            yield name, module


def check_targets(config: LoraConfig, student: str) -> None:
    """Check the names of `train.lora.targets` against the headers of a model directory's weights.

    Raises:
        ModelError: a target is no linear layer of the model.
    """
    names = []
    for file in sorted(Path(student).glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                is_matrix = len(tensors.get_slice(key).get_shape()) == 2
                if is_matrix and key.endswith(".weight") and not _TABLE.search(key):
                    names.append(key.removesuffix(".weight"))
    if names:
        _targets(config, names, student)


def _targets(config: LoraConfig, layers: list[str], base: str) -> list[str]:
    known = sorted({name.rpartition(".")[2] for name in layers})
    if config.targets == "all-linear":
        return known
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            near = get_close_matches(target, known, n=1)
            raise ModelError(
                f"train.lora.targets names {target!r}, which is no linear layer of {base}"
                f"{f' (did you mean {near[0]}?)' if near else ''}: choose from "
                f"{', '.join(known)}, or set all-linear"
            )
    return list(config.targets)

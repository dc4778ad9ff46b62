"""LoRA adapters (peft): attached to a student, saved to a directory, merged into a model.

Promises: the base's weights do not change while an adapter trains. A directory is in peft's own
format and names its base. Merging is done in float32. Only safetensors are read, never a pickle.
Does not load base models (`npd.models.loading`) and does not train.
"""

from __future__ import annotations

import copy
import dis
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from npd.config.sections import LoraConfig
from npd.errors import ModelError
from npd.models.files import in_one_line, read_object
from npd.models.packed_mixers import mixers_of, own_class
from npd.text import counted

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ENDS = "generation_config.json"
_ADAPTER = "default"
# The prefix of module names under peft's wrapper.
_WRAPPED = "base_model.model."


def require(what: str) -> Any:
    """The peft library, which `what` needs.

    Raises:
        ModelError: peft is not installed, or too old for this transformers.
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
    """Freeze `model`, loaded from `base`, and attach float32 adapters that have no effect yet.

    With `dtype` bfloat16 the frozen linear layers are stored in bfloat16, to which autocast would
    convert them at every use. The rest stays float32, as in full training.

    Raises:
        ModelError: peft is not installed, or a target is not a linear layer of the model.
    """
    peft = require("train.lora")
    layers = dict(_linear_layers(model))
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(config, model, base),
        fan_in_fan_out=any(not isinstance(layer, nn.Linear) for layer in layers.values()),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        # peft initialises on the CPU, wherever the model is.
        torch.default_generator.manual_seed(seed % 2**63)
        peft.inject_adapter_in_model(settings, model, _ADAPTER)
    if dtype == "bfloat16":
        for layer in layers.values():
            layer.to(torch.bfloat16)


def save(model: Any, directory: Path, dtype: str, ends: Sequence[int] = ()) -> None:
    """Write only the adapter of `model` to `directory`, in peft's format.

    `ends` are the student's end tokens if its base lacks some of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = getattr(torch, dtype)
    tensors = {name: t.detach().to("cpu", target) for name, t in state_of(model).items()}
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    # peft keeps a set, whose order differs between processes; the checksum needs a fixed order.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(directory))
    if ends:
        # Not peft's own; whoever merges the adapter tells the model.
        (directory / _ENDS).write_text(json.dumps({"eos_token_id": list(ends)}) + "\n")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors in `model`, by their names in peft's format."""
    state = require("train.lora").get_peft_model_state_dict(model, save_embedding_layers=False)
    return {_WRAPPED + name: tensor for name, tensor in state.items()}


def load(directory: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors in `directory`, as `save` wrote them."""
    return load_file(directory / _WEIGHTS)


def base_of(path: str | Path) -> str | None:
    """The base model of the adapter in `path`; None if `path` is not an adapter.

    Raises:
        ModelError: npd cannot merge the adapter, or its base is gone.
    """
    file = Path(path) / _CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} is damaged ({error!r}): copy or save the adapter again"
        ) from error
    if kind != "LORA" or not (isinstance(base, str) and base):
        raise ModelError(
            f"{path} has an adapter of kind {kind} for {base or 'an unnamed model'}: npd merges "
            "only LoRA adapters that name their base; merge it with peft and give the merged model"
        )
    if not (Path(path) / _WEIGHTS).is_file():
        raise ModelError(f"{path} has no {_WEIGHTS}: save the adapter in that format")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(f"{path} is an adapter of {base}, which is missing: restore that model")
    return str(base)


def merge(model: Any, adapter: Path, dtype: str) -> Any:
    """`model`, the adapter's base in float32, with the adapter in its weights, then in `dtype`.

    Raises:
        ModelError: peft is not installed, or the adapter is not of this model.
        safetensors.SafetensorError: the adapter's weights cannot be read.
    """
    peft = require(f"the LoRA adapter in {adapter}")
    try:
        # In separate steps, because peft's `from_pretrained` only warns about unfitting tensors.
        settings = peft.PeftConfig.from_pretrained(str(adapter))
        settings.inference_mode = True
        wrapped = peft.PeftModel(model, settings, _ADAPTER)
        mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        found = wrapped.load_adapter(str(adapter), _ADAPTER, key_mapping=mapping)
        _check_found(found.missing_keys, found.unexpected_keys)
        merged = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the LoRA adapter in {adapter} does not fit its base ({in_one_line(error)}): "
            "restore the model it was trained on, or save the adapter again"
        ) from error
    # Parameters only: buffers (rotary frequencies) stay float32.
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
        parameter.requires_grad = True
    merged.config.dtype = dtype
    ends = read_object(adapter / _ENDS, "adapter").get("eos_token_id")
    if ends is not None:
        merged.generation_config.eos_token_id = ends
    return merged


def _check_found(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ValueError if tensors of an adapter are missing, or belong to no layer of its base."""
    for names, what in ((missing, "missing"), (unexpected, "not of any layer")):
        if names:
            are = "is" if len(names) == 1 else "are"
            raise ValueError(f"{counted(len(names), 'tensor')} {are} {what}, such as {names[0]}")


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every linear layer that can have an adapter, including GPT-2's `Conv1D` (transposed weights).

    Not the LM head, and no layer whose weight its mixer may pass to a kernel, past the adapter.
    """
    without = {id(layer) for mixer in mixers_of(model) for layer in _read_directly(mixer)}
    without.add(id(model.get_output_embeddings()))
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and id(module) not in without:
            yield name, module


def _read_directly(mixer: nn.Module) -> Iterator[nn.Module]:
    """The parts of a mixer of which its own code reads the weight, as in `self.out_proj.weight`.

    Whether it does so in a run depends on the device and on installed kernels.
    """
    for _, function in inspect.getmembers(own_class(mixer), inspect.isfunction):
        code = getattr(inspect.unwrap(function), "__code__", None)
        names = [step.argval for step in dis.get_instructions(code)] if code else []
        for part, weight in pairwise(names):
            if weight == "weight" and isinstance(getattr(mixer, str(part), None), nn.Module):
                yield getattr(mixer, part)


@dataclass(frozen=True, slots=True)
class Coverage:
    """The number of layers with adapters, their parameters, and all parameters of the model.

    `uncovered` are the parameters of matrices that cannot have adapters because they are not linear
    layers (fused experts, routers, convolutions) or passed to kernels, by their name in a layer.
    """

    layers: int
    adapted: int
    total: int
    uncovered: Mapping[str, int]

    def __str__(self) -> str:
        says = (
            f"adapters on {counted(self.layers, 'linear layer')} with {self.adapted:,} of the "
            f"student's {self.total:,} parameters"
        )
        if not self.uncovered:
            return says
        named = ", ".join(f"{name} ({count:,})" for name, count in self.uncovered.items())
        return f"{says}; without an adapter, so frozen: {named}"


def coverage(model: Any, config: LoraConfig, base: str) -> Coverage:
    """The coverage of adapters on `model`, loaded from `base`; needs no weights.

    Raises:
        ModelError: a name in `train.lora.targets` is not a linear layer of the model.
    """
    layers = dict(_linear_layers(model))
    targets = tuple(f".{target}" for target in _targets(config, model, base))
    chosen = {name: layer for name, layer in layers.items() if f".{name}".endswith(targets)}
    adapted = {id(layer.weight): layer.weight.numel() for layer in chosen.values()}
    uncovered: dict[str, int] = {}
    plain = {id(layer.weight) for layer in layers.values()} | _tables(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in plain:
            kind = re.sub(r".*\.\d+\.", "", name)
            uncovered[kind] = uncovered.get(kind, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return Coverage(len(chosen), sum(adapted.values()), total, uncovered)


def _tables(model: Any) -> set[int]:
    """Embeddings and the LM head, which are frozen by design."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    heads = [module for module in (model.get_output_embeddings(),) if module is not None]
    return {id(p) for module in (*embeddings, *heads) for p in module.parameters()}


def _targets(config: LoraConfig, model: Any, base: str) -> list[str]:
    """The layers that get adapters: ends of their names, or names where others share an end."""
    layers = [name for name, _ in _linear_layers(model)]
    others = {name for name, _ in model.named_modules()}.difference(layers)
    known = sorted({name.rpartition(".")[2] for name in layers})
    found: list[str] = []
    for target in known if config.targets == "all-linear" else config.targets:
        chosen = [name for name in layers if _ends(name, target)]
        if not chosen:
            near = get_close_matches(target, known, n=1)
            raise ModelError(
                f"train.lora.targets names {target!r}, which is not a linear layer of {base}"
                f"{f' (did you mean {near[0]}?)' if near else ''} that can have an adapter: choose "
                f"from {', '.join(known)}, or set all-linear"
            )
        # Another module of that name would get an adapter, too.
        found += chosen if any(_ends(name, target) for name in others) else [target]
    return found


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")

"""Checks that the weights of a model directory match its architecture, by name and shape.

Promises: weights that transformers would initialise at random are refused, before a run from the
headers of the files and again at load. Older names and layouts that transformers converts are
accepted. Reads no weights.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from npd.errors import ModelError
from npd.text import counted

REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which `from_pretrained` reports unfitting tensors instead of warning."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REMEDY = "Copy or save the model again, whole, with the config.json of these weights"
_NUM_NAMED = 3
_LARGE = 2**20
# Prefixes of names from wrappers that were saved with the model.
_WRAPPERS = re.compile(r"(?:_orig_mod|module|_fsdp_wrapped_module|base_model\.model)\.")
# Buffers that a model computes itself, and older releases saved.
_COMPUTED = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
# Parts besides the layers of a text model: more heads, and towers for other modalities.
_BESIDE = re.compile(
    r"(?:\w+\.)?(mtp|nextn|visual|vision|audio|image|video|speech|multi_modal|mm_)\w*\."
)
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(.*)")


@contextmanager
def about(role: str, path: str | Path) -> Iterator[None]:
    """Prefix each ModelError of the block with the role and path of the model."""
    try:
        yield
    except ModelError as error:
        is_said = f"the {role}" in str(error) and str(path) in str(error)
        raise error if is_said else ModelError(f"the {role} {path}: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory that transformers reads.

    Raises:
        ModelError: there are none, or a file in the index is missing.
    """
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    index = directory / _INDEX
    if not index.is_file():
        raise ModelError(
            f"it has no .safetensors weights that transformers reads ({_WEIGHTS}, or shards with "
            f"{_INDEX}): save the model in that format"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [directory / shard for shard in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"its {_INDEX} is damaged ({error!r}): copy or save the model again"
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{counted(len(missing), 'file')} of {len(files)} that its {_INDEX} names "
            f"{_are(missing)} missing: {_listed(missing)}. Copy the model again, whole"
        )
    return files


def check_headers(directory: Path, config: Any, architecture: Callable[[Any], Any | None]) -> None:
    """Check the names and shapes of a directory's weights against its architecture.

    Reads headers only. `architecture` returns the class of a config's model. `check_loaded` checks
    the rest: quantised models, whose tensors depend on the method, and models without a class here.

    Raises:
        ModelError: weights are missing, damaged, have another shape, or belong to no module.
    """
    headers = _read_headers(weight_files(directory))
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > len(headers):
        raise ModelError(
            f"config.json says {layers:,} layers, but the weights are {len(headers):,} tensors: "
            f"{_REMEDY}"
        )
    if getattr(config, "quantization_config", None) is not None:
        return
    kind = architecture(config)
    if kind is None:
        return
    with _LargeOnMeta():
        try:
            model, found = kind.from_pretrained(
                None, config=config, state_dict=headers, dtype=torch.float32, **REPORTING
            )
        except RuntimeError as error:
            check_conversion(error, directory)
            return
    check_loaded(model, found)


def check_loaded(model: Any, found: Mapping[str, Any]) -> None:
    """Check the loading report of `from_pretrained(**REPORTING)` for `model`.

    An unused tensor is refused if it belongs to a part that the model has (a bias, a norm or a
    layer that config.json lacks): those weights make another model. More heads, and towers for
    images or sound, are allowed; a causal language model does not need them.

    Raises:
        ModelError: weights are missing, have another shape, or belong to no module.
    """
    missing, unexpected = found["missing_keys"], found["unexpected_keys"]
    if getattr(model, "hf_quantizer", None) is not None:
        # Methods have tensors of their own, some of which files may lack.
        missing, unexpected = {name for name in missing if name.endswith(".weight")}, set()
    kind = type(model).__name__
    if missing:
        raise ModelError(
            f"{counted(len(missing), 'tensor')} of {kind} {_are(missing)} missing from its weights "
            f"and would be random: {_listed(missing)}. {_remedy(model, missing, unexpected)}"
        )
    if found["mismatched_keys"]:
        shapes = {
            f"{name} ({list(saved)}, not {list(wanted)})"
            for name, saved, wanted in found["mismatched_keys"]
        }
        raise ModelError(
            f"{counted(len(shapes), 'tensor')} of its weights {_are(shapes)} not of the shape that "
            f"its config.json gives {kind}: {_listed(shapes)}. {_REMEDY}"
        )
    strays = _strays(unexpected, model)
    if strays:
        raise ModelError(
            f"{counted(len(strays), 'tensor')} of its weights {_are(strays)} of no module of "
            f"{kind}: {_listed(strays)}. Restore its own config.json, this one is another model's"
        )


def check_conversion(error: RuntimeError, source: str | Path) -> None:
    """Explain an error of transformers in merging tensors, which does not name the cause.

    Raises:
        ModelError: `error` is such an error.
    """
    if "conversion of the weights" not in str(error):
        return
    lost = _lost_experts(_read_headers(weight_files(Path(source))) if Path(source).is_dir() else ())
    what = f"{counted(len(lost), 'tensor')} of experts missing from its weights: {_listed(lost)}"
    if not lost:
        what = "its tensors have shapes that the architecture cannot merge"
    raise ModelError(f"{what}. {_REMEDY}") from error


class _Header:
    """A tensor in a file, with the interface of safetensors but without data."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self._shape, self._dtype = tuple(shape), dtype

    def __getitem__(self, _: object) -> _Header:
        return self

    def get_dtype(self) -> str:
        return self._dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self._shape, dtype=dtype or torch.float32, device="meta")


class _LargeOnMeta(TorchFunctionMode):
    """Allocates no memory for large missing tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like and args[0].numel() > _LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _read_headers(files: Iterable[Path]) -> dict[str, _Header]:
    headers = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    headers[name] = _Header(part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is damaged or cut short ({error}): copy or save the model again"
            ) from error
    return headers


def _strays(names: Iterable[str], model: Any) -> set[str]:
    """The unused tensors in `names` that would change the model."""
    config = model.config.get_text_config()
    # Older releases saved buffers that newer ones compute, such as the causal mask.
    buffers = {name for name, _ in model.named_buffers()}
    modules = {name for name, _ in model.named_modules()}
    return {
        name
        for name in names
        if name not in buffers
        and not _COMPUTED.search(name)
        and not _is_prediction_layer(name, config)
        and _is_of(model, name, modules)
    }


def _is_of(model: Any, name: str, modules: set[str]) -> bool:
    """Whether the model has the module that a tensor's name belongs to."""
    base = model.base_model_prefix
    module = _module_of(name, modules)
    if module == base:
        return not _BESIDE.match(name)
    # Older files lack the prefix of the model body.
    return module != "" or _module_of(f"{base}.{name}", modules) not in ("", base)


def _module_of(name: str, modules: set[str]) -> str:
    """The innermost module of the model in a tensor's name."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _is_prediction_layer(name: str, config: Any) -> bool:
    """Whether a layer after the last one is a multi-token prediction layer, by config.json."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    depth = getattr(config, "num_hidden_layers", 0)
    more = getattr(config, "num_nextn_predict_layers", None) or 0
    return found is not None and depth <= int(found[1]) < depth + more


def _lost_experts(names: Iterable[str]) -> set[str]:
    """The tensors that only some of a layer's experts have."""
    experts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        if found := _EXPERT.match(name):
            experts[found[1], found[3]].add(found[2])
    of_layer: dict[str, set[str]] = defaultdict(set)
    for (layer, _), numbers in experts.items():
        of_layer[layer] |= numbers
    return {
        f"{layer}{number}.{part}"
        for (layer, part), numbers in experts.items()
        for number in of_layer[layer] - numbers
    }


def _remedy(model: Any, missing: set[str], unexpected: set[str]) -> str:
    wrapped = next(filter(None, map(_WRAPPERS.match, sorted(unexpected))), None)
    if wrapped is not None:
        return (
            f"Its names begin with {wrapped[0]!r}, from a wrapper: save the model inside it with "
            "save_pretrained"
        )
    if missing == {"lm_head.weight"}:
        return (
            'Set "tie_word_embeddings": true in its config.json if its head is its embedding, or '
            "copy or save the model again, whole"
        )
    return _REMEDY


def _are(names: Sized) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Iterable[str]) -> str:
    """The first names, ordered by layer, and the number of the rest."""
    found = sorted(names, key=_by_number)
    more = len(found) - _NUM_NAMED
    return ", ".join(found[:_NUM_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

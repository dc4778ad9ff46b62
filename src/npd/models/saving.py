"""Saves a loaded model as a Hugging Face directory, with the other files of its source.

Promises: weights and config are the model's. All other files are copied from the source instead of
being loaded and saved, so no library version can change them. Does not decide when to save, and
does not verify the result (`npd.train.checkpoint` does).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npd.config.paths import why_unmakeable
from npd.errors import InputError
from npd.models.files import CONFIG, GENERATION_CONFIG, copy_beside_weights
from npd.models.loading import quiet
from npd.store.files import give_usual_modes
from npd.text import shown_path

# Generation settings that are also fields of a model's config.
_OF_MODELS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


def save_pretrained(
    model: Any,
    directory: Path,
    *,
    source: str | Path,
    dtype: str | None = None,
    untie: bool = False,
) -> None:
    """Write `model` in Hugging Face format, with all files of `source` besides its weights.

    Floating-point weights are written in `dtype` (None: unchanged). `model` is not modified. Tied
    embeddings stay tied: one matrix in the file. With `untie` the LM head is saved as a separate
    matrix, and the config says so, for engines that do not tie them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = _cast(model.state_dict(), dtype)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if dtype is not None:
        # Libraries load the dtype that the config names, so it must be the saved one.
        config.dtype = dtype
    if untie:
        head = model.get_output_embeddings().weight
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor is head and name.startswith(_head_prefix(model)):
                state[name] = state[name].clone()
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    with quiet(), _without_generation(model):
        model.save_pretrained(directory, state_dict=state)
    config.to_json_file(directory / CONFIG, use_diff=True)
    _save_beside_weights(model, source, directory)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path` on success and vanishes on failure.

    Raises:
        InputError: `path` exists and is not an empty folder.
    """
    check_new(path)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        give_usual_modes(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path) -> None:
    """Check, before any work, that `path` does not exist, or is an empty directory.

    Raises:
        InputError: it exists.
    """
    if os.path.isdir(path) and not any(path.iterdir()):
        return
    if (why := why_unmakeable(path)) is not None:
        raise InputError(f"{shown_path(repr(str(path)))} {why}: give a new directory")


def _cast(state: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The tensors in `dtype`; tensors that share memory still share it."""
    import torch

    target = None if dtype is None else getattr(torch, dtype)
    copies: dict[tuple[Any, ...], Any] = {}
    return {
        name: copies.setdefault(
            (tensor.data_ptr(), *tensor.shape), tensor.detach().to("cpu", target)
        )
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


@contextmanager
def _without_generation(model: Any) -> Iterator[None]:
    """Remove the generation settings of `model` within the block.

    Transformers loads some settings that it refuses to save: sampling values without `do_sample`,
    or in config.json. Both config files are saved separately, unchanged.
    """
    from transformers import GenerationConfig

    config, generation = model.config, getattr(model, "generation_config", None)
    model.config = copy.deepcopy(config)
    for name in GenerationConfig().to_dict().keys() & vars(model.config).keys():
        if name not in _OF_MODELS:
            delattr(model.config, name)
    if generation is not None:
        model.generation_config = type(generation)()
    try:
        yield
    finally:
        model.config = config
        if generation is not None:
            model.generation_config = generation


def _head_prefix(model: Any) -> str:
    """The name of the LM head's module, whose tied weight is listed under the embedding's name."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def _save_beside_weights(model: Any, source: str | Path, directory: Path) -> None:
    folder = _folder_of(source)
    copy_beside_weights(folder, directory)
    if (folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(folder / GENERATION_CONFIG, directory / GENERATION_CONFIG)
    elif model.can_generate():
        model.generation_config.to_json_file(directory / GENERATION_CONFIG, use_diff=True)
    _name_ends(model, directory / GENERATION_CONFIG)


def _name_ends(model: Any, file: Path) -> None:
    """Add the live model's end tokens to a saved generation config."""
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    named, live = settings.get("eos_token_id"), model.generation_config.eos_token_id
    listed, wanted = _as_list(named), _as_list(live)
    if more := [token for token in wanted if token not in listed]:
        ids = [*listed, *more]
        settings["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _folder_of(source: str | Path) -> Path:
    """A model directory, or the cache folder of a hub name."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    return Path(str(cached_file(str(source), CONFIG))).parent

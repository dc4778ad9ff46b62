"""What a trainer leaves on disk: checkpoints to go on from, and the student in Hugging Face form.

A checkpoint is a directory written as a whole or not at all (`npd.store.snapshots`):
`model.safetensors` (the float32 parameters that are trained, by name, tied ones once),
`optimizer.safetensors` (AdamW's `exp_avg`, `exp_avg_sq` and `step`, each as
`<kind>/<parameter name>`) and `state.json`. Loading checks everything before it changes anything,
so a failed load leaves model and optimiser as they were. No pickle. Does not decide when to
save or which checkpoint counts. The files hold whole tensors whatever the number of ranks, so that
any number may go on; the first rank gathers and writes them, which takes it the memory of all.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from npd.errors import StoreError
from npd.modeling import quiet
from npd.store import files
from npd.store.snapshots import publish, verify
from npd.train.parallel import spread

_FORMAT = 1
_WEIGHTS, _MOMENTS, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_KINDS = ("exp_avg", "exp_avg_sq", "step")
# What a tokenizer may consist of; names that are missing in a directory are passed over.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that are trained and their moments, by name, as they lie on this rank."""
    weights = {name: p.detach() for name, p in _trained(model).items()}
    return weights, _moments(model, optimizer)


def save(
    directory: Path,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    *,
    last_step: int | None,
) -> None:
    """Write a checkpoint at `directory`, replacing one that is there once the new one is whole.

    Raises:
        RunError: the disk is full or the place cannot be written; an old checkpoint stays.
    """

    def write(into: Path) -> None:
        for file, tensors in ((_WEIGHTS, weights), (_MOMENTS, moments)):
            save_file({name: t.contiguous() for name, t in tensors.items()}, into / file)
        state = {"format": _FORMAT, "last_step": last_step, "torch": str(torch.__version__)}
        (into / _STATE).write_text(json.dumps(state, indent=2) + "\n")

    if not directory.exists():
        publish(directory, write)
        return
    # `publish` would keep what is there, but after a resume the same step may come out otherwise.
    fresh, old = files.temporary(directory), files.temporary(directory)
    try:
        publish(fresh, write)
        os.replace(directory, old)
        os.replace(fresh, directory)
        files.sync(directory.parent)
    finally:
        files.remove(fresh)
        files.remove(old)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Restore `model` and `optimizer` in place; gives the index of the last step taken.

    Raises:
        StoreError: the checkpoint is missing or damaged, or its parameters are not the model's.
    """
    verify(directory)
    try:
        state = json.loads((directory / _STATE).read_text())
        with (
            safe_open(directory / _WEIGHTS, framework="pt") as weights,
            safe_open(directory / _MOMENTS, framework="pt") as moments,
        ):
            _check(directory, state, weights, moments, model)
            _restore(weights, moments, model, optimizer)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"checkpoint {directory} cannot be read ({error}): resume from an earlier one"
        ) from error
    last_step = state["last_step"]
    return None if last_step is None else int(last_step)


def save_pretrained(
    model: Any,
    directory: Path,
    *,
    dtype: str,
    source: str,
    trust_remote_code: bool,
    untie: bool = False,
) -> None:
    """Write `model` in Hugging Face form with the tokenizer of `source`; `model` is not changed.

    Tied embeddings stay tied, as in the source: one matrix in the file. With `untie` the LM head is
    a matrix of its own, and the saved config says so: the same model, for readers that lose ties.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = getattr(torch, dtype)
    copies: dict[int, Tensor] = {}
    state = {
        name: copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", target))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }
    # The saved config names the type of the live weights; readers go by it.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if untie:
        head = model.get_output_embeddings().weight
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor is head and name.startswith(_head_prefix(model)):
                state[name] = state[name].clone()
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    with quiet():
        model.save_pretrained(directory, state_dict=state)
    config.save_pretrained(directory)
    _save_tokenizer(source, directory, trust_remote_code)


def _head_prefix(model: Any) -> str:
    """The name of the LM head's module: its weight goes by the embedding's name too."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def _save_tokenizer(source: str, directory: Path, trust_remote_code: bool) -> None:
    if Path(source).is_dir():
        # Copied, not loaded and saved: the very same tokenizer, whatever library version reads it.
        for name in _TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(directory)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every moment by kind and parameter name; a parameter never stepped has zeros at step 0."""
    out: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state = optimizer.state.get(parameter, {})
        for kind in _KINDS:
            empty = torch.zeros(()) if kind == "step" else torch.zeros_like(parameter)
            out[f"{kind}/{name}"] = state.get(kind, empty).detach()
    return out


def _check(directory: Path, state: Any, weights: Any, moments: Any, model: nn.Module) -> None:
    if state.get("format") != _FORMAT:
        raise StoreError(
            f"checkpoint {directory} has format {state.get('format')}, this version reads "
            f"{_FORMAT}: resume with the version of npd that wrote it"
        )
    expected = {name: list(p.shape) for name, p in _trained(model).items()}
    moment_shapes = {
        f"{kind}/{name}": [] if kind == "step" else shape
        for name, shape in expected.items()
        for kind in _KINDS
    }
    for file, stored, wanted in (
        (_WEIGHTS, weights, expected),
        (_MOMENTS, moments, moment_shapes),
    ):
        found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        if found != wanted:
            name = min(n for n in {**found, **wanted} if found.get(n) != wanted.get(n))
            raise StoreError(
                f"checkpoint {directory / file} is not of this model: {name} has shape "
                f"{found.get(name)}, the model's is {wanted.get(name)}. Resume with the student "
                "the run was started with"
            )


def _restore(
    weights: Any, moments: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    trained = _trained(model)
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {kind: _stored(moments, kind, names[id(p)], p) for kind in _KINDS}
        for index, p in enumerate(ordered)
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread(weights.get_tensor(name), parameter))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _stored(moments: Any, kind: str, name: str, parameter: nn.Parameter) -> Tensor:
    """A moment of `parameter`, this rank's part of it; the count of steps is everybody's."""
    whole: Tensor = moments.get_tensor(f"{kind}/{name}")
    return whole if kind == "step" else spread(whole, parameter)

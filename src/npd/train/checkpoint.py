"""Checkpoints of the trainer, and the check that a saved student equals the live one.

A checkpoint is a directory, written completely or not at all (`npd.store.snapshots`):
`model.safetensors` (the trained float32 parameters by name, tied ones once),
`optimizer.safetensors` (AdamW's `exp_avg`, `exp_avg_sq` and `step`, each as
`<kind>/<parameter name>`) and `state.json`. Loading checks everything before it changes anything,
so a failed load leaves model and optimiser unchanged. No pickle. The files hold full tensors for
any number of ranks, so that any number can resume. Rank 0 gathers and writes them, and needs the
memory for it. Does not decide when to save or which checkpoint to load.

Saving copies the state into main memory, which training waits for, and writes the copy in a thread
(`CheckpointWriter`), which it does not wait for.

A library may quantise, rename or drop tensors when it saves them. So a saved student is loaded
again and compared in two ways: every tensor by name, to the bit in the saved dtype, and the
log-probs of a probe text, which also depend on the config.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from npd.errors import RunError, StoreError
from npd.models import lora
from npd.models.distributed import DistContext
from npd.models.files import in_one_line
from npd.models.lm_head import head_of
from npd.models.loading import autocast, hidden_states, load_model, pack_documents
from npd.store import files
from npd.store.snapshots import Entry, HashedFile, publish, verify
from npd.train.fsdp import gather, shard_like
from npd.train.objective import moments_of
from npd.types import IntArray

_FORMAT = 1
_WEIGHTS, _MOMENTS, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_KINDS = ("exp_avg", "exp_avg_sq", "step")


# A power of two, to which torch rounds up what it pins.
_BLOCK = 2**26
# The names of dtypes in safetensors files.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class HostCopy:
    """Tensors of one moment in main memory, as the contents of safetensors files.

    Their bytes lie one after the other in blocks, which the next copy uses again. With `is_pinned`
    a GPU writes into them without a detour. Not thread-safe.
    """

    def __init__(self, *, is_pinned: bool, block: int = _BLOCK) -> None:
        self._is_pinned, self._block, self._blocks = is_pinned, block, list[Tensor]()
        self._size = 0
        self._files: dict[str, tuple[int, dict[str, Any]]] = {}

    def clear(self) -> None:
        """Forget the tensors, not the memory."""
        self._size, self._files = 0, {}

    def add(self, file: str, tensors: Mapping[str, Tensor], dist: DistContext) -> None:
        """Copy tensors as a file's contents, on rank 0; all ranks must call it, to gather them."""
        start, header = self._size, dict[str, Any]()
        # Wide numbers first, so that all are aligned.
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            whole = gather(tensors[name].detach())
            if not dist.is_first:
                continue
            low = self._size - start
            self._append(whole.contiguous().reshape(-1).view(torch.uint8))
            offsets = [low, self._size - start]
            kind = _DTYPES[whole.dtype]
            header[name] = {"dtype": kind, "shape": [*whole.shape], "data_offsets": offsets}
        self._files[file] = start, header
        if self._is_pinned:
            torch.accelerator.synchronize()

    def _append(self, data: Tensor) -> None:
        while len(data):
            index, offset = divmod(self._size, self._block)
            if index == len(self._blocks):
                block = torch.empty(self._block, dtype=torch.uint8, pin_memory=self._is_pinned)
                self._blocks.append(block)
            room = self._block - offset
            part, data = data[:room], data[room:]
            self._blocks[index][offset : offset + len(part)].copy_(part, non_blocking=True)
            self._size += len(part)

    def files(self) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
        """The name of each file, and its bytes in pieces."""
        ends = [*(start for start, _ in self._files.values()), self._size][1:]
        for (name, (start, header)), end in zip(self._files.items(), ends, strict=True):
            yield name, self._pieces(header, start, end)

    def _pieces(self, header: dict[str, Any], at: int, end: int) -> Iterator[bytes | memoryview]:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        while at < end:
            index, offset = divmod(at, self._block)
            piece = memoryview(self._blocks[index].numpy().data)[offset : offset + end - at]
            yield piece
            at += len(piece)


class _Dropped(Exception):
    """The checkpoint is no longer wanted."""


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on, at most one at a time.

    Consumes: the trainer's state, which `start` copies. Produces: a checkpoint, whole or not at
    all. Waits for: the disk. Unblocked by: the disk, or `close`, which drops an unfinished one. A
    failed write is raised by each later call about it. All ranks must make the same calls.
    """

    def __init__(self, dist: DistContext, *, is_pinned: bool) -> None:
        self._dist, self._copy = dist, HostCopy(is_pinned=is_pinned)
        self._directory: Path | None = None
        self._thread: Thread | None = None
        self._result: Future[None] = Future()
        self._is_closing = Event()
        self._done: set[Path] = set()

    def start(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        last_step: int | None,
        store: Callable[[Path], None] | None = None,
    ) -> float:
        """Copy the state and begin to write it; returns the seconds waited for the last one.

        `store` is called with the complete directory, in the thread. Does nothing if this directory
        is being written.

        Raises:
            RunError: the last checkpoint could not be written.
        """
        started = time.monotonic()
        # Rank 0 decides, because the copy is made together.
        if not self._dist.from_rank0(lambda: self._can_start(directory)):
            if directory != self._directory:
                self._wait()
            return 0.0
        self._wait()
        waited = time.monotonic() - started
        self._copy.clear()
        self._copy.add(_WEIGHTS, _trained(model), self._dist)
        self._copy.add(_MOMENTS, _moments(model, optimizer), self._dist)
        self._directory, self._result = directory, Future()
        self._done.discard(directory)
        state = {"format": _FORMAT, "last_step": last_step, "torch": str(torch.__version__)}
        if self._dist.is_first:
            work = (self._result, directory, state, store)
            self._thread = Thread(target=self._work, args=work, name="npd-checkpoint")
            self._thread.start()
        else:
            self._result.set_result(None)
        return waited

    def is_done(self, directory: Path) -> bool:
        """Whether a checkpoint that was started is complete. Raises what its write raised."""
        if directory in self._done:
            return True
        assert directory == self._directory, f"{directory} was never started"
        if not self._result.done():
            return False
        self._wait()
        return True

    def finish(self) -> None:
        """Wait until the checkpoint is complete. Raises what its write raised, once."""
        try:
            self._wait()
        finally:
            self._directory = None

    def close(self) -> None:
        """Drop the checkpoint that is being written, if any."""
        self._is_closing.set()
        if self._thread is not None:
            self._thread.join()

    def _can_start(self, directory: Path) -> bool:
        """Whether none is being written any more; False for the same one, and after a failure."""
        if self._directory is None or self._directory in self._done:
            return True
        return directory != self._directory and self._result.exception() is None

    def _wait(self) -> None:
        if self._directory is not None and self._directory not in self._done:
            self._result.result()
            self._done.add(self._directory)

    def _work(
        self,
        result: Future[None],
        directory: Path,
        state: dict[str, Any],
        store: Callable[[Path], None] | None,
    ) -> None:
        try:
            entries: dict[str, Entry] = {}
            _replace(directory, lambda into: self._write(into, state, entries), entries)
            if store is not None:
                store(directory)
            result.set_result(None)
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            result.set_exception(error)

    def _write(self, into: Path, state: dict[str, Any], entries: dict[str, Entry]) -> None:
        for name, pieces in self._copy.files():
            with HashedFile(into / name) as file:
                for piece in pieces:
                    if self._is_closing.is_set():
                        raise _Dropped
                    file.write(piece)
            entries[name] = file.entry
        (into / _STATE).write_text(json.dumps(state, indent=2) + "\n")


def _replace(directory: Path, write: Callable[[Path], object], hashed: Mapping[str, Entry]) -> None:
    """Publish a checkpoint at `directory`; an older one is replaced once the new one is complete.

    Raises:
        RunError: the disk is full or not writable; an older checkpoint stays.
    """
    if not directory.exists():
        publish(directory, write, hashed)
        return
    # `publish` would keep an existing one, which is damaged: a whole one is not saved again.
    fresh, old = files.temporary(directory), files.temporary(directory)
    try:
        publish(fresh, write, hashed)
        os.replace(directory, old)
        os.replace(fresh, directory)
        files.sync(directory.parent)
    finally:
        files.remove(fresh)
        files.remove(old)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Restore `model` and `optimizer` in place; returns the index of the last step taken.

    Raises:
        StoreError: the checkpoint is missing, damaged, or of another model.
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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every moment by kind and parameter name; zeros at step 0 for a parameter never stepped."""
    out: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state = moments_of(optimizer, parameter)
        for kind in _KINDS:
            moment = state.get(kind)
            if moment is None:
                moment = torch.zeros(()) if kind == "step" else torch.zeros_like(parameter)
            out[f"{kind}/{name}"] = moment.detach()
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
                f"{found.get(name)}, not {wanted.get(name)}: resume with the student that the run "
                "was started with"
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
            parameter.copy_(shard_like(weights.get_tensor(name), parameter))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _stored(moments: Any, kind: str, name: str, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a moment of `parameter`; the step count is the same on all ranks."""
    whole: Tensor = moments.get_tensor(f"{kind}/{name}")
    return whole if kind == "step" else shard_like(whole, parameter)


# The largest KL in nats between saved and live student at the median position. Rounding weights to
# bfloat16 gives about 1e-3, a different model several nats. In a mixture of experts, rounding can
# route single tokens to other experts, hence the median.
_MAX_KL = 0.1
_PROBE_TOKENS = 32


def check_written(
    directory: Path, live: Any, *, dtype: str, student: str, trust_remote_code: bool
) -> Any:
    """Check that the model in `directory` equals `live` in `dtype`; returns the loaded model.

    Raises:
        RunError: the saved model differs or cannot be loaded.
    """
    written = _load(directory, dtype, student, trust_remote_code)
    difference = _difference(written.state_dict(), live.state_dict(), dtype)
    if difference:
        raise _unlike(directory, student, difference)
    return written


def check_adapter(
    directory: Path, live: Any, *, dtype: str, student: str, trust_remote_code: bool
) -> Any:
    """Check a saved LoRA adapter of `live`; returns the base with the adapter merged.

    Raises:
        RunError: the saved adapter differs or cannot be merged.
    """
    difference = _difference(lora.load(directory), lora.state_of(live), dtype)
    if difference:
        raise _unlike(directory, student, difference)
    return _load(directory, dtype, student, trust_remote_code)


def check_alike(
    directory: Path, written: Any, live: Any, *, student: str, is_mixed: bool = False
) -> None:
    """Check that both models have nearly the same log-probs on a probe text.

    With `is_mixed` the live model has weights in several dtypes and runs under autocast.

    Raises:
        RunError: the log-probs differ.
    """
    ids = _probe(live)
    with torch.no_grad(), _evaluating(live):
        theirs = written.float()(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
        with autocast(live.device, is_on=is_mixed):
            hidden = hidden_states(live, pack_documents([ids], live.device))
        ours = head_of(live).logits(hidden).to("cpu")
    p, q = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1).median().item()
    if not kl <= _MAX_KL:  # also refuses NaN
        what = f"its log-probs of a probe text are {kl:.3g} nats away"
        raise _unlike(directory, student, what)


def _load(directory: Path, dtype: str, student: str, trust_remote_code: bool) -> Any:
    try:
        return load_model(directory, dtype=dtype, packed=False, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unlike(directory, student, f"it does not load: {in_one_line(error)}") from error


def _difference(written: Mapping[str, Tensor], live: Mapping[str, Tensor], dtype: str) -> str:
    lost, odd = sorted(live.keys() - written.keys()), sorted(written.keys() - live.keys())
    if lost or odd:
        which = f"lacks {lost[0]}" if lost else f"has an extra tensor {odd[0]}"
        return f"it {which} ({len(lost)} of {len(live)} tensors missing, {len(odd)} too many)"
    for name, tensor in live.items():
        ours, theirs = (_as_written(side, dtype) for side in (tensor, written[name]))
        if theirs.shape != ours.shape:
            return f"its {name} has shape {list(theirs.shape)}, the live one {list(ours.shape)}"
        if not torch.equal(theirs, ours):
            most = (theirs.float() - ours.float()).abs().max().item()
            return f"its {name} differs by up to {most:.3g}"
    return ""


def _as_written(tensor: Tensor, dtype: str) -> Tensor:
    tensor = tensor.detach()
    return tensor.to("cpu", getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)


def _probe(model: Any) -> IntArray:
    vocabulary = model.config.get_text_config().vocab_size
    return np.asarray([7 * i % vocabulary for i in range(_PROBE_TOKENS)], dtype=np.int32)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _unlike(directory: Path, student: str, what: str) -> RunError:
    return RunError(
        f"the student written to {directory} is not the one in training, from {student}: {what}; "
        "this version of transformers does not save the architecture correctly: try another "
        "version, or another student"
    )

"""The trainer: executes segments of optimiser steps on packed rows, and decides nothing.

A step's loss is a mean over its response tokens, so packing and row order do not change it (to
float noise). Only response positions reach the LM head. A step with a loss or gradient that is not
finite changes nothing. A step's random numbers follow from the seed and its index, so a resumed run
repeats an uninterrupted one: bit for bit on a CPU, on a GPU to float noise without `deterministic`.

With several ranks (`fsdp`) each has a shard of the student and trains its rows of a step. Sums are
reduced over ranks, so every rank has the same report. All ranks must make the same calls in the
same order. On GPUs one rank works the same way in bfloat16, as a group of its own. A `Step` brings
its samples, their order and its learning rate (`npd.schedule`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npd.config import LossConfig, TrainConfig
from npd.config.sections import chunk_for
from npd.errors import ModelError, RunError
from npd.models import lora
from npd.models.device import (
    deterministic,
    free_cached,
    generators_of,
    is_gpu,
    is_pinnable,
    reset_peak,
    resolve_device,
    set_cublas,
)
from npd.models.distributed import DistContext, connect_alone
from npd.models.kernels.compile import compile_layers, uncompiled
from npd.models.loading import load_model, pack_documents
from npd.models.out_of_memory import Fitting
from npd.models.packed_attention import same_row
from npd.models.saving import save_pretrained
from npd.train import checkpoint
from npd.train.batch import Read, StepRows, TrainRow, prefetch
from npd.train.checkpoint import CheckpointWriter, check_adapter, check_alike, check_written
from npd.train.fsdp import (
    free_gathered,
    gather_all,
    has_no_weights,
    is_kept_in_float32,
    load_student,
    recover,
    shard,
    share_out,
    tensors_of,
    to_meta,
    with_params,
)
from npd.train.objective import Objective, build_optimizer, clip, move, to_host
from npd.train.step_metrics import Measured, check_finite, peak_memory_mib, report
from npd.types import Segment, SegmentReport, StepReport

__all__ = ["Trainer", "build_optimizer"]

_IF_NOTHING_FITS = (
    "set train.activation_checkpointing: true or a lower loss.chunk (with --resume, too), or "
    "data.max_prompt_tokens and generate.max_new_tokens lower in a new run"
)


class Trainer:
    """A student in training: float32 weights and AdamW moments, compute in `config.dtype`.

    With `config.lora` only adapters are trained, checkpointed and saved as snapshots. `read`
    returns the sample of a `SampleRef`: `Scored`, or `Rollout` without a teacher (`loss.kd_weight`
    0). `stop_ids` are added to the end tokens of saved students. `last_step` is the index of the
    last step taken, None before the first.

    Raises:
        ModelError: `student` cannot be loaded, or cannot be trained as `config` says.
    """

    def __init__(
        self,
        config: TrainConfig,
        loss: LossConfig,
        *,
        student: str | Path,
        read: Read,
        device: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        dist: DistContext | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.config = config
        self.loss = loss
        self.student = str(student)
        self.device = resolve_device(device)
        if config.deterministic:
            set_cublas()
        self.dist = DistContext() if dist is None else dist
        # A student to be sharded may not fit the device, so sharding moves it there.
        first_device = self.device if self.dist.size == 1 else "cpu"
        self.model = load_student(
            *(student, self.dist, first_device),
            trust=trust_remote_code,
            compute_dtype=config.dtype,
        )
        self._more_ends = _add_stop_ids(self.model, stop_ids)
        self._prepare(seed)
        self.optimizer = build_optimizer(self.model, config)
        self.last_step: int | None = None
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trust_remote_code = trust_remote_code
        self._is_proven = False
        self._is_broken = False  # whether the last pass of a sharded student failed
        self._read, self._seed = read, seed
        self._is_away = False
        self._checkpoints = CheckpointWriter(self.dist, is_pinned=is_pinnable(self.device))
        self._chunk = loss.chunk or chunk_for(
            self.model.config.get_text_config().vocab_size, is_cpu=self.device == "cpu"
        )
        # The loss is the same for any chunk, but `reference` has none.
        self._chunks = None if loss.impl == "reference" else Fitting("loss.chunk", self._chunk)
        self._fitting = Fitting(
            "train.row_tokens", config.row_tokens, _IF_NOTHING_FITS, then=self._chunks
        )

    def _prepare(self, seed: int) -> None:
        """Adapters, recomputed activations, compiled layers and shards, in the order they need."""
        if self.config.lora is not None:
            lora.attach(
                self.model, self.config.lora, base=self.student, seed=seed, dtype=self.config.dtype
            )
        self.model.train()
        if self.config.activation_checkpointing is True:
            recompute_activations(self.model)
        is_bf16 = self.config.dtype == "bfloat16"
        is_cast = is_bf16 and self._is_cast_by_fsdp()
        self._meta_model = (
            to_meta(self.model) if self.dist.is_group and self.dist.is_first else None
        )
        self._objective = Objective(self.model, self.loss, is_autocast=is_bf16 and not is_cast)
        if self.config.compile:
            compile_layers(self.model, self.device)
        if self.dist.is_group:
            self._shard(torch.bfloat16 if is_cast else None)
        if is_cast:
            check_computes(self._objective, self.model, self.device)

    def off_device(self) -> None:
        """Move the student and the optimiser's state to main memory."""
        if not self._is_away:
            move(self._objective, self.optimizer, to_host)
            self._is_away = True
            free_cached()

    def to_device(self) -> None:
        """Undo `off_device`."""
        if self._is_away:
            move(self._objective, self.optimizer, lambda tensor: tensor.to(self.device))
            self._is_away = False

    def _shard(self, dtype: torch.dtype | None) -> None:
        """Share the student out over the ranks; those that have not loaded it get their parts."""
        is_read_once = self.dist.gather(has_no_weights(self.model))[-1]
        whole = tensors_of(self._objective) if is_read_once and self.dist.is_first else {}
        keeps_weights = self.config.shard == "optimizer" and self.dist.size > 1
        given = (self._objective, self.model, self.dist, self.device, dtype)
        shard(*given, keeps_weights=keeps_weights)
        if is_read_once:
            share_out(self._objective, whole, self.dist, self.device)

    def _is_cast_by_fsdp(self) -> bool:
        """Whether FSDP casts the weights instead of autocast.

        Autocast keeps a copy of every weight until the backward pass has used it. One GPU becomes
        a group if `train.shard` asks for that. On a CPU, one rank keeps autocast, which is more
        exact there and faster.
        """
        if is_kept_in_float32(self.model):
            return False
        if self.config.shard != "auto" and not self.dist.is_group and is_gpu(self.device):
            self.dist = connect_alone(self.device)
        return self.dist.is_group

    def train(
        self, segment: Segment, *, on_step: Callable[[StepReport], None] | None = None
    ) -> SegmentReport:
        """Take the segment's steps in order; `on_step` is called after each.

        Raises:
            RunError: a loss or gradient norm is not finite, one sample (with several ranks, one
                row) does not fit the device, or an operation is not deterministic although all must
                be. Weights and optimiser are those after the last step.
        """
        reports = []
        reset_peak(self.device)
        is_pinned, rank = is_pinnable(self.device), self.dist.rank
        ahead = prefetch(segment, self._read, self.loss, rank=rank, is_pinned=is_pinned)
        with deterministic(self.config.deterministic), closing(ahead) as steps:
            started = time.perf_counter()
            for step in steps:
                reports.append(self._step(step, segment.version, started))
                started = time.perf_counter()
                if on_step is not None:
                    on_step(reports[-1])
        peak = max(self.dist.gather(peak_memory_mib(self.device)))
        return SegmentReport(segment.index, tuple(reports), peak)

    @contextmanager
    def full_model(self) -> Iterator[Any | None]:
        """The unsharded student within the block, for evaluation; None on all ranks but rank 0.

        With one rank it is the live model. With several, all ranks must enter the block, and rank 0
        gets a copy on its device.
        """
        if self.dist.size == 1:
            with uncompiled() if self.config.compile else nullcontext():
                yield self._unsharded()
            return
        tensors = gather_all(dict(self.model.named_parameters()), self.dist, self.device)
        yield (
            None
            if self._meta_model is None
            else with_params(self._meta_model, tensors).to(self.device)
        )

    @contextmanager
    def gathered_for_save(self) -> Iterator[Any | None]:
        """As `full_model`, on the CPU for saving. With LoRA the base is loaded from disk."""
        if self.dist.size == 1:
            yield self._unsharded()
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensors = gather_all(trained, self.dist, "cpu")
        yield None if self._meta_model is None else with_params(self._meta_model, tensors)

    def save_snapshot(
        self,
        directory: str | Path,
        dtype: str = "bfloat16",
        *,
        untie: bool = False,
        full: Any = None,
    ) -> None:
        """Write a snapshot that `load_model` can load; with LoRA it is the adapter alone.

        `untie` writes a tied LM head as a separate tensor. `full` is the model from
        `gathered_for_save()`, not needed with one rank. The first snapshot is loaded again and
        compared.

        Raises:
            RunError: the saved model differs from the student.
        """
        model, into = self._written(full), Path(directory)
        if self.config.lora is None:
            self._write(model, into, dtype, untie=untie)
            check = check_written
        else:
            lora.save(model, into, dtype, self._more_ends)
            check = check_adapter
        if not self._is_proven:
            self._check_alike(into, check(into, model, **self._origin(dtype)), full)
            self._is_proven = True

    def save_pretrained(
        self, directory: str | Path, dtype: str = "bfloat16", *, full: Any = None
    ) -> None:
        """Write the student, LoRA merged, as a Hugging Face directory with weights in `dtype`.

        Raises:
            RunError: the saved model differs from the student.
        """
        model, into = self._written(full), Path(directory)
        if self.config.lora is not None:
            adapter = into / "adapter"
            lora.save(model, adapter, dtype, self._more_ends)
            trust = self._trust_remote_code
            model = load_model(adapter, packed=False, trust_remote_code=trust)
        self._write(model, into, dtype)
        self._check_alike(into, check_written(into, model, **self._origin(dtype)), full)

    def _write(self, model: Any, into: Path, dtype: str, *, untie: bool = False) -> None:
        save_pretrained(model, into, source=self.student, dtype=dtype, untie=untie)

    def _origin(self, dtype: str) -> dict[str, Any]:
        trust = self._trust_remote_code
        return {"dtype": dtype, "student": self.student, "trust_remote_code": trust}

    def _check_alike(self, directory: Path, written: Any, full: Any) -> None:
        """Compare with the live student; sharded adapters are skipped (no rank has the base)."""
        is_adapted = self.config.lora is not None
        if is_adapted and self.dist.size > 1:
            return
        is_mixed = is_adapted and self.config.dtype == "bfloat16"
        live, student = self._written(full), self.student
        with uncompiled() if self.config.compile else nullcontext():
            check_alike(directory, written, live, student=student, is_mixed=is_mixed)

    def _written(self, full: Any) -> Any:
        assert full is not None or self.dist.size == 1, "only rank 0 writes"
        return self._unsharded() if full is None else full

    def _unsharded(self) -> Any:
        """The student of a single rank outside FSDP; the weights are the same tensors."""
        if not self.dist.is_group:
            return self.model
        tensors = gather_all(dict(self.model.named_parameters()), self.dist, self.device)
        return with_params(self._meta_model, tensors).to(self.device)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write the state for resuming, completely or not at all, and wait for it.

        Rank 0 writes full tensors, so that any number of ranks can resume.

        Raises:
            RunError: the disk is full or not writable; an older checkpoint stays.
        """
        self.start_checkpoint(directory)
        self._checkpoints.finish()

    def start_checkpoint(
        self, directory: str | Path, store: Callable[[Path], None] | None = None
    ) -> float:
        """Copy the state for resuming; it is written while training goes on.

        Waits for the checkpoint before it; returns the seconds. `store` is called in the writing
        thread with the complete directory. Raises RunError if the one before it failed.
        """
        return self._checkpoints.start(
            Path(directory), self.model, self.optimizer, last_step=self.last_step, store=store
        )

    def is_saved(self, directory: str | Path) -> bool:
        """Whether a checkpoint that was started is complete. Raises RunError if it failed."""
        return self._checkpoints.is_done(Path(directory))

    def close(self) -> None:
        """Drop a checkpoint that is being written."""
        self._checkpoints.close()

    def load_checkpoint(self, directory: str | Path) -> int | None:
        """Restore a checkpoint; returns its `last_step`.

        Raises:
            StoreError: the checkpoint is missing, damaged, or of another model.
        """
        self.last_step = checkpoint.load(Path(directory), self.model, self.optimizer)
        return self.last_step

    def _step(self, given: StepRows, version: int, started: float) -> StepReport:
        counts = self.dist.gather(given.num_tokens)
        step, (tokens, skipped) = given.step, map(sum, zip(*counts, strict=True))
        doing = f"step {step.index}: "
        try:
            rows = self._fitting.run(
                lambda: self._attempt(given, tokens), doing=doing, least=given.longest
            )
            norm = clip(self._parameters, self.config.clip)
            measured = Measured.together(self.dist.gather(Measured.of(rows, norm)))
            check_finite(step, measured)
            for group in self.optimizer.param_groups:
                group["lr"] = step.lr
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{doing}the device has no memory left for AdamW's moments: {_IF_NOTHING_FITS}"
            ) from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.last_step = step.index
        seconds = time.perf_counter() - started
        found = report(step, measured, tokens, version, self.config.row_tokens, seconds)
        return replace(found, skipped_tokens=skipped)

    def _attempt(self, given: StepRows, tokens: int) -> list[dict[str, Tensor]]:
        if self._is_broken:
            recover(self._objective)
        self._is_broken = self.dist.is_group
        rows = self._accumulate(given, tokens)
        self._is_broken = False
        return rows

    def _accumulate(self, given: StepRows, tokens: int) -> list[dict[str, Tensor]]:
        """Add the gradients of a step's rows, each in parts that fit; returns each row's numbers.

        The loss is a sum over tokens, so a row in parts has the gradient of the whole row. Where
        one sample alone does not fit, fewer of its tokens have logits at once.
        """
        self.optimizer.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
        most, rows = self._fitting.of(self.config.row_tokens), []
        if self._chunks is not None and self._chunks.divisor > 1:
            self._objective.chunk = self._chunks.of(self._chunk)
        with step_randomness(self.device, self._seed, given.step.index, self.dist.rank):
            for row in given.rows:
                parts = [self._backward(part, tokens) for part in row.parts(most)]
                rows.append({n: torch.stack([p[n] for p in parts]).sum(0) for n in parts[0]})
            for row in given.idle:  # other ranks' rows need this rank in their collectives
                self._backward(row, 1, weight=0.0)
        return rows

    def _backward(self, row: TrainRow, tokens: int, weight: float = 1.0) -> dict[str, Tensor]:
        """Add one row's gradient; returns its share of the step's loss and its metric sums."""
        loss, metrics = self._objective(row.to(self.device), tokens)
        # FSDP averages gradients over ranks, but a step's gradient is a sum.
        loss.backward(torch.full_like(loss, weight * self.dist.size))
        return {"loss": loss.detach(), **metrics}


@contextmanager
def step_randomness(device: str, seed: int, step: int, rank: int) -> Iterator[None]:
    """Seed dropout from (seed, step, rank) within the block, then restore the generator's state."""
    state = np.random.SeedSequence([seed % 2**63, step, rank]).generate_state(1, np.uint64)
    with torch.random.fork_rng(**generators_of(device)):
        torch.manual_seed(int(state[0]) % 2**63)
        yield


def check_computes(objective: Any, model: Any, device: str) -> None:
    """Run a sharded student on a few tokens, because its code may demand weights of another dtype.

    All ranks must call it.

    Raises:
        ModelError: it does not run.
    """
    ids = np.arange(6, dtype=np.int32) % model.config.get_text_config().vocab_size
    row = TrainRow(
        pack_documents([ids[:4], ids[4:]], device),
        positions_N=torch.arange(len(ids), device=device),
        labels_N=torch.zeros(len(ids), dtype=torch.int64, device=device),
        topk_ids_NK=None,
        topk_logprobs_NK=None,
        behavior_N=None,
    )
    try:
        with torch.no_grad(), step_randomness(device, 0, 0, 0), uncompiled():
            objective(row, len(ids))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"this architecture ({type(model).__name__}) does not compute with bfloat16 weights "
            f"({error!r:.100}): set train.dtype: float32"
        ) from error
    free_gathered(objective)


def recompute_activations(model: Any) -> None:
    """Activation checkpointing: the backward pass recomputes each layer's activations.

    Raises:
        ModelError: the architecture does not support it.
    """
    # The layer class's name depends on the release of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": same_row}
        )
    except ValueError as error:
        raise ModelError(
            f"this architecture ({type(model).__name__}) cannot recompute activations: set "
            "train.activation_checkpointing: false"
        ) from error


def _add_stop_ids(model: Any, stop_ids: Collection[int]) -> list[int]:
    """Add `stop_ids` to the end tokens in the generation config that is saved with the model.

    Returns all end tokens, or an empty list if nothing was added.
    """
    own = model.generation_config.eos_token_id
    listed = list(own) if isinstance(own, list) else [] if own is None else [own]
    more = sorted(set(stop_ids) - set(listed))
    if not more:
        return []
    ids = [*listed, *more]
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    return ids

"""The trainer: executes segments of optimiser steps on packed rows, and decides nothing.

Promises: a step's loss is a mean over its response tokens, so neither packing, nor row order, nor
how samples are spread over rows changes it (to float noise); only response positions reach the LM
head; a step whose loss or gradient is not finite changes nothing; a step's random numbers follow
from the seed and its index, so a resumed run repeats an uninterrupted one.
Does not choose samples, order or learning rate: those arrive in `Step`. This build trains on one
rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npd import lora
from npd.config import LossConfig, TrainConfig
from npd.errors import RunError
from npd.modeling import decoding, head_of, hidden_states, load_model, resolve_device
from npd.train import checkpoint
from npd.train.batch import Read, Sample, TrainRow, build_row, rollout_of
from npd.train.loss import near_policy_loss
from npd.train.measure import Measured, check_finite, report
from npd.types import Segment, SegmentReport, Step, StepReport


class Trainer:
    """A student in training: float32 weights and AdamW moments, compute in `config.dtype`.

    With `config.lora` only adapters are trained, kept in checkpoints and written as snapshots.
    `read` gives the sample behind a `SampleRef`: `Scored`, or `Rollout` where no teacher is
    involved (`loss.kd_weight` 0). `last_step` is the index of the last step taken, None before.

    Raises:
        ModelError: `student` cannot be loaded.
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
        rank: int = 0,
    ) -> None:
        self.config = config
        self.loss = loss
        self.student = str(student)
        self.device = resolve_device(device)
        self.model = load_model(
            student, device=self.device, packed=True, trust_remote_code=trust_remote_code
        )
        if config.lora is not None:
            lora.attach(self.model, config.lora, base=self.student, seed=seed, dtype=config.dtype)
        self.model.train()
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = build_optimizer(self.model, config)
        self.last_step: int | None = None
        self._head = head_of(self.model)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trust_remote_code = trust_remote_code
        self._read, self._seed, self._rank = read, seed, rank

    def train(
        self, segment: Segment, *, on_step: Callable[[StepReport], None] | None = None
    ) -> SegmentReport:
        """Take the segment's steps in order; `on_step` hears of each as it ends.

        Raises:
            RunError: a loss or gradient norm is not finite, or the device's memory is too small.
                The weights and the optimiser are as the step before left them.
        """
        reports = []
        for step in segment.steps:
            reports.append(self._step(step, segment.version))
            if on_step is not None:
                on_step(reports[-1])
        return SegmentReport(segment.index, tuple(reports), _peak_memory_mib(self.device))

    def decoding(self) -> AbstractContextManager[Any]:
        """The live model, able to decode with a cache, for the time of the `with` block."""
        return decoding(self.model)

    def save_snapshot(
        self, directory: str | Path, dtype: str = "bfloat16", *, untie: bool = False
    ) -> None:
        """Write what `load_model` makes the student of: with LoRA its adapter, which is small.

        `untie` writes a tied LM head out as a matrix of its own.
        """
        if self.config.lora is None:
            self.save_pretrained(directory, dtype, untie=untie)
        else:
            lora.save(self.model, Path(directory), dtype)

    def save_pretrained(
        self, directory: str | Path, dtype: str = "bfloat16", *, untie: bool = False
    ) -> None:
        """Write the student, LoRA merged, as a Hugging Face directory with weights in `dtype`."""
        model = self.model
        if self.config.lora is not None:
            adapter = Path(directory) / "adapter"
            self.save_snapshot(adapter, dtype)
            model = load_model(adapter, packed=False, trust_remote_code=self._trust_remote_code)
        checkpoint.save_pretrained(
            model,
            Path(directory),
            dtype=dtype,
            source=self.student,
            untie=untie,
            trust_remote_code=self._trust_remote_code,
        )

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write all that training needs to go on, as a whole or not at all."""
        checkpoint.save(Path(directory), self.model, self.optimizer, last_step=self.last_step)

    def load_checkpoint(self, directory: str | Path) -> int | None:
        """Go back to a checkpoint; gives its `last_step`.

        Raises:
            StoreError: the checkpoint is missing, damaged, or another model's.
        """
        self.last_step = checkpoint.load(Path(directory), self.model, self.optimizer)
        return self.last_step

    def _step(self, step: Step, version: int) -> StepReport:
        started = time.perf_counter()
        samples = [[self._read(ref) for ref in row.samples] for row in step.ranks[self._rank]]
        tokens = sum(len(rollout_of(s).response_ids) for row in samples for s in row)
        try:
            with _step_randomness(self.device, self._seed, step.index, self._rank):
                rows = [self._backward(row, version, tokens) for row in samples]
            norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
            measured = Measured.of(rows, norm)
            check_finite(step, samples, measured)
            for group in self.optimizer.param_groups:
                group["lr"] = step.lr
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {step.index}: the device ran out of memory on rows of "
                f"{self.config.row_tokens} tokens. Lower train.row_tokens (at least the longest "
                "sample) or loss.chunk, or set train.activation_checkpointing: true"
            ) from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.last_step = step.index
        seconds = time.perf_counter() - started
        return report(step, samples, measured, version, self.config.row_tokens, seconds)

    def _backward(self, samples: Sequence[Sample], version: int, tokens: int) -> dict[str, Tensor]:
        """Add one row's gradient; gives its share of the step's loss and its metric sums."""
        row = build_row(samples, version=version, device=self.device)
        is_bf16, kind = self.config.dtype == "bfloat16", torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=is_bf16):
            hidden_ND = hidden_states(self.model, row.packed)[row.positions_N]
            out = self._loss(hidden_ND, row, tokens)
        out.loss.backward()
        return {"loss": out.loss.detach(), **out.metrics}

    def _loss(self, hidden_ND: Tensor, row: TrainRow, tokens: int) -> Any:
        return near_policy_loss(
            hidden_ND,
            self._head,
            row.labels_N,
            row.topk_ids_NK,
            row.topk_logprobs_NK,
            behavior_N=row.behavior_N,
            normalizer=float(tokens),
            **self.loss.model_dump(),
        )


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices only, not on norms, biases, embeddings or LM head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(table.weight) for table in tables if table is not None}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p.dim() >= 2 and id(p) not in embeddings for p in parameters]
    groups = [
        {
            "params": [p for p, is_decayed in zip(parameters, decayed, strict=True) if is_decayed],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [
                p for p, is_decayed in zip(parameters, decayed, strict=True) if not is_decayed
            ],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@contextmanager
def _step_randomness(device: str, seed: int, step: int, rank: int) -> Iterator[None]:
    """Dropout's random numbers from (seed, step, rank); the caller's generator is left alone."""
    state = np.random.SeedSequence([seed % 2**63, step, rank]).generate_state(1, np.uint64)
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(state[0]) % 2**63)
        yield


def _peak_memory_mib(device: str) -> float:
    """Peak memory in MiB: of the device on CUDA, of the whole process elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

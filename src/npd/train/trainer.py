"""The trainer: executes segments of optimiser steps on packed rows, and decides nothing.

Promises: a step's loss is a mean over its response tokens, so neither packing, nor row order, nor
how samples are spread over rows changes it (to float noise); only response positions reach the LM
head; a step whose loss or gradient is not finite changes nothing; a step's random numbers follow
from the seed and its index, so a resumed run repeats an uninterrupted one.
With several ranks (`parallel`) each holds a part of the student and trains its rows of a step; the
sums are everybody's, and so is the report. Every rank must make the same calls in the same order.
Does not choose samples, order or learning rate: those arrive in `Step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npd import lora
from npd.config import LossConfig, TrainConfig
from npd.errors import RunError
from npd.modeling import load_model, resolve_device
from npd.reports import SegmentReport, StepReport
from npd.train import checkpoint
from npd.train.batch import Read, TrainRow
from npd.train.compiled import as_written, compile_layers
from npd.train.device import peak_memory_mib, step_randomness
from npd.train.feed import StepRows, feed
from npd.train.measure import Measured, check_finite, report
from npd.train.objective import Objective
from npd.train.optimizer import build_optimizer, clip
from npd.train.parallel import filled, gathered, hollow, shard
from npd.types import Segment
from npd.world import World

__all__ = ["Trainer", "build_optimizer"]


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
        world: World | None = None,
    ) -> None:
        self.config = config
        self.loss = loss
        self.student = str(student)
        self.device = resolve_device(device)
        self.world = World() if world is None else world
        # What is to be sharded need not fit the device; sharding moves it there.
        first_device = self.device if self.world.size == 1 else "cpu"
        self.model = load_model(
            student, device=first_device, packed=True, trust_remote_code=trust_remote_code
        )
        if config.lora is not None:
            lora.attach(self.model, config.lora, base=self.student, seed=seed, dtype=config.dtype)
        self.model.train()
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        is_sharded = self.world.size > 1
        self._hollow = hollow(self.model) if is_sharded and self.world.is_first else None
        self._objective = Objective(self.model, config, loss, is_sharded=is_sharded)
        if config.compile:
            compile_layers(self.model, self.device)
        if is_sharded:
            shard(self._objective, self.model, self.world, self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.last_step: int | None = None
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trust_remote_code = trust_remote_code
        self._read, self._seed = read, seed

    def train(
        self, segment: Segment, *, on_step: Callable[[StepReport], None] | None = None
    ) -> SegmentReport:
        """Take the segment's steps in order; `on_step` hears of each as it ends.

        Raises:
            RunError: a loss or gradient norm is not finite, or the device's memory is too small.
                The weights and the optimiser are as the step before left them.
        """
        reports = []
        is_pinned, rank = self.device.startswith("cuda"), self.world.rank
        ahead = feed(segment, self._read, self.loss, rank=rank, is_pinned=is_pinned)
        with closing(ahead) as steps:
            started = time.perf_counter()
            for step in steps:
                reports.append(self._step(step, segment.version, started))
                started = time.perf_counter()
                if on_step is not None:
                    on_step(reports[-1])
        peak = max(self.world.gather(peak_memory_mib(self.device)))
        return SegmentReport(segment.index, tuple(reports), peak)

    @contextmanager
    def whole(self) -> Iterator[Any | None]:
        """The student as one plain model for the time of the `with` block, or None.

        Alone it is the live model. Of several ranks, all of which must enter, the first gets a copy
        on its device and the others None.
        """
        if self.world.size == 1:
            with as_written() if self.config.compile else nullcontext():
                yield self.model
            return
        tensors = gathered(dict(self.model.named_parameters()), self.world, self.device)
        yield None if self._hollow is None else filled(self._hollow, tensors).to(self.device)

    @contextmanager
    def to_write(self) -> Iterator[Any | None]:
        """The same for saving, on the CPU. Of adapters' base nothing is gathered: it is on disk."""
        if self.world.size == 1:
            yield self.model
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensors = gathered(trained, self.world, "cpu")
        yield None if self._hollow is None else filled(self._hollow, tensors)

    def save_snapshot(
        self,
        directory: str | Path,
        dtype: str = "bfloat16",
        *,
        untie: bool = False,
        whole: Any = None,
    ) -> None:
        """Write what `load_model` makes the student of: with LoRA its adapter, which is small.

        `untie` writes a tied LM head out as a matrix of its own. `whole` is what `to_write()` gave;
        it may be left out where there is one rank.
        """
        if self.config.lora is None:
            self.save_pretrained(directory, dtype, untie=untie, whole=whole)
        else:
            lora.save(self._written(whole), Path(directory), dtype)

    def save_pretrained(
        self,
        directory: str | Path,
        dtype: str = "bfloat16",
        *,
        untie: bool = False,
        whole: Any = None,
    ) -> None:
        """Write the student, LoRA merged, as a Hugging Face directory with weights in `dtype`."""
        model = self._written(whole)
        if self.config.lora is not None:
            adapter = Path(directory) / "adapter"
            self.save_snapshot(adapter, dtype, whole=whole)
            model = load_model(adapter, packed=False, trust_remote_code=self._trust_remote_code)
        checkpoint.save_pretrained(
            model,
            Path(directory),
            dtype=dtype,
            source=self.student,
            untie=untie,
            trust_remote_code=self._trust_remote_code,
        )

    def _written(self, whole: Any) -> Any:
        assert whole is not None or self.world.size == 1, "of several ranks the first one writes"
        return self.model if whole is None else whole

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write all that training needs to go on, as a whole or not at all.

        Whatever the number of ranks, whole tensors are written, by the first: any number goes on.
        """
        weights, moments = checkpoint.state_of(self.model, self.optimizer)
        if self.world.size > 1:
            weights = gathered(weights, self.world, "cpu")
            moments = gathered(moments, self.world, "cpu")
        if self.world.is_first:
            checkpoint.save(Path(directory), weights, moments, last_step=self.last_step)

    def load_checkpoint(self, directory: str | Path) -> int | None:
        """Go back to a checkpoint; gives its `last_step`.

        Raises:
            StoreError: the checkpoint is missing, damaged, or another model's.
        """
        self.last_step = checkpoint.load(Path(directory), self.model, self.optimizer)
        return self.last_step

    def _step(self, given: StepRows, version: int, started: float) -> StepReport:
        counts = self.world.gather(given.num_tokens)
        step, (tokens, skipped) = given.step, map(sum, zip(*counts, strict=True))
        try:
            with step_randomness(self.device, self._seed, step.index, self.world.rank):
                rows = [self._backward(row, tokens) for row in given.rows]
                for row in given.idle:  # another rank has one more, and needs this one to take part
                    self._backward(row, 1, weight=0.0)
            norm = clip(self._parameters, self.config.clip)
            measured = Measured.together(self.world.gather(Measured.of(rows, norm)))
            check_finite(step, measured)
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
        found = report(step, measured, tokens, version, self.config.row_tokens, seconds)
        return replace(found, skipped_tokens=skipped)

    def _backward(self, row: TrainRow, tokens: int, weight: float = 1.0) -> dict[str, Tensor]:
        """Add one row's gradient; gives its share of the step's loss and its metric sums."""
        loss, metrics = self._objective(row.to(self.device), tokens)
        # Sharded gradients are averaged over the ranks, and a step's is a sum.
        loss.backward(torch.full_like(loss, weight * self.world.size))
        return {"loss": loss.detach(), **metrics}

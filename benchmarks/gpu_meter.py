"""What the sections of `gpu_measure.py` share: lines of figures, a clock, a profile, a student.

Promises: a line is on disk when `say` returns, and a time ends when the device has. Does not know
what is measured. `Meter.profile` needs CUDA and has never run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import random_model
from npd.config import LossConfig, TrainConfig
from npd.models.kernels.compile import compile_layers
from npd.train.trainer import Trainer
from npd.types import SampleRef, Scored, Segment
from training import Shards, make_segment, random_samples

ROW_TOKENS = 8192
# Samples, and the longest prompt and response among them.
FEW, LONG = (256, (64, 512)), (64, (256, 2048))
QUICK = (4, (8, 32))
# What a kernel's name holds, by family; the first that fits.
FAMILIES = {
    "gemm": ("gemm", "nvjet", "cutlass", "xmma"),
    "attention": ("flash", "fmha"),
    "npd": ("_row_stats", "_write_grads"),
    "adam": ("multi_tensor", "adam"),
    "copy": ("memcpy", "memset"),
    "inductor": ("triton_",),
    "elementwise": ("elementwise",),
    "reduce": ("reduce",),
}
LONGEST_KERNELS, NAME_WIDTH = 14, 70


@dataclass(frozen=True)
class Meter:
    """Where things are measured, and where their lines go; `room` is a folder for models."""

    device: str
    is_quick: bool
    lines: Path
    room: Path
    started: float

    @property
    def is_cuda(self) -> bool:
        """Whether the lines that need CUDA run."""
        return self.device == "cuda"

    @property
    def shape(self) -> str:
        """The student's shape, one of `common.SHAPES`."""
        return "smollm2-135m" if self.is_quick else "qwen2.5-1.5b"

    @property
    def layers(self) -> int:
        """How many layers the student has."""
        return 2 if self.is_quick else 28

    @cached_property
    def student(self) -> Student:
        """The student that sections share, loaded for the first of them."""
        return Student(self)

    def say(self, section: str, **figures: Any) -> None:
        """Print a line of figures and write it."""
        seconds = round(time.monotonic() - self.started, 1)
        line = json.dumps({"section": section, "t": seconds, **figures})
        print(line, flush=True)
        with self.lines.open("a") as file:
            file.write(line + "\n")

    def seconds(self, run: Callable[[], object], *, repeats: int = 3, warm_up: int = 1) -> float:
        """The least seconds of a call, to the device's end."""
        for _ in range(warm_up):
            run()
        return min(self._once(run) for _ in range(repeats))

    def profile(self, run: Callable[[], object]) -> dict[str, Any]:
        """CUDA: one call's launches, GPU milliseconds by family, and its longest kernels."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            wall = self._once(run)
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        by_name: dict[str, float] = {}
        for event in events:
            spent = event.time_range.elapsed_us() / 1e3
            by_name[event.name] = by_name.get(event.name, 0.0) + spent
        return {"wall_ms": 1e3 * wall, "launches": len(events), **summary(by_name)}

    def random_model(self, **options: Any) -> Any:
        """A model of the student's shape with random weights."""
        options = {"shape": self.shape, "device": self.device, **options}
        return random_model(self.layers, "bfloat16", **options)

    def _once(self, run: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def family_of(kernel: str) -> str:
    """The family of a kernel, by its name."""
    name = kernel.lower()
    fits = (family for family, words in FAMILIES.items() if any(word in name for word in words))
    return next(fits, "other")


def summary(by_name: Mapping[str, float]) -> dict[str, Any]:
    """The sum of kernels' milliseconds, the sums by family, and the longest kernels."""
    families: dict[str, float] = {}
    for name, spent in by_name.items():
        families[family_of(name)] = families.get(family_of(name), 0.0) + spent
    longest = _longest_first(by_name)[:LONGEST_KERNELS]
    return {
        "gpu_ms": sum(by_name.values()),
        "family_ms": {name: round(spent, 2) for name, spent in _longest_first(families)},
        "top": [(name[:NAME_WIDTH], round(spent, 2)) for name, spent in longest],
    }


def _longest_first(spent: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])


class Student:
    """A student in training on samples in shards; each section says what it trains and how.

    `few` and `long` are how many samples of short documents there are, and of long ones.
    """

    def __init__(self, meter: Meter) -> None:
        home = meter.room / "student"
        meter.random_model().save_pretrained(home)
        kinds = (QUICK,) if meter.is_quick else (FEW, LONG)
        self.few, self.long = kinds[0][0], kinds[-1][0]
        self.samples = {count: random_samples(count, *lengths) for count, lengths in kinds}
        self._shards = {count: self._written(home, count) for count in self.samples}
        self._reading = self.few
        self.trainer = Trainer(
            TrainConfig(row_tokens=ROW_TOKENS),
            LossConfig(),
            student=home,
            read=self._read,
            device=meter.device,
        )

    def segment(
        self, count: int, row_tokens: int = ROW_TOKENS, loss: Mapping[str, Any] | None = None
    ) -> Segment:
        """A step over those samples, for which the trainer is set; `loss`: beside the defaults."""
        trainer, self._reading = self.trainer, count
        trainer._objective._settings = LossConfig(**(loss or {})).of_tokens
        # The trainer cuts rows that are longer than it knows of.
        trainer.config = trainer.config.model_copy(update={"row_tokens": row_tokens})
        trainer._fitting.divisor = 1
        trainer._objective.chunk = None
        if trainer._chunks is not None:
            trainer._chunks.divisor = 1
        return make_segment(self.samples[count], row_tokens)

    @property
    def divisor(self) -> int:
        """Above 1 if a row did not fit the memory: rows were cut into that many parts."""
        return self.trainer._fitting.divisor

    def compile(self) -> None:
        """Compile the layers, for good."""
        trainer = self.trainer
        compile_layers(trainer.model, trainer.device)
        # It has to know, to write and compare snapshots without compiling anything more.
        trainer.config = trainer.config.model_copy(update={"compile": True})

    def _written(self, home: Path, count: int) -> Shards:
        folder = home / f"samples-{count}"
        folder.mkdir()
        return Shards(folder, self.samples[count])

    def _read(self, ref: SampleRef) -> Scored:
        return self._shards[self._reading].read(ref)

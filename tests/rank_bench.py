"""A trainer of several real processes, without the rest of a run: for tests of what ranks compute.

`Bench` is what lives in each process; warnings are errors there too, while it works.
"""

from __future__ import annotations

import asyncio
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npd.config import LossConfig, TrainConfig
from npd.runtime.local import LocalRuntime
from npd.runtime.rank_group import RankGroup
from npd.types import Segment, SegmentReport


class Bench:
    """One rank: a Trainer over samples that are all in memory."""

    def __init__(self, factory: BenchFactory) -> None:
        self.factory = factory

    def join(self, rank: int, meeting: Path) -> None:
        from npd.models.distributed import connect
        from npd.train.trainer import Trainer

        made = self.factory
        # torch warns of its own insides while it compiles.
        warnings.simplefilter("ignore" if made.config.compile else "error")
        by_id = dict(made.samples)
        world = connect(meeting, rank=rank, size=made.size, device="cpu", timeout=600.0)
        self.trainer = Trainer(
            made.config,
            made.loss,
            student=made.student if rank == 0 or made.elsewhere is None else made.elsewhere,
            read=lambda ref: by_id[ref.sample_id],
            device="cpu",
            dist=world,
        )

    def train(self, segment: Segment) -> list[SegmentReport]:
        """Every rank's report, as the first one knows them; keeps the last step's gradients."""
        hook = self.trainer.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())
        report = self.trainer.train(segment)
        hook.remove()
        return self.trainer.dist.gather(report)

    def _keep_gradients(self) -> None:
        self.gradients = gradients_of(self.trainer)

    def last_gradients(self) -> dict[str, Any]:
        """Clipped gradients of the last step, whole."""
        return self.gradients

    def weights(self) -> dict[str, Any] | None:
        with self.trainer.full_model() as model:
            if model is None:
                return None
            embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
            assert (embeddings.weight is head.weight) == model.config.tie_word_embeddings
            return {name: p.detach().float().numpy() for name, p in model.named_parameters()}

    def write(self, directory: Path) -> bool | None:
        """A snapshot and an export, as a worker writes them; whether frozen weights were there."""
        with self.trainer.gathered_for_save() as model:
            if model is None:
                return None
            self.trainer.save_snapshot(directory / "snapshot", full=model)
            self.trainer.save_pretrained(directory / "export", full=model)
            return any(not (p.is_meta or p.requires_grad) for p in model.parameters())

    def unshared(self) -> list[dict[str, Any]]:
        """What each rank holds besides parameters: buffers and plain tensors, by name."""
        from npd.train.fsdp import tensors_of

        model = self.trainer.model
        parameters = dict(model.named_parameters())
        found = {n: t for n, t in tensors_of(model).items() if n not in parameters}
        return self.trainer.dist.gather({name: t.numpy() for name, t in found.items()})

    def held(self) -> list[int]:
        """Numbers each rank holds of the weights."""
        parameters = list(self.trainer.model.parameters())
        return self.trainer.dist.gather(sum(p.to_local().numel() for p in parameters))

    def graphs(self) -> list[int]:
        """How many pieces each rank has compiled."""
        from torch._dynamo.utils import counters

        return self.trainer.dist.gather(counters["stats"].get("unique_graphs", 0))

    def save(self, directory: Path) -> None:
        self.trainer.save_checkpoint(directory)

    def load(self, directory: Path) -> int | None:
        return self.trainer.load_checkpoint(directory)

    def die(self, victim: int) -> None:
        """The victim is killed while the others wait for it in a collective."""
        if self.trainer.dist.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        self.trainer.dist.gather(None)

    def close(self) -> None:
        self.trainer.dist.close()


def gradients_of(trainer: Any) -> dict[str, Any]:
    """The gradients a trainer has at this moment, whole (all ranks must ask)."""
    from npd.train.fsdp import gather

    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: gather(p.grad).numpy().copy() for name, p in trained.items()}


@dataclass(frozen=True)
class BenchFactory:
    """Makes a rank's object in its process."""

    size: int
    student: str
    config: TrainConfig
    loss: LossConfig
    samples: tuple[tuple[int, Any], ...]
    elsewhere: str | None = None
    """The student's directory as ranks but the first find it."""

    def __call__(self) -> Bench:
        return Bench(self)


def on_ranks(folder: Path, factory: BenchFactory, story: Callable[[RankGroup], Any]) -> Any:
    """Run `story(group)` on a trainer of `factory.size` processes, which are gone after it."""

    async def whole() -> Any:
        runtime = LocalRuntime(folder / "logs", call_timeout=600.0)
        try:
            ranks = [
                runtime.spawn(f"trainer-{rank}", factory, threads=1) for rank in range(factory.size)
            ]
            return await story(RankGroup("trainer", ranks, folder / "meeting"))
        finally:
            await runtime.close()

    return asyncio.run(whole())

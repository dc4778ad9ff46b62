"""The dispatcher by itself: what it asks of a trainer that was started again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from npd.config import RunConfig
from npd.control.devices.placement import WorkerSet
from npd.control.dispatcher import Dispatcher
from npd.runtime.base import CallResult
from npd.schedule import events as ev
from npd.store.layout import RunLayout
from open_runs import open_run


class Trainer:
    """A fresh trainer, which knows of the copies that it made."""

    name, pid = "trainer", None

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.copied: set[int] = set()

    async def call(self, method, *args, timeout=None):  # noqa: ASYNC109
        self.calls.append((method, *args))
        if method == "checkpoint":
            self.copied.add(*args)
        assert method != "is_saved" or args[0] in self.copied, "it was never started"
        return CallResult(0.0 if method == "checkpoint" else True, 0.0, 0.0)


class Monitor:
    def __getattr__(self, name):
        return lambda *_, **__: None


def dispatcher_of(tmp_path, trainer: Trainer, saved: list[int]) -> Dispatcher:
    """One over a ledger with these checkpoints, and no segment after them."""
    layout = RunLayout(tmp_path / "run")
    rows = [SimpleNamespace(step=step, path=layout.checkpoint(step)) for step in saved]
    ledger = SimpleNamespace(checkpoints=lambda: rows, segments_after=lambda step: [])
    run = open_run(RunConfig(student="s", teacher="t"), layout, ledger, Monitor())
    artifacts = SimpleNamespace(has=lambda path: True, is_whole=lambda path: False)
    object.__setattr__(run, "artifacts", artifacts)
    return Dispatcher(run, WorkerSet((), (), trainer))


def test_a_checkpoint_that_a_later_one_overtook_is_not_waited_for(tmp_path):
    """The later one was recorded first, and the run ended there."""
    trainer = Trainer()

    async def resumed() -> ev.Event:
        dispatcher = dispatcher_of(tmp_path, trainer, saved=[4])
        await dispatcher.restore([2])
        return await dispatcher.run(ev.WriteCheckpoint(2))

    assert asyncio.run(resumed()) == ev.CheckpointSaved(2)
    assert ("restore", 4) in trainer.calls
    assert ("checkpoint", 2) not in trainer.calls, "its weights are those of step 4"


def test_a_checkpoint_at_the_restored_step_is_copied_again(tmp_path):
    trainer = Trainer()

    async def resumed() -> ev.Event:
        dispatcher = dispatcher_of(tmp_path, trainer, saved=[4])
        await dispatcher.restore([4])
        return await dispatcher.run(ev.WriteCheckpoint(4))

    assert asyncio.run(resumed()) == ev.CheckpointSaved(4)
    assert ("checkpoint", 4) in trainer.calls

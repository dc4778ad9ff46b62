"""Memory is for what is live: nothing that has left is held, however many samples have passed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.control.controller import Controller
from npd.control.monitor import Monitor
from npd.control.resume import replay
from npd.errors import RunError
from npd.observe.live import PlainView
from npd.schedule import events as ev
from npd.schedule.plan import Plan
from npd.schedule.replay_buffer import ReplayBuffer
from npd.schedule.requests import hash64
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import write_rollouts, write_scored
from npd.store.snapshots import publish
from npd.types import EncodedPrompt, SampleRef
from open_runs import open_run
from simulation import Simulation, make_config

IDS = np.arange(6, dtype=np.int32)
PROMPTS = [EncodedPrompt(i, IDS, IDS[:1]) for i in range(30)]
RULES = [{}, {"every_steps": 2}, {"drift": 0.1, "min_steps": 2}]


def make_bounded(steps, reuse, window, rule, overlap):
    return make_config(
        steps=steps, window=window, reuse=reuse, refresh=rule, max_lag=0, overlap=overlap,
        generate={"shard_size": 4, "workers": 2}, filter={"name": "random", "history": 32},
        checkpoint={"every_steps": 5},
    )  # fmt: skip


def held(thing, seen=None) -> int:
    """Items in all containers that can be reached from `thing`, its config left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or type(thing).__module__.startswith(("npd.config", "pydantic")):
        return 0
    seen.add(id(thing))
    if isinstance(thing, str | bytes):
        return 0
    if isinstance(thing, Mapping):
        return len(thing) + sum(held(part, seen) for part in (*thing, *thing.values()))
    if isinstance(thing, Collection) and not hasattr(thing, "__dict__"):
        return len(thing) + sum(held(part, seen) for part in thing)
    names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
    return sum(held(getattr(thing, name, None), seen) for name in names)


class Watched(Simulation):
    """A simulation that remembers the most that the plan held."""

    most = 0

    def _check(self) -> None:
        super()._check()
        if len(self.events) % 50 == 0:
            self.most = max(self.most, held(self.plan))


@settings(max_examples=4, deadline=None)
@given(
    reuse=st.integers(1, 4),
    window=st.integers(16, 40),
    rule=st.sampled_from(RULES),
    overlap=st.booleans(),
    fail=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10**6),
)
def test_a_plan_holds_no_more_after_many_times_the_samples(
    reuse, window, rule, overlap, fail, seed
):
    short, long = (
        Watched(make_bounded(steps, reuse, window, rule, overlap), 30, seed, fail).run()
        for steps in (12 * reuse, 80 * reuse)
    )
    assert len(long.asked) > 4 * len(short.asked)
    # Live samples may be in several places, each a handful of numbers; queues are swept late.
    assert long.most <= 24 * (window + 32) + 200
    assert long.most < 2 * short.most + 200


def test_a_pool_forgets_used_samples_that_grew_stale():
    """Those wait behind the unused in its order, and where these never run out, for ever."""
    pool = ReplayBuffer(seed=0, reuse=5)
    for turn in range(1_000):
        ids = range(8 * turn, 8 * turn + 8)
        pool.add([SampleRef(i, turn, turn, 10) for i in ids])
        assert len(pool.take(4, allow_used=False)) == 4
        for sample_id in pool.older_than(turn - 1):
            pool.remove(sample_id)
    assert len(pool) == 16
    assert held(pool) < 600


@given(st.lists(st.sampled_from(["add", "take", "reuse", "drop"]), max_size=60))
def test_a_pool_takes_as_a_sorted_list_would(doings):
    """Least used first, then by the hash; whatever was removed between."""
    pool, uses, version = ReplayBuffer(seed=7, reuse=3), {}, 0
    for doing in doings:
        if doing == "add":
            version += 1
            uses |= dict.fromkeys(range(10 * version, 10 * version + 5), 0)
            pool.add([SampleRef(i, 0, version, 9) for i in range(10 * version, 10 * version + 5)])
        elif doing == "drop":
            for sample_id in pool.older_than(version)[::2]:
                assert pool.remove(sample_id) == uses.pop(sample_id)
        else:
            limit = 3 if doing == "reuse" else 1
            ready = sorted((n, hash64(7, n, i), i) for i, n in uses.items() if n < limit)
            taken = [ref.sample_id for ref in pool.take(4, allow_used=doing == "reuse")]
            assert taken == [i for _, _, i in ready[:4]]
            uses |= {i: uses[i] + 1 for i in taken}
        assert pool.num_available == sum(n < 3 for n in uses.values())
        assert pool.num_fresh == sum(n == 0 for n in uses.values())
        assert pool.uses_left == sum(3 - n for n in uses.values())
        assert pool.spent() == sorted(i for i, n in uses.items() if n == 3)


class Shell:
    """A dispatcher that ends all it is given at once, with the files a worker would leave."""

    max_tries, rewrites_exactly = 3, True

    def __init__(self, layout, simulation, fails_at=0):
        self.layout, self.simulation, self.fails_at = layout, simulation, fails_at
        self.num_done = 0

    async def load(self):
        pass

    async def prepare_heldout(self):
        pass

    async def restore(self, unsaved):
        pass

    def pass_over(self, steps):
        pass

    async def export(self):
        return "student"

    async def run(self, action):
        self.num_done += 1
        if self.num_done == self.fails_at:
            raise RunError("the disk is full")
        match action:
            case ev.Generate(shard):
                write_rollouts(self.layout.rollouts(shard), [])
            case ev.Score(shard):
                write_scored(self.layout.scored(shard), [])
            case ev.Publish(version):
                publish(self.layout.snapshot(version), lambda into: (into / "weights").touch())
            case ev.WriteCheckpoint(step):
                publish(self.layout.checkpoint(step), lambda into: (into / "state").touch())
        return self.simulation._event(action)


def drive(shell):
    """The shell's plan in the real controller, with the real ledger and monitor."""
    layout, simulation = shell.layout, shell.simulation
    layout.create()
    monitor = Monitor(simulation.config, layout, PlainView())
    with Ledger(layout.ledger_db) as ledger:
        run = open_run(simulation.config, layout, ledger, monitor, prompts=PROMPTS)
        try:
            asyncio.run(Controller(run, simulation.plan, shell).run())
        finally:
            monitor.close()


def resumed(shell):
    """The same run in another process, so to speak: a fresh plan, and what was written before."""
    simulation = Simulation(shell.simulation.config, 30)
    simulation.written = shell.simulation.written
    again = Shell(shell.layout, simulation)
    drive(again)
    return again


def events_of(layout):
    with Ledger.reader(layout.ledger_db) as ledger:
        assert ledger.conservation().holds
        return list(ledger.events())


def test_what_ends_together_with_a_failure_is_recorded(tmp_path):
    config = make_bounded(60, 1, 40, {}, overlap=True)
    for fails_at in (5, 9, 10, 11, 40):
        shell = Shell(RunLayout(tmp_path / str(fails_at)), Simulation(config, 30), fails_at)
        with pytest.raises(RunError, match="the disk is full"):
            drive(shell)
        before = events_of(shell.layout)
        assert len(before) == shell.num_done, "the start, and all that ended but the failure"
        again = resumed(shell)
        after = events_of(shell.layout)
        assert after[: len(before)] == before
        assert len(after) == len(before) + again.num_done, "nothing was done twice"
        assert again.simulation.plan.step == 60


def test_resuming_remembers_only_what_made_shards_still_needed(tmp_path):
    config = make_bounded(400, 2, 24, {"every_steps": 3}, overlap=True)
    shell = Shell(RunLayout(tmp_path), Simulation(config, 30), fails_at=1200)
    with pytest.raises(RunError):
        drive(shell)
    monitor = Monitor(config, shell.layout, PlainView())
    with Ledger.reader(shell.layout.ledger_db) as ledger:
        replayed = replay(open_run(config, shell.layout, ledger, monitor), Plan(config))
    monitor.close()
    again = resumed(shell)
    with Ledger.reader(shell.layout.ledger_db) as ledger:
        num_shards = len(ledger.shards())
    assert again.simulation.plan.step == 400
    assert num_shards > 300
    assert 0 < len(replayed.producers) < 40, "window and segments since the last checkpoint"
    assert held(again.simulation.plan) < 1_500


class Losing(Shell):
    """Servers write, so that nothing can be regenerated; one shard's first try is lost, and the run
    ends before the second."""

    rewrites_exactly, loses, lost = False, 3, False

    async def run(self, action):
        if isinstance(action, ev.Generate) and action.shard == self.loses:
            if self.lost:
                raise RunError("the disk is full")
            self.lost = True
            self.num_done += 1
            return ev.ShardFailed(action.shard, "generate", "lost")
        return await super().run(action)


def test_a_lost_try_is_repeated_by_the_resumed_run_not_regenerated(tmp_path):
    """Its shard was never written: it is missing for a good reason."""
    config = make_bounded(60, 1, 40, {}, overlap=True)
    shell = Losing(RunLayout(tmp_path), Simulation(config, 30))
    with pytest.raises(RunError, match="the disk is full"):
        drive(shell)
    assert "ShardFailed" in [kind for _, kind, _ in events_of(shell.layout)]
    simulation = Simulation(config, 30)
    simulation.written = shell.simulation.written
    again = Losing(shell.layout, simulation)
    again.loses = None
    drive(again)
    assert again.simulation.plan.step == 60

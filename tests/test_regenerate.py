"""Shard files that are needed and gone when a run is resumed: which are regenerated, by what."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from npd.control.resume import find_missing, regenerate
from npd.errors import RunError, StoreError
from npd.schedule import events
from npd.schedule import events as ev
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import write_rollouts, write_scored
from npd.types import FinishReason, Outcome, Row, SampleRef, SampleStats, Segment, Step
from open_runs import open_run
from simulation import make_config
from store_samples import make_rollout

CONFIG = make_config(steps=4, window=8, reuse=1)

PRODUCERS = (
    ev.Score(0, 0, (0, 1)),
    ev.Generate(0, 0, (ev.RequestRef(0, 0, 7), ev.RequestRef(1, 1, 8))),
    ev.Generate(1, 0, (ev.RequestRef(2, 0, 9),)),
)


class FakeDispatcher:
    """Carries everything out, by leaving a file, and remembers it."""

    max_tries = 3

    def __init__(self, layout, *, rewrites_exactly, refused=()):
        self.layout, self.rewrites_exactly, self.done = layout, rewrites_exactly, []
        self.refused = tuple((i, "http://a refuses") for i in refused)

    def pass_over(self, steps):
        pass

    async def run(self, action):
        self.done.append(action)
        if isinstance(action, ev.Score):
            write_scored(self.layout.scored(action.shard), [])
            return ev.ShardScored(action.shard, (), self.refused)
        write_rollouts(self.layout.rollouts(action.shard), [])
        return ev.ShardGenerated(action.shard, ())


@pytest.fixture
def layout(tmp_path):
    """A run whose shard 0 is live, with both of its files there."""
    layout = RunLayout(tmp_path)
    layout.create()
    write_rollouts(layout.rollouts(0), [])
    write_scored(layout.scored(0), [])
    with Ledger(layout.ledger_db) as ledger:
        ledger.add_samples(0, [(0, 0, 0), (1, 1, 0)])
    return layout


def repaired(layout, *, rewrites_exactly=True, refused=(), is_over=False):
    """What was done again."""
    dispatcher = FakeDispatcher(layout, rewrites_exactly=rewrites_exactly, refused=refused)
    with Ledger(layout.ledger_db) as ledger:
        run = open_run(CONFIG, layout, ledger)
        made = asyncio.run(regenerate(run, dispatcher, lambda _: PRODUCERS, is_over=is_over))
    assert all("missing or damaged" in line for line in made)
    assert bool(made) == bool(dispatcher.done)
    return dispatcher.done


def test_what_is_there_or_not_needed_is_left_alone(layout):
    assert repaired(layout) == []


def test_rollouts_come_before_their_scores(layout):
    layout.rollouts(0).unlink()
    layout.scored(0).unlink()
    assert repaired(layout) == [PRODUCERS[1], PRODUCERS[0]]


def test_rollouts_that_are_scored_are_not_needed(layout):
    """A scored shard holds them; what a server wrote must not end a run for nothing."""
    layout.rollouts(0).unlink()
    assert repaired(layout, rewrites_exactly=False) == []


def test_once_a_run_is_over_what_is_live_is_not_needed(layout):
    layout.rollouts(0).unlink()
    layout.scored(0).unlink()
    assert repaired(layout, is_over=True) == []
    step = Step(1, 0.1, ((Row((SampleRef(1, 0, 0, 9),)),),))
    with Ledger(layout.ledger_db) as ledger:
        ledger.add_segment(Segment(0, 0, (step,)))
    made = repaired(layout, is_over=True)
    assert made == [PRODUCERS[1], PRODUCERS[0]], "the trainer has to repeat it"


@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_damaged_file_is_regenerated_like_a_missing_one(layout, keep):
    for path in (layout.rollouts(0), layout.scored(0)):
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match="damaged, and a server cannot"):
        repaired(layout, rewrites_exactly=False)
    assert layout.rollouts(0).exists(), "what cannot be regenerated is left as it is"
    assert repaired(layout) == [PRODUCERS[1], PRODUCERS[0]]
    assert repaired(layout) == []


def test_what_a_server_wrote_is_not_written_again_but_scored(layout):
    layout.scored(0).unlink()
    assert repaired(layout, rewrites_exactly=False) == [PRODUCERS[0]]
    layout.scored(0).unlink()
    layout.rollouts(0).unlink()
    with pytest.raises(StoreError, match="restore the file, or start a new run"):
        repaired(layout, rewrites_exactly=False)


def test_a_sample_that_is_needed_and_refused_now_is_not_passed_over(layout):
    layout.scored(0).unlink()
    with pytest.raises(RunError, match="not be regenerated: sample 1: http://a refuses"):
        repaired(layout, refused=[1])
    layout.scored(0).unlink()
    with Ledger(layout.ledger_db) as ledger:
        ledger.set_outcomes([(1, Outcome.FAILED, "score: http://a refuses")])
    assert repaired(layout, refused=[1]) == [PRODUCERS[0]], "it had left already"


def test_scores_of_two_snapshots_rest_on_both(layout):
    """Around a refresh that servers had; the older one alone cannot score the newer one's text."""
    rollouts = [replace(make_rollout(i), version=version) for i, version in ((0, 3), (1, 4))]
    write_rollouts(layout.rollouts(0), rollouts)
    layout.scored(0).unlink()
    producer = ev.Score(0, 3, (0, 1))
    with Ledger(layout.ledger_db) as ledger:
        for version in (3, 4):
            ledger.add_snapshot(version, 10 * version, layout.snapshot(version), "sum")
        run = open_run(CONFIG, layout, ledger)
        missing = find_missing(run, lambda _: [producer], (), is_over=False)
    (shard,) = missing.shards
    assert (shard.versions, shard.newest) == ({3, 4}, 4)
    assert missing.steps == {3: 30, 4: 40}, "both are pruned, and are published again first"
    assert missing.versions == [3, 4]
    assert missing.of(3) == []


def test_what_comes_back_otherwise_is_not_trained_on(layout):
    """The ledger has the lengths of the old text: rows and verdicts would be of other samples."""
    stats = SampleStats(0, 0, 0, 5, 7, FinishReason.STOP, 0.0)
    with Ledger(layout.ledger_db) as ledger:
        kind, payload = events.encode(ev.ShardGenerated(0, (stats,)))
        ledger.append_event(kind, json.loads(json.dumps(payload)))

    class Other(FakeDispatcher):
        async def run(self, action):
            event = await super().run(action)
            if isinstance(action, ev.Generate):
                return ev.ShardGenerated(0, (stats._replace(response_tokens=self.length),))
            return event

    for length, outcome in (
        (7, nullcontext()),
        (8, pytest.raises(StoreError, match="generates another sample 0")),
    ):
        for path in (layout.rollouts(0), layout.scored(0)):
            path.unlink(missing_ok=True)
        dispatcher = Other(layout, rewrites_exactly=True)
        dispatcher.length = length
        with Ledger(layout.ledger_db) as ledger, outcome:
            run = open_run(CONFIG, layout, ledger)
            asyncio.run(regenerate(run, dispatcher, lambda _: PRODUCERS))

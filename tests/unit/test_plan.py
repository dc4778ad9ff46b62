"""The plan's promises, over random configurations, orders of events, failures and drifts."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.config import RunConfig
from npd.schedule import events
from npd.schedule import events as ev
from npd.schedule.learning_rate import learning_rate
from npd.schedule.plan import Plan
from npd.schedule.requests import hash64, hash64_each, prompt_of
from npd.types import EvalReport, Outcome, Row, SampleRef, Segment, Step
from simulation import Simulation, make_config


@st.composite
def configs(draw) -> RunConfig:
    reuse = draw(st.integers(1, 4))
    batch = draw(st.integers(1, 8))
    shard = draw(st.integers(1, 12))
    overlap = draw(st.booleans())
    least = max(batch, 2 * shard) if overlap else batch
    window = draw(st.one_of(st.just("all"), st.integers(least, 40)))
    steps = draw(st.one_of(st.none(), st.integers(1, 25)))
    passes = draw(st.integers(1, 3))
    # Generators with servers have several shards at once.
    served = {"engine": "vllm", "launch": {}, "shards_in_flight": draw(st.integers(1, 3))}
    rules = [{}, {"every_steps": draw(st.integers(1, 6))}, {"drift": 0.1, "min_steps": 2}]
    if steps is None and passes > 1:
        rules.append({"at_epochs": [reuse * i for i in range(1, passes)]})
    if steps is not None and steps > 1:
        points = draw(st.sets(st.integers(1, steps - 1), min_size=1, max_size=3))
        rules.append({"at_steps": sorted(points)})
    return make_config(
        epochs=None if steps else reuse * passes,
        steps=steps,
        window=window,
        reuse=reuse,
        refresh=draw(st.sampled_from(rules)),
        max_lag=draw(st.integers(0, 2)),
        overlap=overlap,
        train={"batch_size": batch},
        generate={
            "shard_size": shard,
            "workers": draw(st.integers(1, 3)),
            "samples_per_prompt": draw(st.integers(1, 2)),
            **draw(st.sampled_from([{}, served])),
        },
        eval={"source": draw(st.sampled_from(["none", "teacher"])), "every_steps": 4},
        checkpoint={"every_steps": draw(st.sampled_from([None, 3, 7]))},
        filter={"name": draw(st.sampled_from(["none", "delta_ifd", "random"]))},
    )


@settings(max_examples=150, deadline=None)
@given(
    configs(),
    st.integers(1, 25),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.3]),
)
def test_every_promise_holds_over_a_whole_run(config, num_prompts, seed, fail, due):
    simulation = Simulation(config, num_prompts, seed, fail, due).run()
    assert simulation.stop is not None
    published = [e.step for e in simulation.events if isinstance(e, ev.SnapshotPublished)]
    assert published == sorted(set(published)), "a snapshot of nothing new"
    if config.schedule.epochs is not None and not simulation.stop.failed:
        assert len(simulation.asked) == config.num_requests(num_prompts)
        assert set(simulation.outcomes) == set(simulation.asked), "somebody never left"
    if config.schedule.steps is not None and not simulation.stop.failed:
        assert simulation.steps == config.schedule.steps


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(0, 10**6))
def test_the_same_events_give_the_same_actions_also_through_json(config, num_prompts, seed):
    simulation = Simulation(config, num_prompts, seed, 0.2, 0.2).run()
    plan = Plan(config)
    for event, expected in zip(simulation.events, simulation.decided, strict=True):
        kind, payload = events.encode(event)
        again = events.decode(kind, json.loads(json.dumps(payload)))
        assert again == event
        actions = plan.handle(again)
        assert actions == expected
        assert events.digest(actions) == events.digest(expected)


GOLDEN = [12631519, 1270259242, 925543718, 486549023, 303587138]
GOLDEN_OTHERS = [532029430, 442700468, 3493707952]


def test_a_checksum_of_decisions_changes_with_any_number_in_them():
    def decide(ask=7, tokens=9, lr=0.5, version=2, ids=(0, 1), reason="short", split=2):
        refs = [SampleRef(i, 3, version, tokens) for i in range(4)]
        rows = Row(tuple(refs[:split])), Row(tuple(refs[split:]))
        return [
            ev.Finalize(((5, Outcome.REJECTED, reason),)),
            ev.Generate(1, version, (ev.RequestRef(0, 1, ask), ev.RequestRef(1, 2, 8))),
            ev.Score(0, 1, ids),
            ev.Train(Segment(4, 1, (Step(1, lr, (rows,)),))),
            ev.Publish(1, 0),
        ]

    changed = [
        decide(), decide()[::-1], decide()[1:], decide(ask=6), decide(tokens=8), decide(lr=0.25),
        decide(version=1), decide(ids=(0,)), decide(ids=(1, 0)), decide(reason="shorter"),
        decide(split=3), [],
    ]  # fmt: skip
    assert len({events.digest(actions) for actions in changed}) == len(changed)
    assert events.digest(decide()) == events.digest(decide())
    # Ledgers that were written before hold these very numbers.
    assert [events.digest([action]) for action in decide()] == GOLDEN
    others = [ev.Checkpoint(3), ev.Evaluate(3), ev.Stop("all done")]
    assert [events.digest([action]) for action in others] == GOLDEN_OTHERS


class OneAtATime(Simulation):
    """Stages answer in the order in which they were asked; checkpoints are copied and written, and
    their time comes, by the draws of the clock."""

    def _finish_one(self):
        is_write = [isinstance(action, ev.WriteCheckpoint) for action in self.open]
        writes = [a for a, is_one in zip(self.open, is_write, strict=True) if is_one]
        work = [a for a, is_one in zip(self.open, is_write, strict=True) if not is_one]
        copies = [a for a in self.trainer_queue[:1] if isinstance(a, ev.Checkpoint)]
        rest = [a for a in self.trainer_queue[:1] if a not in copies]
        action = self.clock.choice([*work[:1], *rest, *copies, *writes])
        (self.trainer_queue if action in self.trainer_queue else self.open).remove(action)
        return self._event(action)

    @property
    def others(self) -> list[ev.Action]:
        """What was decided but checkpoints."""
        of_checkpoints = ev.Checkpoint | ev.WriteCheckpoint
        return [a for acts in self.decided for a in acts if not isinstance(a, of_checkpoints)]


@settings(max_examples=150, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(0, 10**6))
def test_checkpoints_by_time_change_no_other_decision_where_stages_are_in_turn(
    config, num_prompts, seed
):
    generate = config.generate.model_copy(update={"workers": 1, "shards_in_flight": 1})
    schedule = config.schedule.model_copy(update={"overlap": False})
    config = config.model_copy(update={"generate": generate, "schedule": schedule})
    plain = OneAtATime(config, num_prompts, seed).run()
    timed = OneAtATime(config, num_prompts, seed, due=0.4).run()
    assert timed.others == plain.others
    assert set(timed.saved) >= set(plain.saved), "those by steps stay where they are"


def test_a_checkpoint_by_time_is_saved_once_there_is_a_step_and_no_other_is_being_written():
    config = make_config(
        steps=9, window=8, reuse=1, overlap=False, filter={"name": "none"},
        checkpoint={"every_steps": None},
    )  # fmt: skip
    simulation = Simulation(config, 30)
    simulation._take(ev.Started(30))

    def until(kind):
        simulation._take(simulation._finish_one())
        while not any(isinstance(a, kind) for a in simulation.decided[-1]):
            simulation._take(simulation._finish_one())
        return next(a for a in simulation.decided[-1] if isinstance(a, kind))

    simulation._take(ev.CheckpointDue())
    until(ev.Train)
    decided = [action for actions in simulation.decided for action in actions]
    assert not any(isinstance(a, ev.Checkpoint) for a in decided), "nothing is trained"
    saved = until(ev.Checkpoint)
    assert saved.step == simulation.steps > 0
    write = until(ev.WriteCheckpoint)
    simulation._take(ev.CheckpointDue())
    simulation.open.remove(write)
    first = until(ev.Train).segment
    assert until(ev.Train).segment.index == first.index + 1, "training goes on while it is written"
    simulation._take(ev.CheckpointSaved(write.step))
    assert until(ev.Checkpoint).step > saved.step


# Digests of all decisions of runs in which the trainer waited until a checkpoint was on disk, as
# the npd of that time recorded them.
BEFORE_COPIES = {1: 1333455160, 3: 2252588084, 7: 1809618670}


@pytest.mark.parametrize("every", [1, 3, 7])
def test_runs_from_before_checkpoints_were_copied_are_decided_as_they_were(every):
    config = make_config(
        epochs=6, reuse=2, refresh={"at_epochs": [2, 4]}, window="all", overlap=False,
        checkpoint={"every_steps": every}, eval={"source": "teacher", "every_steps": 4},
    )  # fmt: skip
    simulation = Simulation(config, 20, every, copies=False).run()
    assert not any(isinstance(e, ev.CheckpointCopied) for e in simulation.events)
    found = [events.digest(actions) for actions in simulation.decided]
    assert crc32(repr(found).encode()) == BEFORE_COPIES[every]


class Unlucky(Simulation):
    """The filter rejects every sample of the first `rejected`."""

    rejected = 12

    def _scored(self, sample_id):
        found = super()._scored(sample_id)
        bad = {"nll_teacher": 99.0, "nll_student": 0.1}
        return found._replace(**bad) if sample_id < self.rejected else found


def test_an_epoch_without_a_step_brings_no_snapshot():
    config = make_config(epochs=8, reuse=2, refresh={"at_epochs": [2, 4]}, window="all")
    simulation = Unlucky(config, 12, seed=1).run()
    published = [e for e in simulation.events if isinstance(e, ev.SnapshotPublished)]
    assert [e.version for e in published] == [0, 1]
    assert 0 == published[0].step < published[1].step
    assert simulation.stop.reason == "done"
    assert len(simulation.asked) == 48
    assert {v for i, v in simulation.written.items() if i < 24} == {0}
    assert {v for i, v in simulation.written.items() if i >= 24} == {1}


def test_an_evaluation_recorded_before_it_had_sums_by_response_is_read():
    event = ev.Evaluated(EvalReport(3, 1.0, 0.5, None, 4, 10, 0.1, kl_sums=(4.0, 6.0)))
    kind, payload = events.encode(event)
    assert events.decode(kind, json.loads(json.dumps(payload))) == event
    before = {k: v for k, v in payload["report"].items() if k != "kl_sums"}
    assert events.decode(kind, {"report": before}).report.kl_sums == ()


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(0, 10**6))
def test_in_turn_means_one_stage_at_a_time(config, num_prompts, seed):
    simulation = Simulation(config, num_prompts, seed).run()
    if not config.is_overlapped and config.schedule.steps is None:
        assert all(len(stages) <= 1 for stages in simulation.stages_at_once)


def phased(config: RunConfig) -> RunConfig:
    """The config with stages in phases."""
    settings = config.model_dump(mode="json")
    settings["schedule"]["overlap"], settings["runtime"]["share"] = "auto", "phases"
    return RunConfig.model_validate(settings)


@settings(max_examples=100, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_phases_have_one_role_at_a_time(config, num_prompts, seed, fail):
    simulation = Simulation(phased(config), num_prompts, seed, fail).run()
    assert all(len(stages) <= 1 for stages in simulation.stages_at_once)


@settings(max_examples=100, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(0, 10**6))
def test_phases_train_until_a_refresh_or_until_samples_lack(config, num_prompts, seed):
    config = phased(config)
    simulation, plan = Simulation(config, num_prompts, seed).run(), Plan(config)
    for event in simulation.events:
        actions = plan.handle(event)
        asked = sum(len(a.requests) for a in actions if isinstance(a, ev.Generate))
        if asked and isinstance(event, ev.SegmentTrained):
            assert plan.num_live - asked < config.train.batch_size, "a batch was left"


def test_the_papers_schedule_has_two_phases_of_each_stage():
    config = make_config(
        epochs=10, reuse=5, refresh={"at_epochs": [5]}, runtime={"share": "phases"}
    )
    simulation = Simulation(config, 100).run()
    assert simulation.phases == ["trainer", *["generator", "scorer", "trainer"] * 2]


def test_phases_switch_less_often_than_stages_in_turn():
    schedule = {"steps": 60, "window": 64, "reuse": 2, "refresh": {"every_steps": 20}}
    in_turn, phases = (
        len(
            Simulation(make_config(**schedule, overlap=False, runtime={"share": share}), 100)
            .run()
            .phases
        )
        for share in ("together", "phases")
    )
    assert phases < in_turn / 2


def test_overlap_trains_while_others_work():
    config = make_config(steps=40, window=40, reuse=1, overlap=True)
    simulation = Simulation(config, 50).run()
    assert frozenset({"Generate", "Trainer"}) in simulation.stages_at_once


@pytest.mark.parametrize(
    ("served", "most"),
    [({}, 2), ({"shards_in_flight": 1}, 2), ({"shards_in_flight": "auto"}, 4),
     ({"shards_in_flight": 3}, 6), ({"urls": ["http://a", "http://b", "http://c"]}, 8)],
)  # fmt: skip
@pytest.mark.parametrize("overlap", [True, False])
def test_generators_with_servers_have_several_shards_each(served, most, overlap):
    engine = {"engine": "vllm", **({} if "urls" in served else {"launch": {}})} if served else {}
    config = make_config(
        steps=20, window=80, reuse=1, overlap=overlap, filter={"name": "none"},
        generate={"workers": 2, "shard_size": 4, **engine, **served}, train={"batch_size": 40},
    )  # fmt: skip
    simulation = Simulation(config, 500, seed=1).run()
    assert simulation.most_generating == most


def test_the_papers_schedule_refreshes_once_and_asks_again_after_it():
    config = make_config(
        epochs=10, reuse=5, window="all", refresh={"at_epochs": [5]}, filter={"name": "none"}
    )
    simulation = Simulation(config, 12).run()
    versions = {
        a.version for acts in simulation.decided for a in acts if isinstance(a, ev.Generate)
    }
    published = [
        a.version for acts in simulation.decided for a in acts if isinstance(a, ev.Publish)
    ]
    assert versions == {0, 1}
    assert published == [0, 1]
    assert set(simulation.prompts.values()) == {2}, "every prompt is asked once a round"
    assert set(simulation.lags) == {0}
    segments = [a.segment for acts in simulation.decided for a in acts if isinstance(a, ev.Train)]
    kept = [s for s, outcome in simulation.outcomes.items() if outcome is Outcome.TRAINED_OUT]
    assert all(simulation.uses[s] == 5 for s in kept)
    lrs = [step.lr for segment in segments for step in segment.steps]
    assert lrs[0] == pytest.approx(config.train.lr)
    assert all(a >= b for a, b in pairwise(lrs))
    assert config.train.min_lr <= lrs[-1] < 2 * config.train.min_lr


def test_strict_on_policy_never_trains_on_an_old_sample():
    config = make_config(
        steps=12, window=4, reuse=1, refresh={"every_steps": 1}, max_lag=0, overlap=False,
        filter={"name": "none"}, loss={"kd_weight": 1.0},
    )  # fmt: skip
    simulation = Simulation(config, 30).run()
    assert set(simulation.lags) == {0}
    assert Outcome.STALE not in simulation.outcomes.values()
    assert simulation.plan.version == 11, "a refresh after every step but the last"


def test_reuse_goes_in_passes_over_a_full_window():
    config = make_config(
        epochs=3, reuse=3, window="all", overlap=False, filter={"name": "none", "max_repeat": 1.0}
    )
    simulation = Simulation(config, 16).run()
    seen: Counter[int] = Counter()
    for segment in (
        a.segment for acts in simulation.decided for a in acts if isinstance(a, ev.Train)
    ):
        for step in segment.steps:
            for ref in step.ranks[0]:
                for sample in ref.samples:
                    seen[sample.sample_id] += 1
            assert max(seen.values()) - min(seen[i] for i in simulation.uses) <= 2


def test_a_filter_that_rejects_everything_stops_the_run_and_says_so():
    config = make_config(steps=10, window=8, reuse=1, filter={"max_repeat": 0.0})
    simulation = Simulation(config, 8).run()
    assert simulation.stop.failed
    assert "no sample gets through" in simulation.stop.reason


def test_samples_given_up_after_max_tries_are_counted_as_failed():
    config = make_config(epochs=1, reuse=1, filter={"name": "none"})
    simulation = Simulation(config, 8, fail=1.0).run()
    assert set(simulation.outcomes.values()) == {Outcome.FAILED}
    tries = Counter(e.shard for e in simulation.events if isinstance(e, ev.ShardFailed))
    assert set(tries.values()) == {config.schedule.max_tries}


def test_drift_refreshes_only_above_the_threshold():
    rule = {"drift": 0.1, "min_steps": 1}
    config = make_config(steps=30, window=8, reuse=1, refresh=rule, filter={"name": "none"})
    simulation = Simulation(config, 30, seed=3).run()
    last_drift = 0.0
    for event, actions in zip(simulation.events, simulation.decided, strict=True):
        if isinstance(event, ev.SegmentTrained):
            last_drift = sum(s.drift for s in event.report.steps) / len(event.report.steps)
        if any(isinstance(a, ev.Publish) and a.version > 0 for a in actions):
            assert last_drift > 0.1
    assert simulation.plan.version > 0


def test_prompts_come_once_a_round_in_an_order_of_the_seed():
    first = [prompt_of(i, seed=1, num_prompts=7, samples_per_prompt=2) for i in range(14)]
    second = [prompt_of(i, seed=1, num_prompts=7, samples_per_prompt=2) for i in range(14, 28)]
    assert Counter(first) == Counter(second) == dict.fromkeys(range(7), 2)
    assert first != second
    assert all(a == b for a, b in zip(first[::2], first[1::2], strict=True)), "a group together"


def test_mix_is_stable_and_spreads():
    assert hash64(0, 1, 2) == hash64(0, 1, 2)
    values = set(hash64_each((0, 1), range(10_000)))
    assert values == {hash64(0, 1, i) for i in range(10_000)}
    assert hash64_each((), [3, -4]) == [hash64(3), hash64(-4)]
    assert len(values) == 10_000
    assert all(0 <= value < 2**63 for value in values)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0.0, 0.1, 0.5), (0.2, 0.3, 1.0), (0.6, 0.7, 0.55), (1.0, 1.0, 0.1)],
)
def test_learning_rate_by_hand(before, after, expected):
    # lr 1 -> 0.1 with a fifth of warmup: half way up at 0.1, the top at 0.2, the middle at 0.6.
    rate = learning_rate(before, after, lr=1.0, min_lr=0.1, warmup=0.2)
    assert rate == pytest.approx(expected, abs=1e-9)


def test_a_shard_that_keeps_failing_does_not_end_the_run():
    config = make_config(
        epochs=1, reuse=1, generate={"shard_size": 600}, filter={"name": "none"}, overlap=False
    )
    plan = Plan(config)
    plan.handle(ev.Started(1200))
    plan.handle(ev.SnapshotPublished(0, 0, ""))
    for _ in range(config.schedule.max_tries):
        actions = plan.handle(ev.ShardFailed(0, "generate", "lost"))
    assert any(isinstance(a, ev.Finalize) for a in actions)
    assert [a.shard for a in actions if isinstance(a, ev.Generate)] == [1], "goes on"


def test_what_is_stale_is_not_sent_to_the_teacher():
    config = make_config(
        steps=40, window=64, reuse=1, refresh={"every_steps": 1}, max_lag=0, overlap=True,
        generate={"shard_size": 8, "workers": 3}, filter={"name": "none"},
    )  # fmt: skip
    simulation = Simulation(config, 100, seed=2).run()
    assert Outcome.STALE in simulation.outcomes.values(), "the case this is about"


def test_a_refresh_after_a_step_is_asked_for_what_comes_after_it():
    keep_all = {
        "name": "none",
        "drop_truncated": False,
        "max_repeat": 1.0,
        "min_response_tokens": 1,
    }
    config = make_config(
        steps=30, reuse=5, window="all", refresh={"at_steps": [15]}, filter=keep_all
    )
    simulation = Simulation(config, 100).run()
    published = [e for e in simulation.events if isinstance(e, ev.SnapshotPublished)]
    assert [(e.version, e.step) for e in published] == [(0, 0), (1, 15)]
    # 15 steps of 4 samples, each used 5 times, on either side.
    assert Counter(simulation.written.values()) == {0: 12, 1: 12}
    assert simulation.steps == 30

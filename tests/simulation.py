"""A run without workers: answers the plan's actions in a random order, and checks every promise.

The order, the failures and the drift come from `random.Random(seed)`; so a simulation is
repeatable, and its events can be replayed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from npd.config import RunConfig
from npd.schedule import events as ev
from npd.schedule.plan import Plan
from npd.types import EvalReport, FinishReason, Outcome, SampleStats, SegmentReport, StepReport


def make_config(**schedule) -> RunConfig:
    """A small run; `schedule` holds settings of that section, and whole sections by name."""
    sections = {
        name: schedule.pop(name)
        for name in ("filter", "generate", "train", "eval", "checkpoint", "loss", "runtime")
        if name in schedule
    }
    return RunConfig(
        student="s",
        teacher="t",
        generate={"max_new_tokens": 20, "shard_size": 4, **sections.get("generate", {})},
        data={"max_prompt_tokens": 8},
        train={"batch_size": 4, "row_tokens": 32, **sections.get("train", {})},
        schedule={"refresh": "never", "segment_steps": 3, **schedule},
        eval=sections.get("eval", {"source": "none"}),
        checkpoint=sections.get("checkpoint", {"every_steps": None}),
        filter=sections.get("filter", {}),
        loss=sections.get("loss", {}),
        runtime=sections.get("runtime", {}),
    )


def step_report(step: int, samples: int, drift: float | None = 0.01) -> StepReport:
    """A report of nothing remarkable."""
    return StepReport(
        step=step, loss=1.0, ce=1.0, kd=1.0, grad_norm=1.0, lr=1e-3, num_samples=samples,
        response_tokens=10 * samples, total_tokens=20 * samples, num_rows=1, fill=0.9,
        seconds=1.0, drift=drift,
    )  # fmt: skip


@dataclass
class Simulation:
    """One run, checked as it goes. `fail` is the probability that a try at a shard fails.

    With it single samples fail too, in writing and in scoring, and some are written by a newer
    snapshot than was asked, as when a refresh falls into their middle. `due` is the probability
    that before an event the time for a checkpoint has come; `copies` is False in runs of an npd
    whose trainer waited until a checkpoint was on disk.
    """

    config: RunConfig
    num_prompts: int
    seed: int = 0
    fail: float = 0.0
    due: float = 0.0
    copies: bool = True
    events: list[ev.Event] = field(default_factory=list)
    decided: list[list[ev.Action]] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    uses: Counter = field(default_factory=Counter)
    asked: dict[int, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    unscored: set[int] = field(default_factory=set)
    lags: list[int] = field(default_factory=list)
    stop: ev.Stop | None = None
    steps: int = 0
    phases: list[str] = field(default_factory=list)
    most_generating: int = 0

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.plan = Plan(self.config)
        self.version = 0
        self.trainer_queue: list[ev.Action] = []
        self.open: list[ev.Action] = []
        self.prompts: Counter = Counter()
        self.stages_at_once: set[frozenset[str]] = set()
        # Draws of its own, so that a run with and one without have equal answers otherwise.
        self.clock = random.Random(f"clock {self.seed}")
        self.saved: list[int] = []

    def run(self, max_events: int = 20_000) -> Simulation:
        self._take(ev.Started(self.num_prompts))
        for _ in range(max_events):
            if self.stop is not None:
                return self
            assert self.open or self.trainer_queue, "nothing is under way and the run is not over"
            if self.due and self.clock.random() < self.due:
                self._take(ev.CheckpointDue())
                if self.stop is not None:
                    return self
            self._take(self._finish_one())
        raise AssertionError("the run does not end")

    def _take(self, event: ev.Event) -> None:
        self.events.append(event)
        actions = self.plan.handle(event)
        self.decided.append(actions)
        for action in actions:
            self._carry_out(action)
        self._check()

    def _carry_out(self, action: ev.Action) -> None:
        assert self.stop is None, "an action after the end"
        role = {ev.Generate: "generator", ev.Score: "scorer"}.get(type(action), "trainer")
        if not isinstance(action, ev.Finalize | ev.Stop) and self.phases[-1:] != [role]:
            self.phases.append(role)
        match action:
            case ev.Generate(shard, version, requests):
                is_retry = requests[0].sample_id in self.asked
                assert version <= self.plan.version if is_retry else version == self.plan.version
                for ask in requests:
                    assert self.asked.setdefault(ask.sample_id, shard) == shard, "asked twice"
                    self.prompts[ask.prompt] += not is_retry
                self.open.append(action)
            case ev.Score(_, version):
                assert version >= self.plan.version - self.config.schedule.max_lag, "paid in vain"
                self.open.append(action)
            case ev.Finalize(samples):
                for sample_id, outcome, reason in samples:
                    is_unscored = reason == "score: unreadable"
                    assert is_unscored == (sample_id in self.unscored), reason
                    assert sample_id not in self.outcomes, "left twice"
                    self.outcomes[sample_id] = outcome
            case ev.Train(segment):
                self._check_segment(segment)
                self.trainer_queue.append(action)
            case ev.WriteCheckpoint():
                self.open.append(action)
            case ev.Stop(_, failed):
                is_writing = any(isinstance(a, ev.WriteCheckpoint) for a in self.open)
                assert failed or not is_writing, "the end does not wait for the checkpoint"
                self.stop = action
            case _:
                self.trainer_queue.append(action)

    def _check_segment(self, segment) -> None:
        schedule = self.config.schedule
        assert segment.version == self.plan.version
        for step in segment.steps:
            self.steps += 1
            assert step.index == self.steps
            refs = [ref for rank in step.ranks for row in rank for ref in row.samples]
            assert len({ref.sample_id for ref in refs}) == len(refs), "twice in one step"
            assert 0 < len(refs) <= self.config.train.batch_size
            if schedule.steps is not None and self._window() >= self.config.train.batch_size:
                assert len(refs) == self.config.train.batch_size, "a short batch"
            for ref in refs:
                assert ref.sample_id not in self.outcomes, "trained on after it left"
                self.uses[ref.sample_id] += 1
                assert self.uses[ref.sample_id] <= schedule.reuse, "used too often"
                self.lags.append(segment.version - ref.version)
                assert 0 <= self.lags[-1] <= schedule.max_lag, "too far behind"
            for rank in step.ranks:
                for row in rank:
                    tokens = sum(ref.num_tokens for ref in row.samples)
                    assert tokens <= self.config.train.row_tokens

    def _check(self) -> None:
        live = len(self.asked) - len(self.outcomes)
        assert self.plan.num_live == live
        assert self.plan.num_requested == len(self.asked)
        assert live <= self._window(), "the window overflows"
        assert self.plan.oldest_version_needed <= self.plan.version
        for sample_id, outcome in self.outcomes.items():
            if outcome is Outcome.TRAINED_OUT:
                assert self.uses[sample_id] == self.config.schedule.reuse
        generating = sum(isinstance(action, ev.Generate) for action in self.open)
        self.most_generating = max(self.most_generating, generating)
        generate = self.config.generate
        assert generating <= generate.workers * generate.num_in_flight
        stages = {type(a).__name__ for a in self.open if not isinstance(a, ev.WriteCheckpoint)}
        stages |= {"Trainer"} if self.trainer_queue else set()
        self.stages_at_once.add(frozenset(stages))

    def _window(self) -> int:
        window = self.config.schedule.window
        per_round = self.num_prompts * self.config.generate.samples_per_prompt
        return per_round if window == "all" else window

    def _finish_one(self) -> ev.Event:
        choices = [*self.open, *self.trainer_queue[:1]]
        action = self.random.choice(choices)
        (self.open if action in self.open else self.trainer_queue).remove(action)
        return self._event(action)

    def _event(self, action: ev.Action) -> ev.Event:
        draw = self.random
        match action:
            case ev.Generate(shard, version, requests):
                if draw.random() < self.fail:
                    return ev.ShardFailed(shard, "generate", "lost")
                failed = [a for a in requests if self.fail and draw.random() < self.fail / 4]
                for ask in requests:
                    newest = self.fail and draw.random() < self.fail
                    self.written[ask.sample_id] = self.plan.version if newest else version
                stats = tuple(
                    self._stats(a.sample_id, a.prompt) for a in requests if a not in failed
                )
                return ev.ShardGenerated(
                    shard, stats, tuple((a.sample_id, "refused") for a in failed)
                )
            case ev.Score(shard, version, ids):
                if draw.random() < self.fail:
                    return ev.ShardFailed(shard, "score", "lost")
                assert version == min(self.written[i] for i in ids), "its snapshot may be pruned"
                failed = [i for i in ids if self.fail and draw.random() < self.fail / 4]
                self.unscored.update(failed)
                stats = tuple(self._scored(i) for i in ids if i not in failed)
                return ev.ShardScored(shard, stats, tuple((i, "unreadable") for i in failed))
            case ev.Train(segment):
                size = self.config.train.batch_size
                reports = tuple(
                    step_report(
                        s.index, size, random.Random(f"{self.seed}~{s.index}").uniform(0, 0.2)
                    )
                    for s in segment.steps
                )
                return ev.SegmentTrained(SegmentReport(segment.index, reports))
            case ev.Publish(version, step):
                return ev.SnapshotPublished(version, step, f"sum{version}")
            case ev.Checkpoint(step) if self.copies:
                return ev.CheckpointCopied(step)
            case ev.Checkpoint(step) | ev.WriteCheckpoint(step):
                assert step not in self.saved, "saved twice"
                self.saved.append(step)
                return ev.CheckpointSaved(step)
            case ev.Evaluate(step):
                return ev.Evaluated(EvalReport(step, 1.0, 0.5, None, 4, 10, 0.1))
        raise AssertionError(action)

    def _stats(self, sample_id: int, prompt: int) -> SampleStats:
        draw = random.Random(f"{self.seed}-{sample_id}")
        finish = FinishReason.LENGTH if draw.random() < 0.1 else FinishReason.STOP
        tokens = draw.randint(1, self.config.generate.max_new_tokens)
        version = self.written[sample_id]
        return SampleStats(sample_id, prompt, version, 5, tokens, finish, draw.random() * 0.6)

    def _scored(self, sample_id: int) -> SampleStats:
        draw = random.Random(f"{self.seed}+{sample_id}")
        base = self._stats(sample_id, 0)
        return SampleStats(
            base.sample_id, base.prompt_index, base.version,
            base.prompt_tokens, base.response_tokens, base.finish, base.repeat,
            nll_teacher=draw.uniform(0.1, 2), nll_teacher_alone=draw.uniform(0.5, 3),
            nll_student=draw.uniform(0.1, 2), nll_student_alone=draw.uniform(0.5, 3),
            overlap=draw.random(), teacher_mass=0.9,
        )  # fmt: skip

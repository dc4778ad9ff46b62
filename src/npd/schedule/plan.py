"""Decides the next actions of a run from its events. No I/O, no clock, no asyncio, no tensor.

`Plan.handle(event) -> actions` is deterministic, so replaying a run's events resumes it. Promises:
no sample is trained on more than `reuse` times, or when it is more than `max_lag` snapshots behind;
every requested sample is finalized at most once; the number of live samples stays within the
window.

Every action is created here: what is requested, which batch is trained on (`_next_batch`), when to
publish, save, evaluate and stop. `RefreshRule` says when a refresh is due, `SampleTracker` holds
the state of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from npd.config import RunConfig, TrainConfig
from npd.pack import balance, pack, row_cost
from npd.schedule import events as ev
from npd.schedule.learning_rate import learning_rate
from npd.schedule.refresh import RefreshRule
from npd.schedule.requests import make_requests
from npd.schedule.samples import SampleTracker
from npd.types import Row, SampleRef, Segment, Step


class Plan:
    """The decisions of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self._schedule = config, config.schedule
        self._tracker = SampleTracker(config)
        self._actions: list[ev.Action] = []
        self._evaluates = config.eval.source != "none"
        reads_student = config.needs_ifd or config.needs_student_pass
        self._uses_snapshots = config.generate.source == "student" or reads_student
        self._requests_per_round = 0
        self._total_requests: int | None = None
        self._num_trainer_actions = self._num_segments = 0
        self._window_was_full = False
        self._since: Literal["refresh", "score", "train"] = "refresh"
        self._refresh = RefreshRule(config.schedule.refresh)
        self._publishing = False
        self._step = 0
        self._saved_at = self._evaluated_at = 0
        # Checkpoints by time do not move those by steps: segments end at these, and how training
        # is cut into segments must not depend on a clock.
        self._saved_by_steps_at = 0
        self._is_checkpoint_due = False
        self._being_written: set[int] = set()
        self._stopped = False

    @property
    def step(self) -> int:
        """Optimiser steps decided so far."""
        return self._step

    @property
    def version(self) -> int:
        """The newest published snapshot."""
        return self._refresh.version

    @property
    def num_requested(self) -> int:
        """Samples requested so far."""
        return self._tracker.num_requested

    @property
    def num_live(self) -> int:
        """Samples requested and not finalized."""
        return self._tracker.num_live

    @property
    def is_stopped(self) -> bool:
        """Whether the run is over: everything is decided and done, or it gave up."""
        return self._stopped

    @property
    def progress(self) -> float:
        """The share of the run decided so far, 0 to 1: by steps, or by uses of samples."""
        if self._schedule.steps is not None:
            return min(1.0, self._step / self._schedule.steps)
        if not self._total_requests:
            return 0.0
        return min(
            1.0, self._tracker.uses_accounted / (self._total_requests * self._schedule.reuse)
        )

    @property
    def most_steps(self) -> int | None:
        """Steps of the whole run if no sample is dropped; None before it starts."""
        if self._schedule.steps is not None or self._total_requests is None:
            return self._schedule.steps
        return -(-self._total_requests * self._schedule.reuse // self.config.train.batch_size)

    @property
    def oldest_version_needed(self) -> int:
        """The oldest snapshot that an unfinished shard still needs, or else the newest."""
        return self._tracker.oldest_version(self.version)

    def handle(self, event: ev.Event) -> list[ev.Action]:
        """Handle `event`; returns the actions to take now, in order, `Finalize` first."""
        assert not self._stopped, "the run has stopped"
        self._apply(event)
        self._decide()
        actions, self._actions = self._actions, []
        finalized = self._tracker.take_finalized()
        return [ev.Finalize(finalized), *actions] if finalized else actions

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.Started(num_prompts):
                self._start(num_prompts)
            case ev.ShardGenerated():
                self._tracker.generated(event, self.version)
            case ev.ShardScored():
                self._tracker.scored(event, self.version)
            case ev.ShardFailed():
                if (action := self._tracker.retry(event, self.version)) is not None:
                    self._actions.append(action)
            case ev.SegmentTrained(report):
                self._num_trainer_actions -= 1
                self._tracker.finalize_spent()
                self._refresh.trained(report)
            case ev.SnapshotPublished(version, step):
                self._num_trainer_actions -= 1
                self._publishing, self._since = False, "refresh"
                self._refresh.published(version, step)
                self._tracker.finalize_stale(version)
            case ev.CheckpointDue():
                self._is_checkpoint_due = True
            case ev.CheckpointCopied(step):
                self._num_trainer_actions -= 1
                self._being_written.add(step)
                self._actions.append(ev.WriteCheckpoint(step))
            case ev.CheckpointSaved(step) if step in self._being_written:
                self._being_written.remove(step)
            # In ledgers written before there were copies, the trainer waited for this.
            case ev.CheckpointSaved() | ev.Evaluated():
                self._num_trainer_actions -= 1

    def _start(self, num_prompts: int) -> None:
        self._requests_per_round = num_prompts * self.config.generate.samples_per_prompt
        self._total_requests = self.config.num_requests(num_prompts)
        if self._uses_snapshots:
            self._publish(0)
        if self._evaluates:
            self._to_trainer(ev.Evaluate(0))

    def _decide(self) -> None:
        if self._tracker.consecutive_drops >= self._patience():
            # Ledgers hold digests of this text: another one would keep old runs from being resumed.
            self._stop("no sample gets through", failed=True)
        elif self._is_finished():
            self._finish()
        else:
            if self._num_trainer_actions == 0:
                self._between_segments()
            self._request()
            self._score()
            if self._num_trainer_actions == 0:
                self._train()

    def _patience(self) -> int:
        """The number of consecutive drops after which the run gives up."""
        return max(512, 8 * self.config.train.batch_size, 4 * self.config.shard_size)

    def _is_finished(self) -> bool:
        if self._num_trainer_actions:
            return False
        if self._schedule.steps is not None:
            return self._step >= self._schedule.steps
        return self._is_all_requested() and self._tracker.num_live == 0

    def _is_all_requested(self) -> bool:
        return (
            self._total_requests is not None and self._tracker.num_requested >= self._total_requests
        )

    def _finish(self) -> None:
        """Evaluate and save, unless the last step was, then stop."""
        if self._evaluates and self._evaluated_at < self._step:
            self._to_trainer(ev.Evaluate(self._step))
        if self._saved_at < self._step:
            self._to_trainer(ev.Checkpoint(self._step))
        if self._num_trainer_actions == 0 and not self._being_written:
            self._stop("done" if self._step else "nothing was trained", failed=self._step == 0)

    def _stop(self, reason: str, *, failed: bool) -> None:
        self._stopped = True
        self._actions.append(ev.Stop(reason, failed))

    # The trainer between segments.

    def _between_segments(self) -> None:
        """Refresh the snapshot, save and evaluate when each is due."""
        # Once all is requested, nothing would be generated with a new snapshot.
        if not self._is_all_requested():
            uses, epoch = self._tracker.uses_accounted, self._requests_per_round
            if self._refresh.is_due(self._step, uses=uses, uses_per_epoch=epoch):
                self._publish(self.version + 1)
        save, evaluate = self.config.checkpoint.every_steps, self.config.eval.every_steps
        if save is not None and self._step - self._saved_by_steps_at >= save:
            self._saved_by_steps_at = self._step
            self._to_trainer(ev.Checkpoint(self._step))
        elif self._is_save_due_by_time():
            self._to_trainer(ev.Checkpoint(self._step))
        if self._evaluates and evaluate is not None and self._step - self._evaluated_at >= evaluate:
            self._to_trainer(ev.Evaluate(self._step))

    def _is_save_due_by_time(self) -> bool:
        """Whether time has passed, there is something to save, and the last one is written."""
        is_new = self._step > self._saved_at
        return self._is_checkpoint_due and is_new and not self._being_written

    def _publish(self, version: int) -> None:
        self._publishing = True
        self._to_trainer(ev.Publish(version, self._step))

    def _to_trainer(self, action: ev.Publish | ev.Checkpoint | ev.Evaluate | ev.Train) -> None:
        self._num_trainer_actions += 1
        if isinstance(action, ev.Checkpoint):
            self._saved_at, self._is_checkpoint_due = action.step, False
        elif isinstance(action, ev.Evaluate):
            self._evaluated_at = action.step
        self._actions.append(action)

    # Generating and scoring.

    def _request(self) -> None:
        """Request as many shards as the window and the generators allow."""
        while self._may_generate() and (size := self._shard_size()) > 0:
            first = self._tracker.num_requested
            ids = range(first, first + size)
            requests = make_requests(ids, self.config, self._requests_per_round)
            self._to_stage(ev.Generate(self._tracker.num_shards, self.version, requests))
        is_live = self._tracker.num_live > 0
        self._window_was_full = is_live and (self._window_was_full or self._shard_size() == 0)

    def _may_generate(self) -> bool:
        generate = self.config.generate
        most = generate.workers * generate.num_in_flight
        if self._publishing or self._tracker.shards_generating >= most:
            return False
        if self.config.is_overlapped:
            return True
        is_in_use = self._tracker.shards_scoring or self._num_trainer_actions
        return not is_in_use and (not self.config.has_phases or self._is_generating_due())

    def _is_generating_due(self) -> bool:
        """Whether the generators are to have the device (`runtime.share: phases`).

        A phase of generation begins with a new snapshot, or when the replay buffer cannot fill a
        batch, and lasts until the window is full. Another follows if the filter empties half of
        it.
        """
        is_short = self._tracker.buffer.num_available < self.config.train.batch_size
        is_half_empty = 2 * self._tracker.num_live <= self._window()
        return (
            self._tracker.has_unbuffered
            or is_short
            or self._since == "refresh"
            or (self._since == "score" and is_half_empty)
        )

    def _shard_size(self) -> int:
        """The size of the next shard; 0 while there is no room, or nothing left to request.

        A smaller shard is requested only if it holds the last samples that may be requested, or if
        nothing is in flight and the replay buffer cannot fill a batch.
        """
        whole = self.config.shard_size
        requestable, room = self._num_requestable(), self._window() - self._tracker.num_live
        short = self._tracker.buffer.num_available < self.config.train.batch_size
        is_starving = short and not self._tracker.has_unbuffered
        if min(requestable, room) >= whole or requestable <= room or is_starving:
            return max(0, min(whole, requestable, room))
        return 0

    def _window(self) -> int:
        window = self._schedule.window
        return self._requests_per_round if window == "all" else window

    def _num_requestable(self) -> int:
        """Samples that may still be requested before the end, or before the next refresh."""
        tracker, reuse = self._tracker, self._schedule.reuse
        limit = self._total_requests
        if limit is None:
            assert self._schedule.steps is not None, "checked by the config"
            # With at_steps: request only what the steps before the next refresh need.
            until = self._refresh.next_step or self._schedule.steps
            if self._step >= until:
                return 0
            needed = (until - self._step) * self.config.train.batch_size
            coming = tracker.num_live - len(tracker.buffer)
            missing = needed - coming * reuse - tracker.buffer.uses_left
            by_uses = -(-missing // reuse)
            # A batch takes `batch_size` different samples, whatever their uses left.
            by_batch = self.config.train.batch_size - coming - tracker.buffer.num_available
            limit = tracker.num_requested + max(by_uses, by_batch)
        epoch = self._refresh.next_epoch
        if epoch is not None:
            limit = min(limit, -(-epoch // reuse) * self._requests_per_round)
        return max(0, limit - tracker.num_requested)

    def _score(self) -> None:
        in_turn = not self.config.is_overlapped
        if not (in_turn and (self._tracker.shards_generating or self._num_trainer_actions)):
            for shard, oldest, ids in self._tracker.take_unscored():
                self._since = "score"
                self._to_stage(ev.Score(shard, oldest, ids))

    def _to_stage(self, action: ev.Generate | ev.Score) -> None:
        self._tracker.start(action)
        self._actions.append(action)

    # Training.

    def _train(self) -> None:
        if not self.config.is_overlapped and self._tracker.has_unbuffered:
            return
        steps: list[Step] = []
        for _ in range(self._segment_budget()):
            refs = self._next_batch(is_first=not steps)
            if not refs:
                break
            steps.append(self._step_of(refs))
        if steps:
            segment = Segment(self._num_segments, self.version, tuple(steps))
            self._num_segments += 1
            self._since = "train"
            self._to_trainer(ev.Train(segment))

    def _segment_budget(self) -> int:
        """Steps until the segment is full, or a refresh, checkpoint or evaluation is due."""
        due = [
            (self._schedule.steps, 0),
            (self._schedule.refresh.every_steps, self._refresh.step),
            (self._refresh.next_step, 0),
            (self.config.checkpoint.every_steps, self._saved_by_steps_at),
            (self.config.eval.every_steps, self._evaluated_at),
        ]
        remaining = [since + every - self._step for every, since in due if every is not None]
        # An overdue refresh that will not come (all is requested) must not block training.
        return min([self._schedule.segment_steps, *(steps for steps in remaining if steps > 0)])

    def _next_batch(self, *, is_first: bool) -> list[SampleRef]:
        """The samples of the segment's next step; empty while there are too few.

        Samples are reused only after the window was full, so that reuse goes in passes over the
        whole window. A short batch is taken only if no more samples can come. After a segment's
        first step, room in the window is ignored: samples used up in this segment stay live until
        the trainer reports.
        """
        size, buffer = self.config.train.batch_size, self._tracker.buffer
        if buffer.num_fresh >= size:
            return buffer.take(size, allow_used=False)
        none_left = self._shard_size() == 0 if is_first else self._num_requestable() == 0
        is_dry = none_left and not self._tracker.has_unbuffered
        if is_dry or (self._window_was_full and buffer.num_available >= size):
            return buffer.take(size, allow_used=True)
        return []

    def _step_of(self, refs: list[SampleRef]) -> Step:
        before = self.progress
        self._step += 1
        self._tracker.use(refs)
        train, progress = self.config.train, (before, self.progress)
        return make_step(self._step, refs, train, progress=progress, ranks=train.ranks)


def make_step(
    index: int,
    refs: Sequence[SampleRef],
    train: TrainConfig,
    *,
    progress: tuple[float, float],
    ranks: int = 1,
) -> Step:
    """Pack a batch into rows, distribute them over the ranks, and set the learning rate.

    `progress`: the finished share of the run at the start and at the end of the step, 0 to 1.
    """
    packed = pack([ref.num_tokens for ref in refs], train.row_tokens)
    rows = [Row(tuple([refs[i] for i in row])) for row in packed]
    lr = learning_rate(*progress, lr=train.lr, min_lr=train.min_lr, warmup=train.warmup)
    return Step(index, lr, _deal(rows, ranks))


def _deal(rows: Sequence[Row], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of each rank, balanced by their cost."""
    if ranks == 1:
        return (tuple(rows),)
    costs = [row_cost([ref.num_tokens for ref in row.samples]) for row in rows]
    return tuple(tuple(rows[index] for index in indices) for indices in balance(costs, ranks))

"""What to do next, decided from what has happened. No I/O, no clock, no asyncio, no tensor.

`Plan.handle(event) -> actions` is deterministic: a run is resumed by replaying its events. It
promises that no sample is trained on more than `reuse` times or more than `max_lag` snapshots
behind, that every sample asked for leaves at most once, and that asks stay within the window.
"""

from __future__ import annotations

from npd.config import RunConfig
from npd.control import events as ev
from npd.control.batches import has_drifted, make_asks, make_step
from npd.control.flow import Flow
from npd.types import SampleRef, Segment, Step


class Plan:
    """The decisions of one run; `num_ranks` trainer ranks share each step's rows."""

    def __init__(self, config: RunConfig, *, num_ranks: int = 1) -> None:
        self.config, self._schedule = config, config.schedule
        self.ranks = num_ranks
        self._flow = Flow(config)
        self._evaluates = config.eval.source != "none"
        reads_student = config.needs_ifd or config.needs_student_pass
        self._uses_snapshots = config.generate.source == "student" or reads_student
        self._asks_per_round = 0
        self._total_asks: int | None = None
        self._trainer_busy = self._num_segments = 0
        self._filled = False
        self._version = self._skipped = 0
        self._publishing = self._drifted = False
        self._step = self._refreshed_at = 0
        self._saved_at = self._evaluated_at = 0
        self._stopped = False

    @property
    def step(self) -> int:
        """Optimiser steps decided so far."""
        return self._step

    @property
    def version(self) -> int:
        """The newest published snapshot."""
        return self._version

    @property
    def num_asked(self) -> int:
        """Samples asked for so far."""
        return self._flow.num_asked

    @property
    def num_live(self) -> int:
        """Samples asked for that have not left."""
        return self._flow.num_live

    @property
    def is_stopped(self) -> bool:
        """Whether everything is decided and done."""
        return self._stopped

    @property
    def progress(self) -> float:
        """How much of the run is decided, 0 to 1: in steps, or in uses of samples."""
        if self._schedule.steps is not None:
            return min(1.0, self._step / self._schedule.steps)
        if not self._total_asks:
            return 0.0
        return min(1.0, self._flow.credit / (self._total_asks * self._schedule.reuse))

    @property
    def oldest_version_needed(self) -> int:
        """The oldest snapshot that a shard on its way still needs, or else the newest."""
        return self._flow.oldest_version(self._version)

    def handle(self, event: ev.Event) -> list[ev.Action]:
        """Take note of `event`; returns what to do now, in order."""
        assert not self._stopped, "the run has stopped"
        self._note(event)
        self._decide()
        return self._flow.hand_over()

    def _note(self, event: ev.Event) -> None:
        match event:
            case ev.Started(num_prompts):
                self._start(num_prompts)
            case ev.ShardGenerated():
                self._flow.generated(event, self._version)
            case ev.ShardScored():
                self._flow.scored(event, self._version)
            case ev.ShardFailed():
                self._flow.failed(event, self._version)
            case ev.SegmentTrained(report):
                self._trainer_busy -= 1
                self._flow.drop_spent()
                self._drifted = has_drifted(report, self._schedule.refresh.drift)
            case ev.SnapshotPublished(version, step):
                self._trainer_busy -= 1
                self._publishing, self._drifted = False, False
                self._version, self._refreshed_at = version, step
                self._flow.drop_stale(version)
            case ev.CheckpointSaved() | ev.Evaluated():
                self._trainer_busy -= 1

    def _start(self, num_prompts: int) -> None:
        self._asks_per_round = num_prompts * self.config.generate.samples_per_prompt
        self._total_asks = self.config.num_asks(num_prompts)
        if self._uses_snapshots:
            self._publish(0)
        if self._evaluates:
            self._to_trainer(ev.Evaluate(0))

    def _decide(self) -> None:
        if self._flow.barren >= self._patience():
            self._stop("no sample gets through", failed=True)
        elif self._is_finished():
            self._finish()
        else:
            if self._trainer_busy == 0:
                self._tend_trainer()
            self._ask()
            self._score()
            if self._trainer_busy == 0:
                self._train()

    def _patience(self) -> int:
        """Samples rejected in a row after which going on is pointless."""
        return max(512, 8 * self.config.train.batch_size, 4 * self.config.generate.shard_size)

    def _is_finished(self) -> bool:
        if self._trainer_busy:
            return False
        if self._schedule.steps is not None:
            return self._step >= self._schedule.steps
        return self._is_all_asked() and self._flow.num_live == 0

    def _is_all_asked(self) -> bool:
        return self._total_asks is not None and self._flow.num_asked >= self._total_asks

    def _finish(self) -> None:
        """A last evaluation and checkpoint, unless they are there; then stop."""
        if self._evaluates and self._evaluated_at < self._step:
            self._to_trainer(ev.Evaluate(self._step))
        if self._saved_at < self._step:
            self._to_trainer(ev.Checkpoint(self._step))
        if self._trainer_busy == 0:
            self._stop("done" if self._step else "nothing was trained", failed=self._step == 0)

    def _stop(self, reason: str, *, failed: bool) -> None:
        self._stopped = True
        self._flow.actions.append(ev.Stop(reason, failed))

    # The trainer between segments.

    def _tend_trainer(self) -> None:
        """Refresh the snapshot, save, evaluate, as each falls due."""
        while self._is_refresh_due():
            if self._step > self._refreshed_at:
                self._publish(self._version + 1)
                break
            self._skipped += 1  # it would be the snapshot there is
        save, evaluate = self.config.checkpoint.every_steps, self.config.eval.every_steps
        if save is not None and self._step - self._saved_at >= save:
            self._to_trainer(ev.Checkpoint(self._step))
        if self._evaluates and evaluate is not None and self._step - self._evaluated_at >= evaluate:
            self._to_trainer(ev.Evaluate(self._step))

    def _is_refresh_due(self) -> bool:
        refresh, since = self._schedule.refresh, self._step - self._refreshed_at
        if self._is_all_asked():
            return False
        if refresh.every_steps is not None:
            return since >= refresh.every_steps
        if refresh.drift is not None:
            return self._drifted and since >= refresh.min_steps
        epoch = self._next_refresh_epoch()
        return epoch is not None and self._flow.credit >= epoch * self._asks_per_round

    def _next_refresh_epoch(self) -> int | None:
        epochs = self._schedule.refresh.at_epochs or ()
        passed = self._version + self._skipped
        return epochs[passed] if passed < len(epochs) else None

    def _publish(self, version: int) -> None:
        self._publishing = True
        self._to_trainer(ev.Publish(version, self._step))

    def _to_trainer(self, action: ev.Publish | ev.Checkpoint | ev.Evaluate | ev.Train) -> None:
        self._trainer_busy += 1
        if isinstance(action, ev.Checkpoint):
            self._saved_at = action.step
        elif isinstance(action, ev.Evaluate):
            self._evaluated_at = action.step
        self._flow.actions.append(action)

    # Generating and scoring.

    def _ask(self) -> None:
        """Ask for as many shards as the window and the generators take."""
        while self._may_generate() and (size := self._shard_size()) > 0:
            ids = range(self._flow.num_asked, self._flow.num_asked + size)
            self._flow.ask(self._version, make_asks(ids, self.config, self._asks_per_round))
        is_live = self._flow.num_live > 0
        self._filled = is_live and (self._filled or self._shard_size() == 0)

    def _may_generate(self) -> bool:
        if self._publishing or self._flow.num_generating >= self.config.generate.workers:
            return False
        return self.config.is_overlapped or not (self._flow.num_scoring or self._trainer_busy)

    def _shard_size(self) -> int:
        """Samples of the next shard: a whole one, or what is left to ask, or 0 to wait for room.

        Less than a whole shard is asked for only at the end of what may be asked at all, and when
        nothing is on its way and the pool cannot make a batch.
        """
        whole = self.config.generate.shard_size
        askable, room = self._askable(), self._window() - self._flow.num_live
        short = self._flow.pool.num_available < self.config.train.batch_size
        is_starving = short and not self._flow.is_any_on_its_way
        if min(askable, room) >= whole or askable <= room or is_starving:
            return max(0, min(whole, askable, room))
        return 0

    def _window(self) -> int:
        window = self._schedule.window
        return self._asks_per_round if window == "all" else window

    def _askable(self) -> int:
        """Samples that may still be asked for before the end, or before the next refresh."""
        flow, reuse = self._flow, self._schedule.reuse
        limit = self._total_asks
        if limit is None:
            assert self._schedule.steps is not None, "checked by the config"
            needed = (self._schedule.steps - self._step) * self.config.train.batch_size
            coming = flow.num_live - len(flow.pool)
            by_uses = -((coming * reuse + flow.pool.uses_left - needed) // reuse)
            # However often each may be used, a batch takes that many different ones.
            by_batch = self.config.train.batch_size - coming - flow.pool.num_available
            limit = flow.num_asked + max(by_uses, by_batch)
        epoch = self._next_refresh_epoch()
        if epoch is not None:
            limit = min(limit, -(-epoch // reuse) * self._asks_per_round)
        return max(0, limit - flow.num_asked)

    def _score(self) -> None:
        in_turn = not self.config.is_overlapped
        if not (in_turn and (self._flow.num_generating or self._trainer_busy)):
            self._flow.score_all()

    # Training.

    def _train(self) -> None:
        if not self.config.is_overlapped and self._flow.is_any_on_its_way:
            return
        steps: list[Step] = []
        for _ in range(self._segment_budget()):
            refs = self._next_batch(is_first=not steps)
            if not refs:
                break
            steps.append(self._step_of(refs))
        if steps:
            segment = Segment(self._num_segments, self._version, tuple(steps))
            self._num_segments += 1
            self._to_trainer(ev.Train(segment))

    def _segment_budget(self) -> int:
        """Steps until the segment is full or something else falls due."""
        due = [
            (self._schedule.steps, 0),
            (self._schedule.refresh.every_steps, self._refreshed_at),
            (self.config.checkpoint.every_steps, self._saved_at),
            (self.config.eval.every_steps, self._evaluated_at),
        ]
        left = [since + every - self._step for every, since in due if every is not None]
        # A refresh that is overdue (nobody left to sample it) must not hold up training.
        return min([self._schedule.segment_steps, *(steps for steps in left if steps > 0)])

    def _next_batch(self, *, is_first: bool) -> list[SampleRef]:
        """The samples of the segment's next step, or none while there are too few.

        Samples are used again only once the window has filled, so that reuse goes in passes over
        all of it; fewer than a batch are used only when no more can come. Within a segment, those
        used up still hold their place in the window, so room may come after it.
        """
        size, pool = self.config.train.batch_size, self._flow.pool
        if pool.num_fresh >= size:
            return pool.take(size, reuse=False)
        none_left = self._shard_size() == 0 if is_first else self._askable() == 0
        is_dry = none_left and not self._flow.is_any_on_its_way
        if is_dry or (self._filled and pool.num_available >= size):
            return pool.take(size, reuse=True)
        return []

    def _step_of(self, refs: list[SampleRef]) -> Step:
        before = self.progress
        self._step += 1
        self._flow.use(refs)
        progress = (before, self.progress)
        return make_step(self._step, refs, self.config.train, progress=progress, ranks=self.ranks)

"""The state of every sample of a run: requested, generated, scored, buffered or finalized.

Applies the filter, the bound on staleness and the limit of attempts to each sample. Creates no
actions: the plan does. Promises: a sample is finalized at most once, and `num_live` is the number
of requested less finalized samples.

`uses_accounted` counts the uses that samples had, and those that samples lost by being finalized
early. So uses_accounted / (prompts * samples_per_prompt) is the epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from npd.config import RunConfig
from npd.filters import Filter, build_filter, prefilter
from npd.schedule import events as ev
from npd.schedule.replay_buffer import ReplayBuffer
from npd.types import Outcome, SampleRef, SampleStats

Finalized: TypeAlias = tuple[int, Outcome, str]
"""A sample id, how the sample ended, and the reason."""


class UnscoredShard(NamedTuple):
    """Samples of a generated shard that wait for a scorer.

    `oldest_version`: the oldest snapshot that generated one of them.
    """

    shard: int
    oldest_version: int
    sample_ids: tuple[int, ...]


@dataclass(slots=True)
class _Attempt:
    """A shard that a worker has: the action, and how often it was tried."""

    action: ev.Generate | ev.Score
    tries: int = 1


class SampleTracker:
    """Tracks every sample from events and started actions."""

    def __init__(self, config: RunConfig) -> None:
        self.buffer = ReplayBuffer(config.seed, config.schedule.reuse)
        self.num_requested = 0
        self.num_shards = 0
        self.uses_accounted = 0
        self.consecutive_drops = 0
        """Samples rejected or failed since the last one that was buffered."""
        self._config = config
        self._filter: Filter = build_filter(config.filter, config.seed)
        self._history: deque[SampleStats] = deque(maxlen=config.filter.history)
        self._num_finalized = 0
        self._finalized: list[Finalized] = []
        self._generating: dict[int, _Attempt] = {}
        self._unscored: deque[UnscoredShard] = deque()
        self._scoring: dict[int, _Attempt] = {}

    @property
    def num_live(self) -> int:
        """Samples requested and not finalized."""
        return self.num_requested - self._num_finalized

    @property
    def shards_generating(self) -> int:
        """Shards that generators have."""
        return len(self._generating)

    @property
    def shards_scoring(self) -> int:
        """Shards that scorers have."""
        return len(self._scoring)

    @property
    def has_unbuffered(self) -> bool:
        """Whether any live sample has not reached the replay buffer yet."""
        return bool(self._generating or self._unscored or self._scoring)

    def oldest_version(self, newest: int) -> int:
        """The oldest snapshot that an unfinished shard still needs, or else `newest`."""
        attempts = [*self._generating.values(), *self._scoring.values()]
        versions = [attempt.action.version for attempt in attempts]
        return min([*versions, *(shard.oldest_version for shard in self._unscored)], default=newest)

    def take_finalized(self) -> tuple[Finalized, ...]:
        """The samples finalized since the last call, in order."""
        finalized, self._finalized = self._finalized, []
        return tuple(finalized)

    def take_unscored(self) -> list[UnscoredShard]:
        """Every shard that waits for a scorer, oldest first; the caller starts each."""
        shards = list(self._unscored)
        self._unscored.clear()
        return shards

    def start(self, action: ev.Generate | ev.Score) -> None:
        """Record a new action; repeated ones are recorded by `retry`."""
        if isinstance(action, ev.Generate):
            assert action.shard == self.num_shards, "shards are numbered in order"
            self._generating[action.shard] = _Attempt(action)
            self.num_requested += len(action.requests)
            self.num_shards += 1
        else:
            self._scoring[action.shard] = _Attempt(action)

    def generated(self, event: ev.ShardGenerated, newest: int) -> None:
        """A shard was generated: samples that pass the pre-filters wait for a scorer, or are
        buffered."""
        del self._generating[event.shard]
        self._fail(event.failed, "generate")
        kept = []
        for stats in event.stats:
            # Judged by the snapshot that wrote it: a refresh may have made it newer than requested.
            if self._is_stale(stats.version, newest):
                self._finalize([stats.sample_id], Outcome.STALE, "lag")
                continue
            verdict = prefilter(stats, self._config.filter)
            if verdict.keep:
                kept.append(stats)
            else:
                self._finalize([stats.sample_id], Outcome.REJECTED, verdict.reason)
        if not self._config.needs_scores:
            self._judge(event.shard, tuple(kept), newest)
        elif kept:
            ids = tuple(stats.sample_id for stats in kept)
            oldest = min(stats.version for stats in kept)
            self._unscored.append(UnscoredShard(event.shard, oldest, ids))

    def scored(self, event: ev.ShardScored, newest: int) -> None:
        """A shard was scored: samples that pass the filter are buffered."""
        del self._scoring[event.shard]
        self._fail(event.failed, "score")
        if event.stats:
            self._judge(event.shard, event.stats, newest)

    def retry(self, event: ev.ShardFailed, newest: int) -> ev.Generate | ev.Score | None:
        """The action to repeat after a failed attempt.

        None if its samples are stale by now or the action was tried `max_tries` times; then the
        samples are finalized.
        """
        shards = self._generating if event.stage == "generate" else self._scoring
        attempt = shards[event.shard]
        is_stale = self._is_stale(attempt.action.version, newest)
        if not is_stale and attempt.tries < self._config.schedule.max_tries:
            attempt.tries += 1
            return attempt.action
        del shards[event.shard]
        if is_stale:
            self._finalize(_samples(attempt.action), Outcome.STALE, "lag")
        else:
            reason = f"{event.stage}: {event.error}"
            self._finalize(_samples(attempt.action), Outcome.FAILED, reason)
        return None

    def finalize_spent(self) -> None:
        """Finalize samples used `reuse` times."""
        self._finalize_buffered(self.buffer.spent(), Outcome.TRAINED_OUT, "reuse")

    def finalize_stale(self, newest: int) -> None:
        """Finalize buffered and unscored samples that are too far behind snapshot `newest`."""
        oldest = newest - self._config.schedule.max_lag
        self._finalize_buffered(self.buffer.older_than(oldest), Outcome.STALE, "lag")
        for shard in [u for u in self._unscored if self._is_stale(u.oldest_version, newest)]:
            self._unscored.remove(shard)
            self._finalize(shard.sample_ids, Outcome.STALE, "lag")

    def use(self, refs: Sequence[SampleRef]) -> None:
        """Add a batch to `uses_accounted`; the buffer counts the uses of each sample."""
        self.uses_accounted += len(refs)

    def _judge(self, shard: int, batch: tuple[SampleStats, ...], newest: int) -> None:
        """Filter samples; kept samples are buffered, unless they are already stale."""
        verdicts = self._filter.judge(batch, tuple(self._history))
        self._history.extend(batch)
        kept = []
        for stats, verdict in zip(batch, verdicts, strict=True):
            if not verdict.keep:
                self._finalize([stats.sample_id], Outcome.REJECTED, verdict.reason)
            elif self._is_stale(stats.version, newest):
                self._finalize([stats.sample_id], Outcome.STALE, "lag")
            else:
                self.consecutive_drops = 0
                kept.append(SampleRef(stats.sample_id, shard, stats.version, stats.num_tokens))
        self.buffer.add(kept)

    def _fail(self, failed: Iterable[tuple[int, str]], stage: ev.Stage) -> None:
        """Finalize the samples of a shard that could not be generated or scored."""
        for sample_id, reason in failed:
            self._finalize([sample_id], Outcome.FAILED, f"{stage}: {reason}")

    def _is_stale(self, version: int, newest: int) -> bool:
        return version < newest - self._config.schedule.max_lag

    def _finalize_buffered(self, ids: Iterable[int], outcome: Outcome, reason: str) -> None:
        for sample_id in ids:
            self._finalize([sample_id], outcome, reason, uses=self.buffer.remove(sample_id))

    def _finalize(
        self, ids: Sequence[int], outcome: Outcome, reason: str, *, uses: int = 0
    ) -> None:
        self._finalized += [(sample_id, outcome, reason) for sample_id in ids]
        self._num_finalized += len(ids)
        self.uses_accounted += len(ids) * (self._config.schedule.reuse - uses)
        if outcome is Outcome.REJECTED or outcome is Outcome.FAILED:
            self.consecutive_drops += len(ids)


def _samples(action: ev.Generate | ev.Score) -> tuple[int, ...]:
    if isinstance(action, ev.Score):
        return action.sample_ids
    return tuple(request.sample_id for request in action.requests)

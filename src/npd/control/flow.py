"""The samples of a run on their way: asked for, generated, scored, in the pool, or gone.

Pure bookkeeping for the plan: no decision on what to do next is taken here. Promises that a sample
leaves at most once, and that `num_live` is what was asked for less what left.

*Credit* counts uses, and the uses that a sample which left early will never have; so
credit / (prompts * samples_per_prompt) is the epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from npd.config import RunConfig
from npd.control import events as ev
from npd.control.pool import Pool
from npd.filters import Filter, build_filter, prefilter
from npd.types import Outcome, SampleRef, SampleStats


@dataclass(slots=True)
class _InFlight:
    """A shard a worker has: the action that asked for it, and how often it was tried."""

    action: ev.Generate | ev.Score
    tries: int = 1


class Flow:
    """Where every sample is. What is to be done at once (ask, score, try again) is in `actions`."""

    def __init__(self, config: RunConfig) -> None:
        self.actions: list[ev.Action] = []
        self.pool = Pool(config.seed, config.schedule.reuse)
        self.num_asked = 0
        self.num_shards = 0
        self.credit = 0
        self.barren = 0
        """Samples rejected or failed since the last one that got through."""
        self._config = config
        self._filter: Filter = build_filter(config.filter, config.seed)
        self._history: deque[SampleStats] = deque(maxlen=config.filter.history)
        self._left = 0
        self._leaving: list[tuple[int, Outcome, str]] = []
        self._generating: dict[int, _InFlight] = {}
        self._unscored: deque[ev.Score] = deque()
        self._scoring: dict[int, _InFlight] = {}

    @property
    def num_live(self) -> int:
        """Samples asked for that have not left."""
        return self.num_asked - self._left

    @property
    def num_generating(self) -> int:
        """Shards generators have."""
        return len(self._generating)

    @property
    def num_scoring(self) -> int:
        """Shards scorers have."""
        return len(self._scoring)

    @property
    def is_any_on_its_way(self) -> bool:
        """Whether any sample is not in the pool yet."""
        return bool(self._generating or self._unscored or self._scoring)

    def hand_over(self) -> list[ev.Action]:
        """The actions since the last time, before them who has left, all at once."""
        actions, self.actions = self.actions, []
        leaving, self._leaving = self._leaving, []
        return [ev.Retire(tuple(leaving)), *actions] if leaving else actions

    def oldest_version(self, newest: int) -> int:
        """The oldest snapshot that a shard on its way still needs, or else `newest`."""
        in_flight = [*self._generating.values(), *self._scoring.values()]
        versions = [flight.action.version for flight in in_flight]
        return min([*versions, *(score.version for score in self._unscored)], default=newest)

    def ask(self, version: int, asks: tuple[ev.AskRef, ...]) -> None:
        """Samples are asked for, as the next shard."""
        action = ev.Generate(self.num_shards, version, asks)
        self._generating[self.num_shards] = _InFlight(action)
        self.num_asked += len(asks)
        self.num_shards += 1
        self.actions.append(action)

    def score_all(self) -> None:
        """What waits for a scorer is handed over."""
        while self._unscored:
            action = self._unscored.popleft()
            self._scoring[action.shard] = _InFlight(action)
            self.actions.append(action)

    def generated(self, event: ev.ShardGenerated, newest: int) -> None:
        """A written shard: what passes the pre-filters waits for a scorer, or joins the pool."""
        del self._generating[event.shard]
        self._fail(event.failed, "generate")
        kept = []
        for stats in event.stats:
            # By what wrote it, which is newer than what was asked where a refresh fell in between.
            if self._is_stale(stats.version, newest):
                self._leave([stats.sample_id], Outcome.STALE, "lag")
                continue
            verdict = prefilter(stats, self._config.filter)
            if verdict.keep:
                kept.append(stats)
            else:
                self._leave([stats.sample_id], Outcome.REJECTED, verdict.reason)
        if not self._config.needs_scores:
            self._judge(event.shard, tuple(kept), newest)
        elif kept:
            ids = tuple(stats.sample_id for stats in kept)
            oldest = min(stats.version for stats in kept)
            self._unscored.append(ev.Score(event.shard, oldest, ids))

    def scored(self, event: ev.ShardScored, newest: int) -> None:
        """A scored shard: what passes the filter joins the pool."""
        del self._scoring[event.shard]
        self._fail(event.failed, "score")
        if event.stats:
            self._judge(event.shard, event.stats, newest)

    def failed(self, event: ev.ShardFailed, newest: int) -> None:
        """A try failed: the same again, unless stale by now or tried `max_tries` times."""
        in_flight = self._generating if event.stage == "generate" else self._scoring
        flight = in_flight[event.shard]
        if self._is_stale(flight.action.version, newest):
            del in_flight[event.shard]
            self._leave(_samples(flight.action), Outcome.STALE, "lag")
            return
        if flight.tries < self._config.schedule.max_tries:
            flight.tries += 1
            self.actions.append(flight.action)
            return
        del in_flight[event.shard]
        self._leave(_samples(flight.action), Outcome.FAILED, f"{event.stage}: {event.error}")

    def drop_spent(self) -> None:
        """Samples used as often as they may be leave."""
        self._drop(self.pool.spent(), Outcome.TRAINED_OUT, "reuse")

    def drop_stale(self, newest: int) -> None:
        """Samples too far behind snapshot `newest` leave, before a scorer is paid for them."""
        oldest = newest - self._config.schedule.max_lag
        self._drop(self.pool.older_than(oldest), Outcome.STALE, "lag")
        for action in [a for a in self._unscored if self._is_stale(a.version, newest)]:
            self._unscored.remove(action)
            self._leave(action.sample_ids, Outcome.STALE, "lag")

    def use(self, refs: list[SampleRef]) -> None:
        """The pool's samples in `refs` are trained on once more."""
        self.credit += len(refs)

    def _judge(self, shard: int, batch: tuple[SampleStats, ...], newest: int) -> None:
        """Filter samples; those kept join the pool, unless they are stale already."""
        verdicts = self._filter.judge(batch, tuple(self._history))
        self._history.extend(batch)
        kept = []
        for stats, verdict in zip(batch, verdicts, strict=True):
            if not verdict.keep:
                self._leave([stats.sample_id], Outcome.REJECTED, verdict.reason)
            elif self._is_stale(stats.version, newest):
                self._leave([stats.sample_id], Outcome.STALE, "lag")
            else:
                self.barren = 0
                kept.append(SampleRef(stats.sample_id, shard, stats.version, stats.num_tokens))
        self.pool.add(kept)

    def _fail(self, failed: Iterable[tuple[int, str]], stage: ev.Stage) -> None:
        """Single samples of a shard that a stage could not do."""
        for sample_id, reason in failed:
            self._leave([sample_id], Outcome.FAILED, f"{stage}: {reason}")

    def _is_stale(self, version: int, newest: int) -> bool:
        return version < newest - self._config.schedule.max_lag

    def _drop(self, ids: Iterable[int], outcome: Outcome, reason: str) -> None:
        for sample_id in ids:
            self._leave([sample_id], outcome, reason, uses=self.pool.remove(sample_id))

    def _leave(self, ids: Sequence[int], outcome: Outcome, reason: str, *, uses: int = 0) -> None:
        self._leaving += [(sample_id, outcome, reason) for sample_id in ids]
        self._left += len(ids)
        self.credit += len(ids) * (self._config.schedule.reuse - uses)
        if outcome is Outcome.REJECTED or outcome is Outcome.FAILED:
            self.barren += len(ids)


def _samples(action: ev.Generate | ev.Score) -> tuple[int, ...]:
    if isinstance(action, ev.Score):
        return action.sample_ids
    return tuple(ask.sample_id for ask in action.asks)

"""A run's recorded events told again, and what a new plan decides upon each: reads only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

from npd.control import codec
from npd.control import events as ev
from npd.control.plan import Plan
from npd.errors import RunError
from npd.store.ledger import Ledger
from npd.types import SampleStats

Maker: TypeAlias = ev.Generate | ev.Score
Makers: TypeAlias = dict[tuple[str, int], Maker]


def retold(ledger: Ledger, plan: Plan) -> Iterator[tuple[ev.Event, list[ev.Action]]]:
    """Each event and the decisions upon it; `plan` is new, and afterwards where the run is.

    Raises:
        RunError: the decisions recorded are not those of this plan.
    """
    for seq, kind, payload in ledger.events():
        expected = payload.pop("digest")
        event = codec.decode(kind, payload)
        actions = plan.handle(event)
        if codec.digest(actions) != expected:
            raise RunError(
                f"event {seq} of {ledger.path} led to other decisions than now: the run was made "
                "by another version of npd or another config; resume with that one"
            )
        yield event, actions


def makers_of(shards: Collection[int], ledger: Ledger, plan: Plan) -> Makers:
    """The actions that made these shards, of a run that `plan` is the plan of; it is not changed.

    Told from the beginning: nobody can hold the makers of every shard there ever was.
    """
    under_way: Makers = {}
    makers: Makers = {}
    for event, actions in retold(ledger, Plan(plan.config, num_ranks=plan.ranks)):
        done = under_way.pop(ev.key(event), None)
        if done is not None and not isinstance(event, ev.ShardFailed):
            makers[ev.key(done)] = done
        wanted = (a for a in actions if isinstance(a, ev.Generate | ev.Score))
        under_way |= {ev.key(action): action for action in wanted if action.shard in shards}
    return makers


def written(shards: Collection[int], ledger: Ledger) -> dict[int, SampleStats]:
    """What was recorded of the samples of these shards when they were written, by id."""
    found: dict[int, SampleStats] = {}
    for _, kind, payload in ledger.events():
        if kind == "ShardGenerated" and payload["shard"] in shards:
            payload.pop("digest", None)
            event = codec.decode(kind, payload)
            assert isinstance(event, ev.ShardGenerated)
            found |= {stats.sample_id: stats for stats in event.stats}
    return found

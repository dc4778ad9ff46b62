"""On resuming: make again the shards and snapshots that are needed and missing or damaged.

A task is made from its seeds and its snapshot, so what comes back is what was lost; a snapshot from
the trainer, which repeats recorded segments exactly. Text that a server wrote is not made again: it
would be other text, under the lengths and versions that the ledger has of the old. Consumes the
actions that once made the shards; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from npd.control import events as ev
from npd.control.damage import Damage, Shard, survey
from npd.control.dispatch import Dispatcher
from npd.control.place import Folder, Place
from npd.control.replay import Maker, written
from npd.errors import RunError, StoreError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.types import SampleStats
from npd.wording import counted


async def repair(
    makers_of: Callable[[AbstractSet[int]], Collection[Maker]],
    dispatcher: Dispatcher,
    ledger: Ledger,
    layout: RunLayout,
    *,
    versions: Collection[int] = (),
    is_over: bool = False,
    place: Place | None = None,
) -> list[str]:
    """Carry out again what made the shards (`makers_of` them) that are needed and not whole.

    Snapshots in `versions`, and those that it takes, are published again first. Oldest first: a
    snapshot rests on shards of those before it. Once all is decided and done (`is_over`), only what
    the trainer has to repeat is needed. Returns what was made, in words.

    Raises:
        StoreError: such a shard was written by a server.
    """
    place = place or Folder()
    damage = survey(makers_of, ledger, layout, place, versions, is_over=is_over)
    if not dispatcher.rewrites_exactly:
        _check_is_makeable(damage)
    dispatcher.pass_over(damage.checkpoints)
    lost = {s.maker.shard for s in damage.shards if isinstance(s.maker, ev.Generate)}
    recorded = written(lost, ledger) if lost else {}
    made = []
    for version in damage.versions:
        if version in damage.steps:
            await dispatcher.republish(version, damage.steps[version])
            made.append(f"made again: snapshot v{version}, which was missing or damaged")
        for shard in damage.of(version):
            needed = damage.needed[shard.maker.shard]
            place.remove(shard.path)
            event = await _make(shard, dispatcher, needed)
            if isinstance(event, ev.ShardGenerated):
                _check_is_same(shard.path, event, recorded, needed)
    if damage.shards:
        made.append(f"made again: {counted(len(damage.shards), 'missing or damaged shard file')}")
    return made


def _check_is_makeable(damage: Damage) -> None:
    for shard in damage.shards:
        if isinstance(shard.maker, ev.Generate):
            raise StoreError(
                f"{shard.path} is missing or damaged, and what a server wrote is not written the "
                "same again: bring the file back, or start a new run"
            )


async def _make(
    shard: Shard, dispatcher: Dispatcher, needed: set[int]
) -> ev.ShardGenerated | ev.ShardScored:
    """Carry out what made it, again after each loss of its worker."""
    cause = ""
    for _ in range(dispatcher.max_tries):
        event = await dispatcher.run(shard.maker)
        if isinstance(event, ev.ShardGenerated | ev.ShardScored):
            lost = [f"sample {i}: {reason}" for i, reason in event.failed if i in needed]
            if not lost:
                return event
            cause = lost[0]
            break
        assert isinstance(event, ev.ShardFailed)
        cause = event.error
    raise RunError(
        f"{shard.path} could not be made again: {cause}; mend the cause and use --resume"
    )


def _check_is_same(
    path: Path, event: ev.ShardGenerated, recorded: Mapping[int, SampleStats], needed: set[int]
) -> None:
    """On another device, or with other libraries, samples may come out otherwise."""
    for stats in event.stats:
        before = recorded.get(stats.sample_id)
        if stats.sample_id in needed and before != stats:
            raise StoreError(
                f"{path} was lost, and sample {stats.sample_id} is not written the same again here "
                "(another device or version?): resume where the run was, or start a new run"
            )

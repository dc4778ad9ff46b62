"""On resuming: make again the shard files that are still needed and no longer there.

A task is made from its seeds and its snapshot, so what comes back is what was lost. Text that a
server wrote is not made again: it would be other text, under the lengths and versions that the
ledger has of the old. Consumes the actions that once made the shards; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from npd.control import events as ev
from npd.control.dispatch import Dispatcher
from npd.control.place import Folder, Place
from npd.errors import RunError, StoreError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger


async def repair(
    makers: Iterable[ev.Generate | ev.Score],
    dispatcher: Dispatcher,
    ledger: Ledger,
    layout: RunLayout,
    place: Place | None = None,
) -> int:
    """Carry out again those of `makers` whose file is needed and missing; returns how many.

    Raises:
        StoreError: a missing shard was written by a server, or by a snapshot that is pruned.
    """
    place = place or Folder()
    needed = _needed_samples(ledger, place)
    made = 0
    for action in sorted(makers, key=lambda action: isinstance(action, ev.Score)):
        is_score = isinstance(action, ev.Score)
        path = layout.scored(action.shard) if is_score else layout.rollouts(action.shard)
        if action.shard not in needed or place.has(path):
            continue
        if not is_score and not dispatcher.rewrites_exactly:
            raise StoreError(
                f"{path} is missing, and what a server wrote is not written the same again: bring "
                "the file back, or start a new run"
            )
        has_snapshot = not ledger.snapshots() or place.has(layout.snapshot(action.version))
        if not is_score and not has_snapshot:
            raise StoreError(
                f"{path} is missing and snapshot v{action.version}, which wrote it, is pruned: "
                "bring the file back, or start a new run"
            )
        await _make(action, dispatcher, path, needed[action.shard])
        made += 1
    return made


async def _make(
    action: ev.Generate | ev.Score, dispatcher: Dispatcher, path: Path, needed: set[int]
) -> None:
    """Carry `action` out, again after each loss of its worker."""
    cause = ""
    for _ in range(dispatcher.max_tries):
        event = await dispatcher.run(action)
        if isinstance(event, ev.ShardGenerated | ev.ShardScored):
            lost = [f"sample {i}: {reason}" for i, reason in event.failed if i in needed]
            if not lost:
                return
            cause = lost[0]
            break
        assert isinstance(event, ev.ShardFailed)
        cause = event.error
    raise RunError(f"{path} could not be made again: {cause}; mend the cause and use --resume")


def _needed_samples(ledger: Ledger, place: Place) -> dict[int, set[int]]:
    """By shard, samples that are live, and those of segments the trainer has to repeat."""
    newest_first = reversed(ledger.checkpoints())
    saved = next((row.step for row in newest_first if place.has(row.path)), 0)
    redo = ledger.segments_after(saved)
    refs = (
        ref
        for segment in redo
        for step in segment.steps
        for rows in step.ranks
        for row in rows
        for ref in row.samples
    )
    needed: dict[int, set[int]] = {}
    live = [(row.shard, row.sample_id) for row in ledger.samples("live")]
    for shard, sample_id in (*live, *((ref.shard, ref.sample_id) for ref in refs)):
        needed.setdefault(shard, set()).add(sample_id)
    return needed

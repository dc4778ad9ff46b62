"""On resuming: make again the shard files that are needed and missing or damaged.

A task is made from its seeds and its snapshot, so what comes back is what was lost. Text that a
server wrote is not made again: it would be other text, under the lengths and versions that the
ledger has of the old. Consumes the actions that once made the shards; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from npd.control import events as ev
from npd.control.dispatch import Dispatcher
from npd.errors import RunError, StoreError
from npd.store.files import remove
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import verify_shard


async def repair(
    makers: Iterable[ev.Generate | ev.Score],
    dispatcher: Dispatcher,
    ledger: Ledger,
    layout: RunLayout,
) -> int:
    """Carry out again those of `makers` whose file is needed and missing or damaged; how many.

    Raises:
        StoreError: such a shard was written by a server, or by a snapshot that is pruned.
    """
    needed = _needed_samples(ledger)
    made = 0
    for action in sorted(makers, key=lambda action: isinstance(action, ev.Score)):
        is_score = isinstance(action, ev.Score)
        path = layout.scored(action.shard) if is_score else layout.rollouts(action.shard)
        if action.shard not in needed or (what := _problem(path, is_score=is_score)) is None:
            continue
        if isinstance(action, ev.Generate):
            _check_is_makeable(action, dispatcher, ledger, layout, f"{path} is {what}")
        remove(path)
        await _make(action, dispatcher, path, needed[action.shard])
        made += 1
    return made


def _problem(path: Path, *, is_score: bool) -> str | None:
    """What is wrong with a shard's file, if anything."""
    if not path.exists():
        return "missing"
    try:
        verify_shard(path, "scored" if is_score else "rollouts")
    except StoreError:
        return "damaged"
    return None


def _check_is_makeable(
    action: ev.Generate, dispatcher: Dispatcher, ledger: Ledger, layout: RunLayout, what: str
) -> None:
    if not dispatcher.rewrites_exactly:
        raise StoreError(
            f"{what}, and what a server wrote is not written the same again: bring the file back, "
            "or start a new run"
        )
    if ledger.snapshots() and not layout.snapshot(action.version).exists():
        raise StoreError(
            f"{what} and snapshot v{action.version}, which wrote it, is pruned: bring the file "
            "back, or start a new run"
        )


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


def _needed_samples(ledger: Ledger) -> dict[int, set[int]]:
    """By shard, samples that are live, and those of segments the trainer has to repeat."""
    saved = [row.step for row in ledger.checkpoints() if row.path.exists()]
    redo = ledger.segments_after(max(saved, default=0))
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

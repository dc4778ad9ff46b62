"""On resuming: publish snapshots again that are needed and missing or damaged.

Like shards they can be made again, because the trainer repeats recorded segments exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

from npd.control.dispatch import Dispatcher
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.snapshots import is_whole


async def repair_snapshots(
    versions: Iterable[int], dispatcher: Dispatcher, ledger: Ledger, layout: RunLayout
) -> list[int]:
    """Publish those of `versions` again that were published and are missing or damaged; which.

    The trainer, as it came, repeats the recorded segments up to each, so it is the same student.
    """
    wanted = set(versions)
    made = []
    for row in ledger.snapshots():
        if row.version in wanted and not is_whole(layout.snapshot(row.version)):
            await dispatcher.republish(row.version, row.step)
            made.append(row.version)
    return made

"""Whether a run has come to its end, told from its ledger. Reads only."""

from __future__ import annotations

from contextlib import suppress

from npd.config import RunConfig
from npd.control import events as ev
from npd.control.plan import Plan
from npd.control.replay import retold
from npd.errors import RunError
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger


def finished_at(config: RunConfig, layout: RunLayout) -> int | None:
    """The last step of a run in which everything was decided and done, and whose student is there.

    A run that gave up (nothing got through) has not finished, nor has one whose recorded decisions
    are not those of this plan: what is wrong with it is said where it is gone on with.
    """
    if not (layout.student.is_dir() and layout.ledger_db.exists()):
        return None
    plan = Plan(config, num_ranks=config.train.ranks)
    is_done = False
    with Ledger.reader(layout.ledger_db) as ledger, suppress(RunError):
        for _, actions in retold(ledger, plan):
            is_done = any(isinstance(a, ev.Stop) and not a.failed for a in actions)
    return plan.step if is_done else None

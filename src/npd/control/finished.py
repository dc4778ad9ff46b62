"""Whether a run has come to its end, told from its ledger. Reads only."""

from __future__ import annotations

from npd.config import RunConfig
from npd.control import codec
from npd.control import events as ev
from npd.control.plan import Plan
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
    actions: list[ev.Action] = []
    with Ledger.reader(layout.ledger_db) as ledger:
        for _, kind, payload in ledger.events():
            expected = payload.pop("digest")
            actions = plan.handle(codec.decode(kind, payload))
            if codec.digest(actions) != expected:
                return None
    is_done = any(isinstance(action, ev.Stop) and not action.failed for action in actions)
    return plan.step if is_done else None

"""The ledger against plain dictionaries, in any order of operations."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from npd.store.ledger import Ledger
from npd.types import Outcome


class Bookkeeping(RuleBasedStateMachine):
    """Any order of asking, using, leaving, failing and reopening agrees with plain dictionaries."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="npd-ledger-"))
        self.ledger = Ledger(self.directory / "ledger.db")
        self.left, self.live = {}, {}

    @rule(size=st.integers(0, 5))
    def ask(self, size):
        start = len(self.left) + len(self.live)
        ids = range(start, start + size)
        self.ledger.add_samples(start, [(i, i, 0) for i in ids])
        self.live |= dict.fromkeys(ids, 0)

    @rule(data=st.data(), outcome=st.sampled_from(Outcome), reason=st.sampled_from(["", "a"]))
    def leave(self, data, outcome, reason):
        ids = data.draw(st.sets(st.sampled_from(sorted(self.live)))) if self.live else ()
        with self.ledger.transaction():
            self.ledger.add_uses(ids)
            self.ledger.set_outcomes([(i, outcome, reason) for i in ids])
        for i in ids:
            self.left[i] = (outcome, reason, self.live.pop(i) + 1)

    @rule(data=st.data())
    def leave_again(self, data):
        if self.left and self.live:
            gone, there = data.draw(st.sampled_from(sorted(self.left))), min(self.live)
            with pytest.raises(AssertionError):
                self.ledger.set_outcomes([(there, Outcome.STALE, ""), (gone, Outcome.STALE, "")])

    @rule()
    def reopen(self):
        self.ledger.close()
        self.ledger = Ledger(self.directory / "ledger.db")

    @invariant()
    def agrees(self):
        found = self.ledger.conservation()
        assert found.holds
        assert (found.asked, found.live) == (len(self.left) + len(self.live), len(self.live))
        for outcome in Outcome:
            want = sum(1 for o, _, _ in self.left.values() if o is outcome)
            assert getattr(found, outcome.value) == want
        rows = {r.sample_id: (r.outcome, r.reason, r.uses) for r in self.ledger.samples()}
        assert rows == self.left | {i: (None, "", uses) for i, uses in self.live.items()}

    def teardown(self):
        self.ledger.close()
        shutil.rmtree(self.directory)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)

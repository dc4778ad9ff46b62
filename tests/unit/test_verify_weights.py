"""Verification of servers' weights: no false alarm under rounding, no old weights unseen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npd.engines.verify_weights import Verification, WrongWeights, verify
from npd.models.fingerprint import Fingerprint

LENGTHS = (24, 50, 31, 80, 65)  # some 250 tokens, as in a snapshot


def make_fingerprint(values):
    """Log-probs `values` [N] on fixed sequences."""
    starts = np.cumsum([0, *LENGTHS])
    sequences = tuple(np.arange(length + 1, dtype=np.int32) for length in LENGTHS)
    parts = [values[a:b].astype(np.float32) for a, b in pairwise(starts)]
    return Fingerprint(sequences, tuple(parts))


def make_case(seed, *, change, noise, share=0.0):
    """A snapshot, the one before (off by `change` a token), and a server that went only part of the
    way (`share` of the old one left), with `noise`."""
    rng = np.random.default_rng(seed)
    new = -rng.exponential(1.5, sum(LENGTHS))
    off = change * rng.normal(size=len(new))
    found = new + share * off + noise * rng.normal(size=len(new))
    return make_fingerprint(found), make_fingerprint(new), make_fingerprint(new + off)


def check(found, new, old, tolerance=0.15):
    return verify("http://server", "snapshot v3", found, new, old, tolerance)


# Derandomised: a false alarm is one in 30,000 by design, and would fail a run in a hundred.
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.0, 0.1), st.floats(1e-5, 2.0))
def test_rounding_is_no_alarm(seed, noise, change):
    found, new, old = make_case(seed, change=change, noise=noise)
    verification = check(found, new, old)
    assert verification.difference <= 0.15
    assert verification.error is not None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.0, 0.05), st.floats(1e-3, 2.0), st.floats(0.4, 1.0))
def test_old_weights_are_seen_where_the_evidence_can_tell(seed, noise, change, share):
    """From a share of 0.4 on, wherever four standard errors are less than that."""
    found, new, old = make_case(seed, change=change, noise=noise, share=share)
    error = noise / (change * np.sqrt(sum(LENGTHS)))
    assume(error * 8 < share)
    with pytest.raises(WrongWeights, match="http://server does not serve snapshot v3"):
        check(found, new, old)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEEDS, st.floats(1e-4, 0.05), st.floats(1e-6, 1.0))
def test_what_cannot_be_told_is_not_called_verified(seed, noise, change):
    """An old server that passes leaves verification that says so."""
    found, new, old = make_case(seed, change=change, noise=noise, share=1.0)
    try:
        verification = check(found, new, old)
    except WrongWeights:
        return
    assert not verification.can_tell


@pytest.mark.parametrize(("share", "said"), [(1.0, "an earlier snapshot"), (0.5, "only a part")])
def test_the_message_says_how_much_is_old(share, said):
    case = make_case(0, change=0.1, noise=1e-4, share=share)
    with pytest.raises(WrongWeights, match=rf"{said}.*{share:.0%} \(± \d%\).*update the server"):
        check(*case)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_not_the_snapshot(bad):
    found, new, old = make_case(0, change=0.1, noise=0.0)
    found.logprobs[2][4] = bad
    with pytest.raises(WrongWeights, match="differ from the expected"):
        check(found, new, old)


def test_other_weights_are_seen_without_an_old_snapshot():
    found, new, _ = make_case(0, change=1.0, noise=0.5)
    with pytest.raises(WrongWeights, match=r"by 0\.\d+ nats per token \(at most 0\.15\)"):
        check(found, new, None)
    assert check(found, new, None, tolerance=1.0).old_share is None


def test_nothing_is_told_from_an_equal_snapshot_or_from_other_texts():
    found, new, old = make_case(0, change=0.0, noise=0.01)
    assert check(found, new, old).old_share is None
    shorter = Fingerprint(old.sequences[:3], old.logprobs[:3])
    assert check(found, new, shorter).old_share is None
    found, new, old = make_case(0, change=0.5, noise=0.01)
    others = Fingerprint(tuple(ids[::-1] for ids in old.sequences), old.logprobs)
    assert check(found, new, others).old_share is None
    assert check(found, new, old).old_share is not None


def test_a_verification_reads_well():
    verification = Verification(0.0123, 0.01, 0.02)
    assert verification.can_tell
    assert str(verification) == (
        "log-probs within 0.0123 nats/token of the snapshot's, share of old weights 0.01 ± 0.02"
    )
    assert not Verification(0.01).can_tell
    assert not Verification(0.01, 0.0, 0.3).can_tell


def test_answers_that_are_the_old_ones_to_the_last_digit_are_stale_however_small_the_change():
    found, new, old = make_case(7, change=2e-3, noise=0.05)
    assert not check(found, new, old).can_tell
    with pytest.raises(WrongWeights, match="identical"):
        verify("http://server", "snapshot v3", found, new, old, 0.15, before=found)
    verify("http://server", "snapshot v3", found, new, new, 0.15, before=found)  # nothing changed


def test_what_cannot_be_told_is_said():
    found, new, old = make_case(7, change=2e-3, noise=0.05)
    assert "too close to the previous snapshot" in str(check(found, new, old))
    found, new, old = make_case(7, change=0.5, noise=0.05)
    assert "too close" not in str(check(found, new, old))

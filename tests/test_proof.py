"""The proof of what a server holds: no false alarm under rounding, no old weights unseen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from npd.probe import Probe
from npd.servers.checksums import Checksums, tensor_digests
from npd.servers.proof import Evidence, StaleWeights, judge

LENGTHS = (24, 50, 31, 80, 65)  # some 250 tokens, as in a snapshot


def make_probe(values):
    """Log-probs `values` [N] on fixed sequences."""
    starts = np.cumsum([0, *LENGTHS])
    sequences = tuple(np.arange(length + 1, dtype=np.int32) for length in LENGTHS)
    parts = [values[a:b].astype(np.float32) for a, b in pairwise(starts)]
    return Probe(sequences, tuple(parts))


def make_case(seed, *, change, noise, share=0.0):
    """A snapshot, the one before (off by `change` a token), and a server that went only part of the
    way (`share` of the old one left), with `noise`."""
    rng = np.random.default_rng(seed)
    new = -rng.exponential(1.5, sum(LENGTHS))
    off = change * rng.normal(size=len(new))
    found = new + share * off + noise * rng.normal(size=len(new))
    return make_probe(found), make_probe(new), make_probe(new + off)


def proof(found, new, old, tolerance=0.15):
    return judge("http://server", "snapshot v3", found, new, old, tolerance)


# Derandomised: a false alarm is one in 30,000 by design, and would fail a run in a hundred.
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.0, 0.1), st.floats(1e-5, 2.0))
def test_rounding_is_no_alarm(seed, noise, change):
    found, new, old = make_case(seed, change=change, noise=noise)
    evidence = proof(found, new, old)
    assert evidence.difference <= 0.15
    assert evidence.error is not None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.0, 0.05), st.floats(1e-3, 2.0), st.floats(0.4, 1.0))
def test_old_weights_are_seen_where_the_evidence_can_tell(seed, noise, change, share):
    """From a share of 0.4 on, wherever four standard errors are less than that."""
    found, new, old = make_case(seed, change=change, noise=noise, share=share)
    error = noise / (change * np.sqrt(sum(LENGTHS)))
    assume(error * 8 < share)
    with pytest.raises(StaleWeights, match="http://server does not hold snapshot v3"):
        proof(found, new, old)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEEDS, st.floats(1e-4, 0.05), st.floats(1e-6, 1.0))
def test_what_cannot_be_told_is_not_called_a_proof(seed, noise, change):
    """An old server that passes leaves evidence that says so."""
    found, new, old = make_case(seed, change=change, noise=noise, share=1.0)
    try:
        evidence = proof(found, new, old)
    except StaleWeights:
        return
    assert not evidence.can_tell


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "still holds the snapshot before"), (0.5, "holds it only in part")]
)
def test_the_message_says_how_much_is_old(share, said):
    case = make_case(0, change=0.1, noise=1e-4, share=share)
    with pytest.raises(StaleWeights, match=rf"{said}.*{share:.0%} \(± \d%\).*update the server"):
        proof(*case)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_not_the_snapshot(bad):
    found, new, old = make_case(0, change=0.1, noise=0.0)
    found.logprobs[2][4] = bad
    with pytest.raises(StaleWeights, match="differ from the snapshot's"):
        proof(found, new, old)


def test_other_weights_are_seen_without_an_old_snapshot():
    found, new, _ = make_case(0, change=1.0, noise=0.5)
    with pytest.raises(StaleWeights, match=r"by 0\.\d+ nats a token \(at most 0\.15\)"):
        proof(found, new, None)
    assert proof(found, new, None, tolerance=1.0).staleness is None


def test_nothing_is_told_from_an_equal_snapshot_or_from_other_texts():
    found, new, old = make_case(0, change=0.0, noise=0.01)
    assert proof(found, new, old).staleness is None
    shorter = Probe(old.sequences[:3], old.logprobs[:3])
    assert proof(found, new, shorter).staleness is None
    found, new, old = make_case(0, change=0.5, noise=0.01)
    others = Probe(tuple(ids[::-1] for ids in old.sequences), old.logprobs)
    assert proof(found, new, others).staleness is None
    assert proof(found, new, old).staleness is not None


def test_evidence_reads_well():
    evidence = Evidence(0.0123, 0.01, 0.02, 7)
    assert evidence.can_tell
    assert str(evidence) == (
        "log-probs within 0.0123 nats/token of the snapshot's, staleness 0.01 ± 0.02, "
        "7 tensors equal by checksum"
    )
    assert not Evidence(0.01).can_tell
    assert not Evidence(0.01, 0.0, 0.3).can_tell


# Checksums.


@pytest.fixture
def snapshots(tmp_path):
    """Three snapshots: `body` changes each time, `fixed` never."""
    for i in range(3):
        (tmp_path / f"v{i}").mkdir()
        tensors = {"body": np.full(4, i, np.float32), "fixed": np.ones(2, np.float32)}
        save_file(tensors, tmp_path / f"v{i}" / "model.safetensors")
    return [tmp_path / f"v{i}" for i in range(3)]


NAMES = {"body": "", "fixed": "", "fused": ""}


def held(snapshot, **other):
    """What a server that holds `snapshot` says, with one tensor of its own making."""
    return tensor_digests(snapshot, NAMES) | {"fused": "0" * 64} | other


def test_checksums_count_what_agrees(snapshots):
    sums = Checksums()
    found = [sums.check("s", "it", held(snapshot), snapshot) for snapshot in snapshots]
    assert found == [(2, 0), (2, 1), (2, 1)], "both agree; one of them is new each time"
    assert sums.check("s", "it", {}, snapshots[0]) == (0, 0)


def test_checksums_of_another_layout_say_nothing(snapshots):
    sums = Checksums()
    for i, snapshot in enumerate(snapshots):
        assert sums.check("s", "it", held(snapshot, body=f"own{i}"), snapshot)[0] == 1


def test_a_checksum_of_the_old_snapshot_is_stale(snapshots):
    sums = Checksums()
    sums.check("s", "v0", held(snapshots[0]), snapshots[0])
    with pytest.raises(StaleWeights, match="by checksum body is that of the snapshot before"):
        sums.check("s", "v1", held(snapshots[0]), snapshots[1])


def test_a_checksum_that_no_longer_agrees_is_stale(snapshots):
    sums = Checksums()
    sums.check("s", "v0", held(snapshots[0]), snapshots[0])
    with pytest.raises(StaleWeights, match="body is not the one of the snapshot"):
        sums.check("s", "v1", held(snapshots[1], body="neither"), snapshots[1])


def test_answers_that_are_the_old_ones_to_the_last_digit_are_stale_however_small_the_change():
    found, new, old = make_case(7, change=2e-3, noise=0.05)
    assert not proof(found, new, old).can_tell
    with pytest.raises(StaleWeights, match="to the last digit"):
        judge("http://server", "snapshot v3", found, new, old, 0.15, before=found)
    judge("http://server", "snapshot v3", found, new, new, 0.15, before=found)  # nothing changed


def test_what_cannot_be_told_is_said():
    found, new, old = make_case(7, change=2e-3, noise=0.05)
    assert "too like the snapshot before" in str(proof(found, new, old))
    found, new, old = make_case(7, change=0.5, noise=0.05)
    assert "too like" not in str(proof(found, new, old))

"""Shards: what is written is read back, damage is told, a reader stays bounded."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.errors import RunError, StoreError
from npd.store.layout import RunLayout
from npd.store.shards import ShardReader, read_rollouts, read_scored, write_rollouts, write_scored
from npd.types import Rollout, Scored
from store_samples import assert_same_rollout, file_size_limit, make_rollout, make_scored, ref


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=6),
    has_logprobs=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_rollouts_come_back_exactly(tmp_path_factory, lengths, has_logprobs, seed):
    path = tmp_path_factory.getbasetemp() / "round.arrow"
    rollouts = [
        make_rollout(i, n, has_logprobs=has_logprobs, seed=seed) for i, n in enumerate(lengths)
    ]
    write_rollouts(path, rollouts)
    read = read_rollouts(path)
    assert len(read) == len(rollouts)
    for got, want in zip(read, rollouts, strict=True):
        assert_same_rollout(got, want)


def test_mixed_shard_keeps_which_samples_have_logprobs(tmp_path):
    rollouts = [make_rollout(i, has_logprobs=i % 2 == 0) for i in range(4)]
    write_rollouts(tmp_path / "a.arrow", rollouts)
    read = read_rollouts(tmp_path / "a.arrow")
    assert [r.logprobs is None for r in read] == [False, True, False, True]


@pytest.mark.parametrize("k", [10, 32, 64])
def test_a_scored_shard_takes_six_bytes_an_entry_and_sixteen_a_token(tmp_path, k):
    """8 of them are the rollout's own; prompts and a sample's numbers come on top."""
    rollouts = [make_rollout(i, 100 + i) for i in range(16)]
    whole = {"nll_teacher_alone": 1.0, "nll_student": 1.0, "nll_student_alone": 1.0}
    scored = [make_scored(i, 100 + i, k, **whole) for i in range(16)]
    write_rollouts(tmp_path / "r.arrow", rollouts)
    write_scored(tmp_path / "s.arrow", scored)
    size = (tmp_path / "s.arrow").stat().st_size
    tokens = sum(len(r.response_ids) for r in rollouts)
    per_sample = sum(4 * (len(r.prompt_ids) + len(r.header_ids)) + 256 for r in rollouts)
    assert size <= (6 * k + 16) * tokens + per_sample + 4096
    added = size - (tmp_path / "r.arrow").stat().st_size
    assert added < (6 * k + 16) * tokens


@pytest.mark.parametrize("k", [1, 4, 50])
def test_scored_come_back(tmp_path, k):
    written = [
        make_scored(0, 7, k),
        make_scored(5, 1, k, nll_teacher_alone=1.25, nll_student=0.1, overlap=0.5),
        make_scored(3, 30, k, nll_student_alone=1 / 3),
    ]
    write_scored(tmp_path / "s.arrow", written)
    for got, want in zip(read_scored(tmp_path / "s.arrow"), written, strict=True):
        assert_same_rollout(got.rollout, want.rollout)
        np.testing.assert_array_equal(got.topk_ids, want.topk_ids)
        np.testing.assert_array_equal(got.teacher_logprobs, want.teacher_logprobs)
        np.testing.assert_allclose(got.topk_logprobs, want.topk_logprobs, rtol=2e-3, atol=1e-3)
        assert got.topk_ids.dtype == np.int32
        assert got.topk_logprobs.dtype == got.teacher_logprobs.dtype == np.float32
        for name in (
            "nll_teacher",
            "nll_teacher_alone",
            "nll_student",
            "nll_student_alone",
            "overlap",
        ):
            assert getattr(got, name) == getattr(want, name)


def test_float16_storage_keeps_the_mass_of_the_support(tmp_path):
    """Without the stored shift the mass moves by some 1e-4, and may pass 1."""
    scored = make_scored(0, length=400, k=50)
    write_scored(tmp_path / "s.arrow", [scored])
    read = read_scored(tmp_path / "s.arrow")[0]
    mass = np.exp(read.topk_logprobs.astype(np.float64)).sum(axis=1)
    want = np.exp(scored.topk_logprobs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass, want, atol=2e-6)
    naive = np.exp(scored.topk_logprobs.astype(np.float16).astype(np.float64)).sum(axis=1)
    assert np.abs(naive - want).max() > 2e-5


def test_extreme_logprobs_survive(tmp_path):
    """Zero, impossible and absurdly small probabilities; and a support of nothing but those."""
    rows = [[0.0, -np.inf], [-1e-9, -1e6], [-np.inf, -np.inf]]
    scored = Scored(
        rollout=make_rollout(0, 3),
        topk_ids=np.zeros((3, 2), np.int32),
        topk_logprobs=np.array(rows, np.float32),
        teacher_logprobs=np.zeros(3, np.float32),
        nll_teacher=0.0,
    )
    write_scored(tmp_path / "s.arrow", [scored])
    got = read_scored(tmp_path / "s.arrow")[0].topk_logprobs
    assert not np.isnan(got).any()
    np.testing.assert_allclose(np.exp(got), [[1, 0], [1, 0], [0, 0]], atol=1e-7)


def test_support_of_no_ids_and_shard_of_no_samples(tmp_path):
    write_scored(tmp_path / "s.arrow", [make_scored(0, 4, k=0)])
    assert read_scored(tmp_path / "s.arrow")[0].topk_ids.shape == (4, 0)
    write_scored(tmp_path / "none.arrow", [])
    assert read_scored(tmp_path / "none.arrow") == []


def test_any_arrow_reader_opens_a_shard(tmp_path):
    write_rollouts(tmp_path / "a.arrow", [make_rollout(i) for i in range(3)])
    with pa.ipc.open_stream((tmp_path / "a.arrow").read_bytes()) as stream:
        assert stream.read_all()["sample_id"].to_pylist() == [0, 1, 2]


def test_missing_file_is_named_with_a_remedy(tmp_path):
    with pytest.raises(StoreError, match=r"gone\.arrow is missing.*resume"):
        read_rollouts(tmp_path / "gone.arrow")


def test_other_kind_is_refused(tmp_path):
    write_rollouts(tmp_path / "a.arrow", [make_rollout(0)])
    with pytest.raises(StoreError, match=r"a\.arrow has no scored"):
        read_scored(tmp_path / "a.arrow")


@pytest.mark.parametrize("k", [0, 3])
def test_every_truncation_is_told(tmp_path, k):
    path = tmp_path / "a.arrow"
    write_scored(path, [make_scored(i, 2, k) for i in range(2)])
    whole = path.read_bytes()
    for size in {0, 1, 7, 8, 9, len(whole) // 2, *range(len(whole) - 20, len(whole))}:
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"a\.arrow .*delete it and resume"):
            read_scored(path)


def test_every_flipped_bit_is_told(tmp_path):
    path = tmp_path / "a.arrow"
    write_rollouts(path, [make_rollout(0)])
    whole = path.read_bytes()
    positions = [*range(0, len(whole), 37), *range(len(whole) - 8, len(whole))]
    for place in positions:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=r"a\.arrow .*delete it and resume"):
            read_rollouts(path)


@pytest.mark.parametrize(
    "broken",
    [
        {"response_ids": np.empty(0, np.int32)},
        {"logprobs": np.zeros(3, np.float32)},
    ],
)
def test_a_rollout_that_contradicts_itself_is_our_error(tmp_path, broken):
    good = make_rollout(0)
    fields = {name: getattr(good, name) for name in Rollout.__slots__} | broken
    with pytest.raises(AssertionError):
        write_rollouts(tmp_path / "a.arrow", [Rollout(**fields)])
    with pytest.raises(AssertionError, match="twice"):
        write_rollouts(tmp_path / "a.arrow", [good, good])
    assert list(tmp_path.iterdir()) == []


def test_refused_write_is_a_run_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.arrow"
    write_rollouts(path, [make_rollout(1)])
    with (
        file_size_limit(4096),
        pytest.raises(RunError, match=r"no space left while writing .*a\.arrow.*resume"),
    ):
        write_rollouts(path, [make_rollout(0, length=10_000)])
    assert [r.sample_id for r in read_rollouts(path)] == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_reader_finds_samples_and_stays_bounded(tmp_path):
    layout = RunLayout(tmp_path)
    for shard in range(6):
        samples = [make_scored(10 * shard + i, 3 + i) for i in range(4)]
        write_scored(layout.scored(shard), samples)
    reader = ShardReader(layout.scored, "scored", capacity=2)
    for sample_id in (0, 51, 13, 2, 50, 33, 0):
        got = reader.read(ref(sample_id, sample_id // 10))
        assert got.rollout.sample_id == sample_id
        assert_same_rollout(reader.rollout(ref(sample_id, sample_id // 10)), got.rollout)
        assert 1 <= mapped(tmp_path) <= 2
    reader.close()
    gc.collect()
    assert mapped(tmp_path) == 0
    assert got.topk_logprobs.sum() < 0  # what was handed out outlives the map
    assert reader.read(ref(1)).rollout.sample_id == 1
    reader.close()


def test_reader_of_rollouts(tmp_path):
    layout = RunLayout(tmp_path)
    write_rollouts(layout.rollouts(0), [make_rollout(8), make_rollout(4)])
    reader = ShardReader(layout.rollouts, "rollouts")
    assert_same_rollout(reader.read(ref(4)), make_rollout(4))
    with pytest.raises(AssertionError, match="no scores"):
        reader.scored(ref(4))
    with pytest.raises(StoreError, match=r"000000\.arrow does not contain sample 5"):
        reader.rollout(ref(5))
    with pytest.raises(StoreError, match=r"000001\.arrow is missing"):
        reader.rollout(ref(5, 1))


def test_reader_verifies_a_file_that_took_the_place_of_another(tmp_path):
    layout = RunLayout(tmp_path)
    for shard in (0, 1):
        write_rollouts(layout.rollouts(shard), [make_rollout(shard)])
    reader = ShardReader(layout.rollouts, "rollouts", capacity=1)
    reader.read(ref(0, 0))
    reader.read(ref(1, 1))
    content = bytearray(layout.rollouts(0).read_bytes())
    content[len(content) // 2] ^= 1
    layout.rollouts(0).unlink()
    layout.rollouts(0).write_bytes(content)
    with pytest.raises(StoreError, match="checksum"):
        reader.read(ref(0, 0))


def mapped(directory):
    """How many files under `directory` this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in maps if str(directory) in line})


def test_shards_are_written_and_read_without_pandas(tmp_path):
    """Where it is installed, it would be imported by every process of a run."""
    code = (
        "import sys; from pathlib import Path; from npd.store import shards; "
        "from store_samples import make_scored; path = Path(sys.argv[1]); "
        "shards.write_scored(path, [make_scored(1)]); assert len(shards.read_scored(path)) == 1; "
        "sys.exit('pandas' in sys.modules)"
    )
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", code, str(tmp_path / "a.arrow")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})

"""A trainer of several ranks (real processes, gloo) computes what one rank computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conftest import save_model
from npd.config import LossConfig
from npd.types import Row, Segment, Step
from rank_bench import BenchFactory, on_ranks
from test_trainer import (
    FP32,
    make_rollouts,
    make_trainer,
    own,
    refs_of,
    score,
    student,  # noqa: F401
    teacher,  # noqa: F401
    weights_of,
)

LENGTHS = ((3, 5), (1, 1), (7, 12), (2, 9), (4, 3), (1, 6), (5, 5))
# Rows of each step, as indices of samples: more than ranks, fewer, one, unequal costs.
STEPS = (
    ((0,), (1, 2), (3,), (4,), (5, 6)),
    ((2,), (0, 1)),
    ((3, 4),),
    ((0, 1, 2, 3, 4, 5, 6), (2,), (6,)),
)


def dealt(rows, size):
    """Rows to ranks in turn: a rank may be left with none."""
    return tuple(tuple(rows[rank::size]) for rank in range(size))


def segment_on(size, samples, steps=STEPS, first=1):
    refs = refs_of(samples)
    made = [[Row(tuple(refs[i] for i in row)) for row in rows] for rows in steps]
    return Segment(
        0,
        0,
        tuple(
            Step(first + i, 1e-3 / (first + i), dealt(rows, size)) for i, rows in enumerate(made)
        ),
    )


def factory_of(size, directory, samples, config=FP32, loss=LossConfig(target="tail")):
    by_id = tuple(zip([ref.sample_id for ref in refs_of(samples)], samples, strict=True))
    return BenchFactory(size, str(directory), config, loss, by_id)


@pytest.fixture(scope="module")
def samples(teacher):  # noqa: F811
    """Scored samples; half of them written by the snapshot whose drift is measured."""
    rollouts = [own(teacher, r) for r in make_rollouts(lengths=LENGTHS)]
    scored = [score(teacher, r) for r in rollouts]
    return [s if i % 2 else replace(s, rollout=replace(s.rollout, version=-1))
            for i, s in enumerate(scored)]  # fmt: skip


def trained(size, directory, samples, folder, **kwargs):
    """Reports (of every rank) and weights after the segment, on `size` ranks."""
    segment = segment_on(size, samples)
    if size == 1:
        alone = make_trainer(directory, samples, loss=LossConfig(target="tail"), **kwargs)
        report = alone.train(segment)
        return [report], {name: w.numpy() for name, w in weights_of(alone).items()}

    async def story(group):
        reports = (await group.call("train", segment)).value
        return reports, (await group.call("weights")).value

    return on_ranks(folder, factory_of(size, directory, samples, **kwargs), story)


def numbers(step):
    return {name: getattr(step, name) for name in step.__slots__ if name != "seconds"}


def check_alike(one, other):
    for a, b in zip(one.steps, other.steps, strict=True):
        for name, value in numbers(a).items():
            assert numbers(b)[name] == pytest.approx(value, rel=2e-5, abs=1e-6), (a.step, name)


def check_same_weights(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=3e-6, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_take_the_steps_of_one(size, tied, samples, tmp_path):
    directory = save_model(tmp_path / "student", seed=0, tied=tied)
    (alone,), expected = trained(1, directory, samples, tmp_path)
    reports, weights = trained(size, directory, samples, tmp_path)
    check_alike(alone, reports[0])
    check_same_weights(expected, weights)
    for report in reports[1:]:
        assert [numbers(s) for s in report.steps] == [numbers(s) for s in reports[0].steps]
        assert report.peak_memory_mib == reports[0].peak_memory_mib

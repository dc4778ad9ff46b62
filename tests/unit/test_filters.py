"""Each filter against an independent brute force, a case by hand, and its edges."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.config import FilterConfig
from npd.filters import (
    FILTERS,
    DeltaIfd,
    bounds,
    build_filter,
    delta_ifd,
    highest_nll,
    ifd,
    prefilter,
    repeat_share,
)
from npd.types import FinishReason, SampleStats

CONTROLS = ("random", "teacher_nll", "overlap", "length")
PAPER = FilterConfig(tolerance=0.0, min_nll=0.0)
NLLS = ("nll_teacher", "nll_teacher_alone", "nll_student", "nll_student_alone")


def stats(sample_id=0, **changes):
    base = SampleStats(
        sample_id=sample_id,
        prompt_index=sample_id,
        version=1,
        prompt_tokens=10,
        response_tokens=20,
        finish=FinishReason.STOP,
        repeat=0.0,
        nll_teacher=1.0,
        nll_teacher_alone=2.0,
        nll_student=0.9,
        nll_student_alone=3.0,
        overlap=0.5,
    )
    return base._replace(**changes)


def with_delta(delta, sample_id=0):
    """A sample of exactly this Δ-IFD: the student's IFD is 1, the teacher's 1 + delta."""
    return stats(
        sample_id,
        nll_teacher=1.0 + delta,
        nll_teacher_alone=1.0,
        nll_student=1.0,
        nll_student_alone=1.0,
    )


def random_batch(rng, count, first_id=0, missing=0.0):
    """Samples of random scalars; each score is missing (None or NaN) with that probability."""

    def score(low, high):
        gap = rng.choice([None, math.nan])
        return gap if rng.random() < missing else rng.uniform(low, high)

    return [
        stats(
            first_id + i,
            response_tokens=rng.randint(1, 40),
            overlap=score(0.0, 1.0),
            **{name: score(0.01, 3.0) for name in NLLS},
        )
        for i in range(count)
    ]


def kept_ids(verdicts, batch):
    assert len(verdicts) == len(batch)
    return {
        sample.sample_id for verdict, sample in zip(verdicts, batch, strict=True) if verdict.keep
    }


def is_number(value):
    return value is not None and not math.isnan(value)


# --- before scoring -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"finish": FinishReason.LENGTH}, "truncated"),
        ({"finish": FinishReason.LENGTH, "response_tokens": 1, "repeat": 1.0}, "truncated"),
        ({"response_tokens": 3, "repeat": 1.0}, "short"),
        ({"response_tokens": 4}, ""),
        ({"repeat": 0.5}, ""),
        ({"repeat": 0.51}, "repeating"),
    ],
)
def test_prefilter(changes, reason):
    sample = stats(**changes, nll_teacher=None, nll_student=None)
    verdict = prefilter(sample, FilterConfig(min_response_tokens=4, max_repeat=0.5))
    assert (verdict.keep, verdict.reason) == (reason == "", reason)


def test_truncated_samples_may_be_kept():
    sample = stats(finish=FinishReason.LENGTH)
    assert prefilter(sample, FilterConfig(drop_truncated=False)).keep


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([7] * 103, 99 / 100),
    ],
)
def test_repeat_share_by_hand(ids, share):
    assert repeat_share(np.array(ids, dtype=np.int32)) == pytest.approx(share)
    assert repeat_share(ids) == pytest.approx(share)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_repeat_share_counts_grams_seen_before(ids):
    grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
    seen = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeat_share(ids) == pytest.approx(seen / len(grams) if len(ids) >= 5 else 0.0)


# --- IFD ----------------------------------------------------------------------------------------


def test_ifd_by_hand():
    assert ifd(1.0, 2.0) == 0.5
    assert ifd(1.0, 2.0, "ppl") == pytest.approx(math.exp(1.0) / math.exp(2.0))
    sample = stats(nll_teacher=1.0, nll_teacher_alone=2.0, nll_student=0.9, nll_student_alone=3.0)
    assert delta_ifd(sample) == pytest.approx(0.5 - 0.3)
    assert delta_ifd(sample, "ppl") == pytest.approx(math.exp(-1.0) - math.exp(-2.1))


def test_ifd_stays_finite_at_the_edges():
    assert ifd(0.5, 0.0) == pytest.approx(500.0)
    assert ifd(0.0, 0.0) == 0.0
    assert math.isfinite(ifd(1e6, 0.0, "ppl"))
    for nlls in ((None, 1.0), (1.0, None), (math.nan, 1.0), (1.0, math.inf)):
        assert math.isnan(ifd(*nlls))
        assert math.isnan(ifd(*nlls, "ppl"))


@pytest.mark.parametrize("name", NLLS)
@pytest.mark.parametrize("gap", [None, math.nan])
def test_a_missing_score_is_unscored(name, gap):
    batch = [stats(0), stats(1, **{name: gap}), stats(2)]
    verdicts = DeltaIfd(PAPER).judge(batch, [])
    assert [verdict.reason for verdict in verdicts] == ["", "unscored", ""]
    assert [verdict.keep for verdict in verdicts] == [True, False, True]


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (-0.25, "degenerate"),
        (math.nextafter(1.0, 0.0) - 1.0, "degenerate"),
        (0.0, ""),
        (0.25, ""),
        (0.75, ""),
        (math.nextafter(1.75, 2.0) - 1.0, "disconnect"),
        (3.0, "disconnect"),
    ],
)
def test_bounds_are_inclusive(delta, reason):
    config = FilterConfig(low=0.0, high=0.75, tolerance=0.0, min_nll=0.0)
    (verdict,) = DeltaIfd(config).judge([with_delta(delta)], [])
    assert (verdict.keep, verdict.reason) == (reason == "", reason)


def test_tolerance_is_slack_below_low_only():
    config = FilterConfig(low=0.0, high=0.75, tolerance=0.125, min_nll=0.0)
    batch = [with_delta(delta, i) for i, delta in enumerate([-0.13, -0.125, 0.75, 0.76])]
    assert kept_ids(DeltaIfd(config).judge(batch, []), batch) == {1, 2}
    assert bounds(config, batch) == (-0.125, 0.75)


def test_samples_both_models_are_sure_of_are_kept_unasked():
    sure = {"nll_teacher": 0.04, "nll_teacher_alone": 0.02, "nll_student": 0.001}
    batch = [
        stats(0, **sure, nll_student_alone=1.0),
        stats(1, **{**sure, "nll_teacher": 0.06}, nll_student_alone=1.0),
        stats(
            2, **{**sure, "nll_student": 0.05, "nll_teacher_alone": 10.0}, nll_student_alone=0.05
        ),
        stats(3, **sure, nll_student_alone=None),
    ]
    reasons = [v.reason for v in DeltaIfd(FilterConfig(min_nll=0.05)).judge(batch, [])]
    assert reasons == ["", "disconnect", "degenerate", "unscored"]
    reasons = [v.reason for v in DeltaIfd(PAPER).judge(batch, [])]
    assert reasons == ["disconnect", "disconnect", "degenerate", "unscored"]


def test_correct_low_entropy_rollouts_survive_the_default_and_not_the_paper():
    """Both models sure, delta a rounding error below 0: noise decides under the paper's bounds."""
    sample = stats(
        nll_teacher=0.002, nll_teacher_alone=2.0, nll_student=0.004, nll_student_alone=2.0
    )
    assert delta_ifd(sample) == pytest.approx(-0.001)
    assert DeltaIfd(FilterConfig()).judge([sample], [])[0].keep
    assert DeltaIfd(PAPER).judge([sample], [])[0].reason == "degenerate"


# --- against brute force ------------------------------------------------------------------------


def brute_delta(sample, ratio):
    nlls = [getattr(sample, name) for name in NLLS]
    if not all(map(is_number, nlls)):
        return None
    teacher, teacher_alone, student, student_alone = nlls
    if ratio == "ppl":
        return math.exp(teacher) / math.exp(teacher_alone) - math.exp(student) / math.exp(
            student_alone
        )
    return teacher / teacher_alone - student / student_alone


def brute_quantile(values, share):
    values = sorted(values)
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def brute_delta_ifd(config, batch, history):
    def is_sure(sample):
        pair = (sample.nll_teacher, sample.nll_student)
        return all(is_number(nll) and nll < config.min_nll for nll in pair)

    low, high = config.low - config.tolerance, config.high
    if config.bounds == "quantile":
        recent = history[max(0, len(history) - config.history) :] + batch
        deltas = [brute_delta(sample, config.ratio) for sample in recent if not is_sure(sample)]
        known = [delta for delta in deltas if delta is not None]
        low, high = -math.inf, math.inf
        if known:
            low = brute_quantile(known, config.low_quantile) - 1e-12
            high = brute_quantile(known, config.high_quantile) + 1e-12
    kept = set()
    for sample in batch:
        delta = brute_delta(sample, config.ratio)
        if delta is not None and (is_sure(sample) or low <= delta <= high):
            kept.add(sample.sample_id)
    return kept


@pytest.mark.parametrize("ratio", ["nll", "ppl"])
@pytest.mark.parametrize("rule", ["fixed", "quantile"])
@pytest.mark.parametrize("missing", [0.0, 0.15])
@pytest.mark.parametrize("min_nll", [0.0, 1.0])
def test_delta_ifd_is_brute_force(ratio, rule, missing, min_nll):
    config = FilterConfig(
        ratio=ratio, bounds=rule, history=30, min_nll=min_nll, low_quantile=0.1, high_quantile=0.8
    )
    rng = random.Random(7)
    for size in (1, 2, 33):
        history = random_batch(rng, 50, first_id=1000, missing=missing)
        batch = random_batch(rng, size, missing=missing)
        verdicts = DeltaIfd(config).judge(batch, history)
        assert kept_ids(verdicts, batch) == brute_delta_ifd(config, batch, history)
        assert all(verdict.reason == "" for verdict in verdicts if verdict.keep)
        names = {"degenerate", "disconnect", "unscored"}
        assert {verdict.reason for verdict in verdicts if not verdict.keep} <= names


def test_quantile_bounds_cut_the_stated_shares():
    rng = random.Random(1)
    batch = [with_delta(rng.uniform(-0.5, 5.0), i) for i in range(101)]
    config = FilterConfig(bounds="quantile", low_quantile=0.05, high_quantile=0.9, min_nll=0.0)
    reasons = [verdict.reason for verdict in DeltaIfd(config).judge(batch, [])]
    assert (reasons.count("degenerate"), reasons.count("disconnect")) == (5, 10)


def test_quantiles_follow_the_recent_history_only():
    config = FilterConfig(
        bounds="quantile", low_quantile=0.0, high_quantile=1.0, history=2, min_nll=0.0
    )
    history = [with_delta(delta, 10 + i) for i, delta in enumerate([-9.0, 99.0, 1.0, 2.0])]
    pool = [*history[-2:], with_delta(1.5)]
    assert bounds(config, pool) == pytest.approx((1.0, 2.0))
    narrow = config.model_copy(update={"low_quantile": 0.5, "high_quantile": 0.5})
    assert DeltaIfd(narrow).judge([with_delta(1.5)], history)[0].keep


def test_nothing_known_bounds_nothing():
    config = FilterConfig(bounds="quantile")
    assert bounds(config, [stats(nll_student=None)]) == (-math.inf, math.inf)
    assert bounds(config, []) == (-math.inf, math.inf)


# --- outliers -----------------------------------------------------------------------------------


def with_nlls(*nlls, first_id=0):
    return [stats(first_id + i, nll_student=nll) for i, nll in enumerate(nlls)]


def test_an_outlier_by_hand():
    config = FilterConfig(name="outlier", deviations=2.0, usual_nll=0.0)
    # Median 3, distances to it 2, 1, 0, 1 and 6: their median is 1.
    batch = with_nlls(1.0, 2.0, 3.0, 4.0, 9.0)
    assert highest_nll(config, batch) == 5.0
    reasons = [verdict.reason for verdict in build_filter(config, 0).judge(batch, [])]
    assert reasons == ["", "", "", "", "outlier"]
    assert highest_nll(config.model_copy(update={"usual_nll": 9.0}), batch) == 9.0


def test_an_outlier_is_judged_by_the_student_alone():
    config = FilterConfig(name="outlier")
    others = dict.fromkeys(("nll_teacher", "nll_teacher_alone", "nll_student_alone"))
    batch = [stats(i, **others) for i in range(3)] + [stats(3, nll_student=9.0)]
    assert kept_ids(build_filter(config, 0).judge(batch, []), batch) == {0, 1, 2}


def test_what_is_usual_comes_from_the_recent_history_too():
    config = FilterConfig(name="outlier", deviations=1.0, usual_nll=0.0, history=3)
    history = with_nlls(100.0, 100.0, 1.0, 1.0, 1.5, first_id=10)
    batch = with_nlls(1.5, 3.0)
    # Of 1, 1, 1.5, 1.5 and 3: median 1.5, deviation 0.5.
    assert kept_ids(build_filter(config, 0).judge(batch, history), batch) == {0}
    assert kept_ids(build_filter(config, 0).judge(batch, []), batch) == {0, 1}


@pytest.mark.parametrize("gap", [None, math.nan])
def test_a_sample_without_the_student_s_nll_is_unscored(gap):
    batch = with_nlls(1.0, gap, 1.0)
    verdicts = build_filter(FilterConfig(name="outlier"), 0).judge(batch, [])
    assert [verdict.reason for verdict in verdicts] == ["", "unscored", ""]
    assert highest_nll(FilterConfig(), with_nlls(gap)) == math.inf


def brute_value(name, sample, pool):
    if name == "teacher_nll":
        return sample.nll_teacher
    if name == "overlap":
        return None if sample.overlap is None else 1.0 - sample.overlap
    return abs(sample.response_tokens - float(np.median([s.response_tokens for s in pool])))


def brute_control(config, batch, history, count):
    """Drop the worst one at a time until `count` are left."""
    pool = history[max(0, len(history) - config.history) :] + batch
    left = {s.sample_id: brute_value(config.name, s, pool) for s in batch}
    left = {sample_id: value for sample_id, value in left.items() if is_number(value)}
    while len(left) > count:
        del left[max(left, key=lambda sample_id: (left[sample_id], sample_id))]
    return set(left)


@pytest.mark.parametrize("name", ["teacher_nll", "overlap", "length"])
@pytest.mark.parametrize("keep", [None, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_controls_are_brute_force(name, keep, missing):
    config = FilterConfig(name=name, keep=keep, history=10)
    rng = random.Random(3)
    for size in (1, 10, 31):
        history = random_batch(rng, 20, first_id=1000, missing=missing)
        batch = random_batch(rng, size, missing=missing)
        exact = len(brute_delta_ifd(config, batch, history)) if keep is None else keep * size
        counts = {math.floor(exact), math.ceil(exact)}
        kept = kept_ids(build_filter(config, 0).judge(batch, history), batch)
        assert kept in [brute_control(config, batch, history, count) for count in counts]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_keeps_as_many_as_delta_ifd(name):
    rng = random.Random(5)
    batch = random_batch(rng, 40)
    fair = kept_ids(DeltaIfd(FilterConfig()).judge(batch, []), batch)
    kept = kept_ids(build_filter(FilterConfig(name=name), 0).judge(batch, []), batch)
    assert 0 < len(fair) < len(batch)
    assert len(kept) == len(fair)
    assert kept != fair


def kept_of_shards(keep, size, num_shards, seed=0, name="random"):
    """How many of `num_shards` consecutive shards of `size` a control keeps in all."""
    judge = build_filter(FilterConfig(name=name, keep=keep), seed).judge
    shards = ([stats(size * s + i) for i in range(size)] for s in range(num_shards))
    return sum(verdict.keep for shard in shards for verdict in judge(shard, []))


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.4, 0.6, 1.0])
def test_the_share_kept_is_right_over_small_shards(name, size, keep):
    num_shards = 6000 // size
    share = kept_of_shards(keep, size, num_shards, name=name) / (size * num_shards)
    assert share == pytest.approx(keep, abs=0.02 if 0.0 < keep < 1.0 else 0.0)


def test_how_a_share_rounds_belongs_to_the_seed_and_the_batch():
    totals = [kept_of_shards(0.5, 1, 400, seed) for seed in (0, 0, 1)]
    assert totals[0] == totals[1]
    judge = build_filter(FilterConfig(name="length", keep=0.5), 0).judge
    counts = {sum(v.keep for v in judge([stats(i), stats(i + 1), stats(9)], [])) for i in range(8)}
    assert counts == {1, 2}
    batch = [stats(i, response_tokens=i + 1) for i in (4, 2, 8)]
    assert kept_ids(judge(batch, []), batch) == kept_ids(judge(batch[::-1], []), batch[::-1])


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_says_its_name(name):
    batch = random_batch(random.Random(0), 10)
    verdicts = build_filter(FilterConfig(name=name, keep=0.5), 0).judge(batch, [])
    assert sorted(verdict.reason for verdict in verdicts) == [""] * 5 + [name] * 5


def test_random_belongs_to_seed_and_sample_id():
    batch = random_batch(random.Random(0), 200)
    config = FilterConfig(name="random", keep=0.5)
    kept = kept_ids(build_filter(config, 1).judge(batch, []), batch)
    assert kept == kept_ids(build_filter(config, 1).judge(batch[::-1], []), batch[::-1])
    other = kept_ids(build_filter(config, 2).judge(batch, []), batch)
    assert 25 < len(kept & other) < 75
    half = [sample for sample in batch if sample.sample_id in kept]
    assert (
        kept_ids(build_filter(FilterConfig(name="random", keep=1.0), 1).judge(half, []), half)
        == kept
    )


def test_random_takes_every_sample_equally_often():
    batch = [stats(i) for i in range(20)]
    config = FilterConfig(name="random", keep=0.25)
    counts = np.zeros(20)
    for seed in range(400):
        for sample_id in kept_ids(build_filter(config, seed).judge(batch, []), batch):
            counts[sample_id] += 1
    assert counts.sum() == 5 * 400
    assert abs(counts / 400 - 0.25).max() < 0.1


def test_controls_break_ties_by_sample_id():
    batch = [stats(i) for i in (3, 1, 2, 0)]
    for name in ("teacher_nll", "overlap", "length"):
        config = FilterConfig(name=name, keep=0.5)
        assert kept_ids(build_filter(config, 0).judge(batch, []), batch) == {0, 1}


@pytest.mark.parametrize("name", sorted(FILTERS))
@pytest.mark.parametrize("rule", ["fixed", "quantile"])
def test_every_filter_judges_an_empty_batch(name, rule):
    judge = build_filter(FilterConfig(name=name, bounds=rule), 0).judge
    assert judge([], []) == []
    assert judge([], [stats(1)]) == []


def test_none_keeps_all_and_every_name_of_the_config_is_registered():
    batch = random_batch(random.Random(0), 9, missing=0.5)
    assert all(v.keep for v in build_filter(FilterConfig(name="none"), 0).judge(batch, []))
    assert set(FILTERS) == set(FilterConfig.model_fields["name"].annotation.__args__)

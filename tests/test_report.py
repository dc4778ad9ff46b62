"""The report: well-formed, self-contained, escaped, and saying the numbers it was given."""

import random
import re
from dataclasses import replace
from statistics import stdev
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.observe.report import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
    build_report,
)
from npd.observe.report.bars import bin_edges, count
from npd.observe.report.charts import moving_mean, thin
from npd.observe.report.gantt import merge
from npd.observe.report.html import Html, el
from npd.observe.report.noise import change_error, share_error
from npd.observe.report.scales import duration, nice_bounds, number, tick_labels, ticks, time_ticks
from npd.observe.trace import Span
from npd.types import FinishReason, Outcome, SampleStats

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x.png onerror=1> \x00\x1b\ud800'
START = 1_764_000_000.0


def fake_steps(count, rng):
    for step in range(1, count + 1):
        yield {
            "step": step,
            "loss": 1.0 / step + rng.random() * 0.1,
            "ce": 2.0 / step + 0.5,
            "kd": None if step == 1 else 0.9 / step,
            "drift": None if step % 7 == 0 else 0.002 * (step % 60),
            "teacher_mass": 0.95,
            "agreement": 0.6,
        }


def fake_samples(count, rng):
    outcomes = [
        (Outcome.TRAINED_OUT, ""),
        (Outcome.REJECTED, "degenerate"),
        (Outcome.REJECTED, "disconnect"),
        (Outcome.REJECTED, "truncated"),
        (Outcome.STALE, "max_lag"),
        (None, ""),
    ]
    for index in range(count):
        stats = SampleStats(index, index, 0, 20, 30, FinishReason.STOP, 0.0)
        outcome, reason = outcomes[index % len(outcomes)]
        delta = None if reason == "truncated" else rng.gauss(0.2, 0.3)
        lag = index % 3 if outcome is Outcome.TRAINED_OUT else None
        yield ReportSample(stats, outcome, reason, lag, delta)


@pytest.fixture(scope="module")
def data():
    rng = random.Random(0)
    return ReportData(
        title=f"run {EVIL}",
        config={"student": "small", "teacher": EVIL, "train": {"lr": 1e-05, "betas": [0.9, 0.95]}},
        started=START,
        ended=START + 754.0,
        steps=list(fake_steps(120, rng)),
        evals=[
            {"step": 0, "kl": 1.25, "agreement": 0.5, "exact_match": 0.1, "num_prompts": 100},
            {"step": 120, "kl": 0.75, "agreement": 0.625, "exact_match": 0.3, "num_prompts": 100},
        ],
        samples=list(fake_samples(600, rng)),
        bounds=FilterBounds(0.0, 0.8, 0.05),
        conservation={
            "asked": 600,
            "trained_out": 100,
            "rejected": 300,
            "stale": 100,
            "failed": 0,
            "live": 100,
        },
        reasons={
            (Outcome.TRAINED_OUT, ""): 100,
            (Outcome.REJECTED, EVIL): 200,
            (Outcome.REJECTED, ""): 100,
            (Outcome.STALE, "max_lag"): 100,
        },
        spans=[
            Span("generator", "generate", START, START + 400.0, {"shard": EVIL}),
            Span("trainer", "train", START + 300.0, START + 700.0),
            Span("trainer", "publish", START + 700.0, START + 754.0),
        ],
        snapshots=[(0, 0), (1, 60)],
        throughput={"generate": StageRate(12_345, 600, 400.0), "train": StageRate(98_700, 60, 400)},
        examples=[
            Example(EVIL, EVIL, Outcome.REJECTED, EVIL, 1.21, 3.4, 0.5),
            Example("What is 2 + 2?", "4", Outcome.TRAINED_OUT),
        ],
        heldout_texts=[HeldoutText(EVIL, EVIL, EVIL, EVIL)],
        environment={"torch": "2.13.0+cpu", "machine": EVIL},
        origins={"train.lr": "--set"},
    )


@pytest.fixture(scope="module")
def page(data):
    return build_report(data)


def tree_of(page):
    return ElementTree.fromstring(page.encode("utf-8"))


def words(page):
    return " ".join(" ".join(tree_of(page).itertext()).split())


EMPTY = ReportData("empty", {}, 0.0, 0.0)


def variants(data):
    one_step = {"steps": data.steps[:1], "evals": data.evals[:1], "spans": data.spans[:1]}
    flat = [{"step": s, "loss": 0.0, "ce": 0.0, "drift": 0.0} for s in range(3)]
    same = [replace(s, delta=0.25) for s in data.samples]
    broken = [{"step": s, "loss": float("nan")} for s in range(3)]
    return [
        EMPTY,
        replace(data, evals=()),
        replace(data, **one_step),
        replace(data, steps=flat, samples=same, bounds=None),
        replace(data, steps=broken, spans=(), throughput={}, conservation={}),
        replace(data, samples=[replace(same[0], delta=float("inf"))], snapshots=(), origins={}),
        replace(data, spans=[Span("w", "train", START, START)], ended=START),
    ]


def test_page_is_well_formed_with_unique_anchors(page):
    tree = tree_of(page)
    anchors = [e.get("id") for e in tree.iter() if e.get("id")]
    links = {e.get("href") for e in tree.iter() if e.get("href")}
    assert page.startswith("<!DOCTYPE html>")
    assert len(anchors) == len(set(anchors))
    assert links == {f"#{anchor}" for anchor in anchors}


def test_page_loads_nothing(page):
    tree = tree_of(page)
    tags = {e.tag.rpartition("}")[2] for e in tree.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert all(e.get("src") is None and e.get("srcset") is None for e in tree.iter())
    assert not any(name.startswith("on") for e in tree.iter() for name in e.attrib)
    style = next(e for e in tree.iter() if e.tag == "style").text
    assert not re.search(r"url\(|@import|http", style)


def test_evil_text_stays_text(page):
    assert "<script" not in page
    assert "<img" not in page
    assert "\x00" not in page
    assert '<script>alert("x")</script>' in words(page)


def test_no_drawing_holds_a_number_that_is_none(data):
    for variant in variants(data):
        tree = tree_of(build_report(variant))
        shapes = [value for e in tree.iter() if e.tag != "title" for value in e.attrib.values()]
        assert not any(re.search(r"\b(nan|inf)\b", value) for value in shapes)


def test_missing_data_is_said_not_drawn(data):
    text = words(build_report(EMPTY))
    for sentence in (
        "No held-out evaluation was run",
        "No optimiser step was taken",
        "No drift was measured",
        "No sample has a Δ-IFD",
        "No trace was kept",
        "No sample texts",
        "0 optimiser steps in 0 s",
    ):
        assert sentence in text
    assert "<svg" not in build_report(EMPTY)
    assert "set eval.every_steps" in words(build_report(replace(data, evals=())))


def test_headline_says_before_after_and_change(page):
    text = words(page)
    assert "fell 40 %: from 1.25 to 0.750 nats per token" in text
    assert "1.250 0.7500 −0.500 −40 %" in text
    assert "50.0 % 62.5 % +12.5 points +25 %" in text
    assert "10.0 % ± 3.0 (SE) 30.0 % ± 4.6 (SE) +20.0 points +200 %" in text
    assert "12 min 34 s" in text


def test_worse_is_shown_as_worse(data):
    worse = replace(data, evals=[dict(data.evals[1], step=0), dict(data.evals[0], step=120)])
    tree = tree_of(build_report(worse))
    cells = [e for e in tree.iter("td") if "bad" in (e.get("class") or "").split()]
    assert len(cells) == 3
    assert "rose 67 %" in words(build_report(worse))


def test_time_to_quality_needs_times(data):
    kls = [(0, 1.0), (40, 0.55), (80, 0.5), (120, 0.52)]
    evals = [{"step": s, "kl": kl, "time": START + s} for s, kl in kls]
    assert "after 40 s (step 40)" in words(build_report(replace(data, evals=evals)))
    assert "Nine tenths" not in words(build_report(data))


def test_run_figures_match_the_input(page):
    text = words(page)
    assert "100 of 600 asked, 300 rejected" in text
    assert f"{3600 * 100 / 754:,.0f} samples/h" in text
    assert "247 tokens/s" in text
    assert "12,345 tokens in 600 samples" in text
    assert "25 % of the 6 min 40 s of training" in text
    assert "generator: 47 %" in text
    assert "trainer: 40 %" in text


def test_conservation_is_checked(data, page):
    assert "600 asked = 100 trained out + 300 rejected + 100 stale + 0 failed + 100 live" in words(
        page
    )
    assert "✓ nothing lost" in words(page)
    lossy = replace(data, conservation={**data.conservation, "live": 97})
    assert "does not add up: -3" in words(build_report(lossy))


def test_delta_legend_counts_by_brute_force(data, page):
    cut = [s for s in data.samples if s.reason == "degenerate"]
    assert f"cut below: degenerate {len(cut)}" in words(page)
    marks = re.findall(r"cut below: degenerate: (\d+)", page)
    assert sum(map(int, marks)) == len(cut)
    assert "low 0 − tolerance 0.05" in words(page)


def test_lag_histogram_counts(data, page):
    lags = [s.lag for s in data.samples if s.lag is not None]
    for lag in set(lags):
        assert f"snapshots behind when trained on {lag}: {lags.count(lag)} " in words(page)


def test_drift_line_and_refresh_are_marked(data, page):
    over = sum(1 for s in data.steps if s["drift"] is not None and s["drift"] > 0.1)
    known = sum(1 for s in data.steps if s["drift"] is not None)
    assert over > 0
    assert f"{over} of {known} measured steps lie above 0.10" in words(page)
    assert "near-policy line 0.10" in words(page)
    assert "v1 at 60" in words(page)


def test_a_step_trained_twice_counts_as_its_last(data):
    again = replace(data, steps=[*data.steps, dict(data.steps[-1], loss=7.0)])
    text = words(build_report(again))
    assert "120 optimiser steps" in text
    assert "loss 7.00" in text


def test_config_and_origins_are_listed(page):
    assert "train.lr 1e-05 --set" in words(page)
    assert "train.betas [0.9, 0.95] default" in words(page)


def test_same_data_same_page(data, page):
    assert build_report(data) == page


floats = st.floats(-50, 50, allow_nan=False)


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=200), st.lists(floats, max_size=2))
def test_histogram_counts_each_value_once(values, cover):
    edges = bin_edges(values, 40, cover)
    counts = count(values, edges)
    assert sum(counts) == len(values)
    assert edges == sorted(set(edges))
    assert all(edges[0] - 1e-9 <= c <= edges[-1] + 1e-9 for c in cover)
    for low, high, n in zip(edges[1:], edges[2:-1], counts[1:-1], strict=False):
        assert n == sum(low <= v < high for v in values)


@settings(deadline=None)
@given(floats, floats)
def test_ticks_are_few_inside_and_evenly_apart(a, b):
    low, high = nice_bounds(min(a, b), max(a, b))
    found = ticks(low, high)
    assert low <= min(a, b) + 1e-9
    assert high >= max(a, b) - 1e-9
    assert 2 <= len(found) <= 9
    assert len(set(tick_labels(found))) == len(found)


@pytest.mark.parametrize("seconds", [0.001, 0.9, 59, 754, 90_000, 4_000_000])
def test_time_ticks_fit(seconds):
    found = time_ticks(seconds)
    assert found[0] == 0
    assert len(found) <= 9
    assert found[-1] <= seconds + 1e-9


def test_thinning_keeps_peaks():
    points = [(float(i), float(i == 777)) for i in range(10_000)]
    assert (777.0, 1.0) in thin(points)
    assert len(thin(points)) <= 400
    assert moving_mean([(0.0, 0.0), (1.0, 3.0), (2.0, 6.0)], 1) == [(0, 1.5), (1, 3.0), (2, 4.5)]


def test_merging_spans_keeps_their_count_and_time():
    spans = [Span("ab"[i % 2], "train", 0.1 * i, 0.1 * i + 0.15) for i in range(9000)]
    blocks = merge(spans, 2000)
    assert len(blocks) <= 2000
    assert sum(b.count for b in blocks) == 9000
    assert sum(b.busy for b in blocks) == pytest.approx(sum(s.seconds for s in spans))
    assert merge([Span("a", "train", 0.0, 0.0)] * 3000, 2000)[0].count == 3000


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.04213, "0.0421"), (-1234.5, "−1,234"), (float("nan"), "–")],
)
def test_numbers_are_written_plainly(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.84 s"),
        (4.02, "4.0 s"),
        (0, "0 s"),
        (42, "42 s"),
        (725, "12 min 5 s"),
        (60, "1 min"),
        (11230, "3 h 7 min"),
    ],
)
def test_durations_are_written_plainly(seconds, text):
    assert duration(seconds) == text


def test_elements_escape_strings_but_not_markup():
    assert el("p", "a < b", Html("<br/>"), class_='"') == '<p class="&quot;">a &lt; b<br/></p>'
    assert el("line", x1=1.0, stroke_width=0.126, y=None) == '<line x1="1" stroke-width="0.13"/>'


def test_one_of_a_thing_is_not_called_many(data):
    one = replace(
        data,
        steps=[dict(data.steps[0], drift=0.2)],
        samples=[replace(data.samples[0], delta=0.5, lag=0)],
        evals=[dict(e, num_prompts=1) for e in data.evals],
        throughput={"train": StageRate(1, 1, 1.0)},
    )
    text = words(build_report(one))
    for said in ("1 optimiser step,", "1 held-out prompt,", "1 scored sample.", "1 sample, mean",
                 "1 token in 1 sample,", "1 of 1 measured step lies above"):  # fmt: skip
        assert said in text
    nodes = re.findall(r'[>"]([^<>"]*)', build_report(one))
    many = re.compile(r"(?<![\d.,])1 (?:\w+ )?(?:steps|samples|prompts|tokens)\b")
    assert not [node for node in nodes if many.search(node)]


def kl_evals(before, after, tokens=100) -> list[dict]:
    """Two evaluations of the same responses, with these sums of KL."""
    return [
        {"step": step, "kl": sum(sums) / tokens, "num_tokens": tokens, "kl_sums": sums}
        for step, sums in ((0, before), (9, after))
    ]


def test_the_error_of_a_change_in_kl_is_that_of_its_pairs():
    """By resampling the responses: the bootstrap's spread of the same change."""
    rng = random.Random(5)
    before = [rng.uniform(5, 100) for _ in range(300)]
    after = [value - rng.gauss(1.0, 4.0) for value in before]
    found = change_error(kl_evals(before, after, 12_000), "kl")
    pairs = list(zip(before, after, strict=True))
    drawn = [sum(b - a for a, b in rng.choices(pairs, k=300)) / 12_000 for _ in range(2000)]
    assert found == pytest.approx(stdev(drawn), rel=0.1)
    assert found < stdev(before) / 12_000 * 300**0.5, "pairs tell more than two separate means"


def test_a_change_within_noise_is_not_called_one(data):
    before = [10.0, 30.0, 20.0, 40.0]
    noisy = replace(data, evals=kl_evals(before, [12.0, 27.0, 23.0, 37.0]))
    text = words(build_report(noisy))
    assert "did not change by more than noise: from 1.00 to 0.990 nats per token (" in text
    assert "within noise" in text
    assert not [e for e in tree_of(build_report(noisy)).iter("td") if "good" in e.get("class", "")]
    clear = replace(data, evals=kl_evals(before, [9.0, 29.0, 19.1, 39.0]))
    assert "fell 4 %: from 1.00 to 0.961" in words(build_report(clear))
    small = replace(data, evals=kl_evals(before, [9.96, 29.95, 19.96, 39.95]))
    assert "fell under 1 %" in words(build_report(small))


def test_a_share_of_few_prompts_is_noise(data):
    evals = [{"step": s, "exact_match": v, "num_prompts": 48} for s, v in ((0, 0.5), (9, 0.55))]
    assert "+5.0 points +10 %, within noise" in words(build_report(replace(data, evals=evals)))
    many = [dict(e, num_prompts=4800) for e in evals]
    assert "within noise" not in words(build_report(replace(data, evals=many)))


def test_why_samples_left_is_told_of_all_of_them(data):
    """From the ledger's counts: samples may be shown in part only."""
    page = build_report(replace(data, samples=data.samples[::20], every=20))
    assert "200 (33.3 %)" in page
    assert "rejected: no reason given" in page
    assert "(one in 20 of all)" in page


def test_the_error_of_exact_match_is_that_of_prompts_with_answers():
    evals = [{"step": 0, "exact_match": 0.5, "num_prompts": 100, "num_answers": 25}]
    assert share_error(0.5, evals) == pytest.approx(0.1)
    assert share_error(0.5, [{"step": 0, "num_prompts": 100}]) == pytest.approx(0.05)

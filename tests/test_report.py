"""The report: well-formed, self-contained, escaped, and saying the numbers it was given."""

import base64
import hashlib
import json
import random
import re
import sys
from dataclasses import replace
from statistics import stdev
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from browser import browser
from cli_fixture import Shell
from npd.observe.report import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
    build_report,
)
from npd.observe.report.chart_data import (
    bin_edges,
    count,
    merge,
    moving_mean,
    nice_bounds,
    thin,
    time_ticks,
)
from npd.observe.report.data import change_error, share_error
from npd.observe.report.page import Html, duration, el, number
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


SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
DATA = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)


def without_library(page):
    """The page as npd writes it, without the JavaScript of others."""
    return SCRIPT.sub("", page)


def tree_of(page):
    return ElementTree.fromstring(DATA.sub("", without_library(page)).encode("utf-8"))


def never(constant):
    raise AssertionError(f"{constant} in a drawing")


def specs(page):
    """What is drawn on a page, by what it is described as."""
    found = [json.loads(block, parse_constant=never) for block in DATA.findall(page)]
    return {spec["description"]: spec for spec in found}


@pytest.fixture
def drawn(page):
    """The drawings of the page; nothing to look at without Altair."""
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    return specs(page)


def source(spec, layer):
    """The name of the rows that a layer is drawn from; rows of all layers stand above them."""
    return layer.get("data", spec.get("data"))["name"]


def marks(spec):
    """The marks of a drawing with the rows they are drawn from."""
    return {(layer["mark"]["type"], source(spec, layer)) for layer in spec["layer"]}


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


def test_only_scripts_of_its_own_run_and_nothing_is_fetched(page, drawn):
    policy = next(e for e in tree_of(page).iter("meta") if e.get("http-equiv")).get("content")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    hashes = [hashlib.sha256(script.encode()).digest() for script in SCRIPT.findall(page)]
    assert len(hashes) == 2
    allowed = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes}
    assert set(rules["script-src"].split()) == allowed
    assert not [spec for spec in drawn.values() if '"url"' in json.dumps(spec)]


def test_evil_text_stays_text(page, drawn):
    own = without_library(page)
    assert own.count("<script") == len(drawn) > 0
    assert "<img" not in own
    assert "\x00" not in own
    assert '<script>alert("x")</script>' in words(page)
    assert not [block for block in DATA.findall(page) if set(block) & set("<>&\x00\u2028")]
    bars = drawn["Why samples were not trained on"]["datasets"]["bars"]
    assert '<script>alert("x")</script>' in bars[0]["y"]
    assert "\ud800" not in bars[0]["y"]


def test_every_drawing_is_valid_vega_lite(data, page):
    altair = pytest.importorskip("altair")
    pages = [page, *map(build_report, variants(data))]
    found = [spec for each in pages for spec in specs(each).values()]
    assert len(found) > 30
    for spec in found:
        altair.Chart.from_dict(spec, validate=True)
        assert spec["width"] == "container"
        named = {source(spec, layer) for layer in spec["layer"]}
        assert named == set(spec["datasets"]), "rows that nothing draws"


def test_colours_are_those_of_the_page(drawn):
    text = json.dumps(list(drawn.values()))
    assert not re.search(r'"#[0-9a-fA-F]{3,8}"|"(?:red|blue|steelblue|black|white)"', text)
    assert set(re.findall(r"var\(--(\w+)\)", text)) >= {"c1", "c2", "c3", "c4", "c5", "bad"}


def test_no_drawing_holds_a_number_that_is_none(data):
    pytest.importorskip("altair")
    for variant in variants(data):
        for spec in specs(build_report(variant)).values():
            rows = [row for rows in spec["datasets"].values() for row in rows]
            assert not [row for row in rows if {"nan", "inf"} & {str(v) for v in row.values()}]


def test_missing_data_is_said_not_drawn(data):
    text = words(build_report(EMPTY))
    for sentence in (
        "No held-out evaluation was run",
        "No optimiser step was taken",
        "No drift was measured",
        "No sample has a Δ-IFD",
        "The run has no trace",
        "No sample texts",
        "0 optimiser steps in 0 s",
    ):
        assert sentence in text
    assert "<script" not in build_report(EMPTY)
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


def test_conservation_is_checked(data, page):
    assert "600 asked = 100 trained out + 300 rejected + 100 stale + 0 failed + 100 live" in words(
        page
    )
    assert "✓ adds up" in words(page)
    lossy = replace(data, conservation={**data.conservation, "live": 97})
    assert "does not add up: -3" in words(build_report(lossy))


def test_delta_legend_counts_by_brute_force(data, page):
    cut = [s for s in data.samples if s.reason == "degenerate"]
    assert f"rejected below: degenerate {len(cut)}" in words(page)


def test_delta_histogram_counts_by_brute_force(data, drawn):
    spec = drawn["Histogram of delta IFD"]
    for name, reason in (
        ("rejected below: degenerate", "degenerate"),
        ("rejected above: disconnect", "disconnect"),
    ):
        bins = [row for row in spec["datasets"]["bins"] if row["name"] == name]
        assert sum(row["n"] for row in bins) == sum(s.reason == reason for s in data.samples)
        assert all(row["y2"] - row["y"] == row["n"] for row in bins)
    heights = {row["x"]: row["y2"] for row in spec["datasets"]["bins"]}
    assert sum(heights.values()) == len(data.deltas), "stacks stand on each other"
    assert ("rect", "bins") in marks(spec)
    assert "low 0 − tolerance 0.05" in [rule["label"] for rule in spec["datasets"]["rules"]]


def test_lag_histogram_counts(data, drawn):
    lags = [s.lag for s in data.samples if s.lag is not None]
    spec = drawn["Lag histogram"]
    columns = {row["x"]: row["y"] for row in spec["datasets"]["columns"]}
    assert columns == {str(lag): lags.count(lag) for lag in range(max(lags) + 1)}
    assert marks(spec) == {("bar", "columns"), ("text", "columns")}


def test_drift_line_and_refresh_are_marked(data, page, drawn):
    over = sum(1 for s in data.steps if s["drift"] is not None and s["drift"] > 0.1)
    known = sum(1 for s in data.steps if s["drift"] is not None)
    assert over > 0
    assert f"{over} of {known} measured steps lie above 0.10" in words(page)
    spec = drawn["Policy drift"]
    assert spec["datasets"]["rules"] == [
        {"y": 0.1, "label": "near-policy line 0.10", "color": "var(--bad)"}
    ]
    assert spec["datasets"]["markers"] == [{"x": 60.0, "label": "v1"}]
    assert {("rule", "rules"), ("text", "rules"), ("rule", "markers"), ("text", "labels")} < marks(
        spec
    )


def test_lines_go_through_every_point(data, drawn):
    spec = drawn["Loss and its parts"]
    assert {("line", "faint"), ("line", "bold"), ("rect", "hover")} < marks(spec)
    faint = [(row["x"], row["y"]) for row in spec["datasets"]["faint"] if row["name"] == "CE"]
    assert faint == [(s["step"], pytest.approx(s["ce"], rel=1e-5)) for s in data.steps]
    (line,) = (layer for layer in spec["layer"] if source(spec, layer) == "bold")
    assert line["encoding"]["x"]["field"] == "x"
    assert line["encoding"]["y"]["field"] == "y"
    assert line["encoding"]["color"]["scale"] is None
    assert line["encoding"]["x"]["title"] == "step"
    assert spec["title"] == "nats/token"


def test_the_pointer_tells_every_line(drawn):
    spec = drawn["Held-out agreement and exact match"]
    first = {"x": 0.0, "x2": 60.0, "at": "0", "v0": "50.0 %", "v1": "10.0 %"}
    assert spec["datasets"]["hover"][0] == first
    (strips,) = (layer for layer in spec["layer"] if source(spec, layer) == "hover")
    titles = [field["title"] for field in strips["encoding"]["tooltip"]]
    assert titles == ["step", "top-token agreement", "exact match"]


def test_the_timeline_tells_who_worked_when(drawn):
    rows = drawn["Timeline of the workers"]["datasets"]
    blocks = [(row["y"], row["x"], row["x2"]) for row in rows["blocks"]]
    assert sorted(blocks) == [
        ("generator", 0, 400), ("trainer", 300, 700), ("trainer", 700, 754)
    ]  # fmt: skip
    assert rows["shared"] == [{"x": 300, "x2": 400}]


def test_bars_tell_rates_and_idle_time(drawn):
    idle = drawn["Idle share by worker"]["datasets"]["bars"]
    assert [(row["y"], row["label"]) for row in idle] == [
        ("generator", "47 %"),
        ("trainer", "40 %"),
    ]
    rates = drawn["Tokens per second by stage"]
    assert [row["x"] for row in rates["datasets"]["bars"]] == [pytest.approx(12_345 / 400), 246.75]
    assert marks(rates) == {("bar", "bars"), ("text", "bars")}


def test_a_long_run_makes_a_page_of_bounded_size(data):
    """Of 30,000 steps and 60,000 spans: the same few hundred points a line, and 2,000 blocks."""
    pytest.importorskip("altair")
    rng = random.Random(1)
    long = replace(
        data,
        steps=list(fake_steps(30_000, rng)),
        samples=list(fake_samples(20_000, rng)),
        snapshots=[(v, 30 * v) for v in range(1000)],
        spans=[
            Span("ab"[i % 2], "train", START + i, START + i + 0.7, {"segment": i})
            for i in range(60_000)
        ],
    )
    page = build_report(long)
    assert len(without_library(page)) < 2_000_000
    assert len(specs(page)["Policy drift"]["datasets"]["labels"]) <= 8


@pytest.fixture
def no_charts(monkeypatch):
    """As if the extra were not installed."""
    monkeypatch.setitem(sys.modules, "altair", None)


@pytest.mark.usefixtures("no_charts")
def test_without_the_extra_charts_are_tables(data):
    page = build_report(data)
    assert "<script" not in page
    text = words(page)
    assert "pip install 'npd[report]'" in text
    assert re.search(r"step CE KD loss 1 2\.500 – 1\.\d+ ", text)
    assert "step KL(teacher ‖ student) 0 1.250 120 0.7500" in text
    assert "worker work time generator generate 6 min 40 s trainer publish 54 s" in text
    assert "idle, % of wall time generator 47 % trainer 40 %" in text
    assert "snapshots behind when trained on samples 0 100" in text
    assert 'script>alert("x")' in text
    for variant in variants(data):
        assert "nan" not in words(build_report(variant))


@pytest.mark.usefixtures("no_charts")
def test_a_run_without_the_extra_ends_well_and_says_what_to_install(
    tmp_path, tiny_model_dir, tiny_teacher_dir, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, tiny_model_dir, tiny_teacher_dir, capsys)
    shell.write(observe={"report": True})
    done = shell.npd("run", "run.yaml")
    assert done.code == 0, done.err
    line = "charts    pip install 'npd[report]', then npd show --report run"
    assert done.out.splitlines().count(line) == 1
    assert "tokens per busy second" in words(shell.layout.report_html.read_text())
    assert line in shell.npd("show", "run").out
    monkeypatch.undo()
    pytest.importorskip("altair")
    monkeypatch.chdir(tmp_path)
    assert "charts  " not in shell.npd("show", "run", "--report").out
    assert specs(shell.layout.report_html.read_text())
    monkeypatch.setitem(sys.modules, "altair", None)
    assert "charts  " not in shell.npd("show", "run").out, "it has them"


def test_a_browser_draws_every_chart_and_asks_for_nothing(tmp_path, page, drawn):
    path = tmp_path / "report.html"
    path.write_text(page)
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        assert tab.requests == [path.as_uri()]
        assert tab.value("document.querySelectorAll('.chart svg').length") == len(drawn)
        for width in (1240, 375):
            tab.look(width, dark=width < 1000)
            widths = "[...document.querySelectorAll('.chart svg')].map(s => s.clientWidth)"
            assert max(tab.value(widths)) <= width
            assert tab.value("document.documentElement.scrollWidth") <= width
        tab.look(1240, dark=False)
        tab.value("document.querySelector('.chart').scrollIntoView({behavior: 'instant'})")
        tab.point(300, 120)
        told = tab.value("document.querySelector('#vg-tooltip-element').innerText")
        assert re.match(r"step\t\d+\nCE\t\d\.\d+\nKD\t", told)
        assert tab.requests == [path.as_uri()]
        assert not tab.complaints


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
def test_bounds_are_round_and_hold_both_values(a, b):
    low, high = nice_bounds(min(a, b), max(a, b))
    rounding = 1e-9 * (high - low)
    assert low <= min(a, b) + rounding
    assert high >= max(a, b) - rounding
    assert low < high
    if abs(a - b) > 1e-6:
        assert high - low <= 2 * abs(a - b) + 1e-9, "most of the height is used"


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
    assert el("meta", http_equiv="x", content=None) == '<meta http-equiv="x"/>'


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
    nodes = re.findall(r'[>"]([^<>"]*)', without_library(build_report(one)))
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


def test_the_library_is_bundled_once_for_a_user(tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    from npd.observe.report import charts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    charts._library.cache_clear()
    bundle = charts._library()
    (kept,) = (tmp_path / "npd").iterdir()
    assert charts._read_own(kept) == bundle
    kept.write_text(bundle[:-9], encoding="utf-8")  # written in part
    assert charts._read_own(kept) is None
    charts._library.cache_clear()
    assert charts._library() == bundle
    kept.chmod(0o666)  # anybody may have written it
    assert charts._read_own(kept) is None
    link = tmp_path / "link.js"
    link.symlink_to(kept)
    kept.chmod(0o600)
    assert charts._read_own(kept) == bundle
    assert charts._read_own(link) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # no directory
    charts._library.cache_clear()
    assert charts._library() == bundle
    charts._library.cache_clear()


def test_libraries_that_do_not_fit_each_other_leave_tables(data, monkeypatch):
    pytest.importorskip("vl_convert")
    import altair

    from npd.observe.report import charts

    monkeypatch.setattr(altair, "SCHEMA_VERSION", "v6.99.0")
    charts._library.cache_clear()
    try:
        page = build_report(data)
    finally:
        monkeypatch.undo()
        charts._library.cache_clear()
        assert "Tables stand in place of charts" in page
    assert "<table" in page
    assert "vegaEmbed" not in page

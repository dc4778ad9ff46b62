"""The sections of a report after its result, from training to settings.

Each function returns text or markup from a `ReportData`. A sentence replaces a chart without data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from npd.observe.live import NEAR_POLICY_DRIFT
from npd.observe.report.chart_data import (
    Axes,
    Bar,
    Bars,
    Columns,
    Group,
    Histogram,
    Lines,
    Rule,
    Series,
    Timeline,
    bin_edges,
)
from npd.observe.report.charts import draw
from npd.observe.report.data import (
    Example,
    FilterBounds,
    HeldoutText,
    Numbers,
    ReportData,
    StageRate,
    points,
    teachers,
)
from npd.observe.report.page import (
    Html,
    duration,
    el,
    figure,
    flat,
    grid,
    note,
    number,
    percent,
    section,
    table,
)
from npd.observe.trace import busy_seconds, idle_shares, overlap_intervals, overlap_seconds, total
from npd.text import counted
from npd.types import Outcome

# -- training and near-policy ------------------------------------------------------------------


_MAX_LAGS = 16


def training(data: ReportData) -> Html:
    """The parts of the loss and held-out quality over steps."""
    drawn = [_loss(data), _heldout_kl(data), _heldout_shares(data), _mass(data)]
    known = [drawing for drawing in drawn if drawing is not None]
    intro = "The loss on the student's own text, and quality on held-out text."
    shown = [] if data.steps else [note("No optimiser step was taken.")]
    if data.steps and not data.evals:
        shown.append(note("No held-out evaluation was run: set eval.every_steps for a curve."))
    return section("training", "Training", intro, *shown, grid(*known) if known else None)


def _lines(records: Sequence[Numbers], named: Sequence[tuple[str, str, str]]) -> list[Series]:
    series = [Series(title, points(records, name), color) for name, title, color in named]
    return [s for s in series if s.points]


def _keys(series: Sequence[Series], as_percent: bool = False) -> list[tuple[str, str, str]]:
    last = ((s.name, s.color, s.points[-1][1]) for s in series)
    return [(n, c, percent(v) if as_percent else number(v, 3)) for n, c, v in last]


def _chart(
    title: str,
    series: Sequence[Series],
    axes: Axes,
    *,
    caption: str | None = None,
    rules: Sequence[Rule] = (),
    markers: Sequence[Rule] = (),
) -> Html | None:
    if not series:
        return None
    drawing = draw(Lines(series, axes, rules, markers), title)
    return figure(title, drawing, keys=_keys(series, axes.as_percent), caption=caption)


def _refreshes(data: ReportData) -> list[Rule]:
    return [Rule(float(step), f"v{version}") for version, step in data.snapshots if version > 0]


def _loss(data: ReportData) -> Html | None:
    named = (("ce", "CE", "c2"), ("kd", "KD", "c1"), ("loss", "loss", "c3"))
    caption = (
        "Legend: value at the last step. Thin: every step; bold: moving mean. "
        "Dotted: a refresh to a new snapshot."
    )
    axes = Axes("step", "nats/token")
    series = _lines(data.steps, named)
    return _chart("Loss and its parts", series, axes, caption=caption, markers=_refreshes(data))


def _heldout_kl(data: ReportData) -> Html | None:
    own = [(f"kl/{t}", t, f"c{2 + i % 5}") for i, t in enumerate(teachers(data))]
    series = _lines(data.evals, (("kl", "KL(teacher ‖ student)", "c1"), *own))
    axes = Axes("step", "nats/token", from_zero=True)
    caption = "On fixed held-out responses, tail-bucket estimate."
    return _chart("Held-out divergence", series, axes, caption=caption, markers=_refreshes(data))


def _heldout_shares(data: ReportData) -> Html | None:
    named = (("agreement", "top-token agreement", "c3"), ("exact_match", "exact match", "c4"))
    axes = Axes("step", "share", as_percent=True, from_zero=True)
    return _chart("Held-out agreement and exact match", _lines(data.evals, named), axes)


def _mass(data: ReportData) -> Html | None:
    named = (
        ("teacher_mass", "teacher mass on its top-k", "c1"),
        ("student_mass", "student mass there", "c2"),
        ("agreement", "same top token", "c3"),
        ("overlap", "support ranked first", "c4"),
    )
    axes = Axes("step", "share", as_percent=True)
    caption = "On the rollouts trained on."
    return _chart(
        "Student and teacher on the support", _lines(data.steps, named), axes, caption=caption
    )


def near_policy(data: ReportData) -> Html:
    """Drift against the near-policy line, and the lag of the samples trained on."""
    drift = _drift(data) or note(
        "No drift was measured: it needs log-probabilities of rollouts of the newest snapshot."
    )
    lags = _lags(data) or note("No sample was trained on, so there is no lag to show.")
    intro = "The distance of the student from the snapshot that generated its text."
    return section("near-policy", "Near-policy", intro, grid(drift, lags))


def _drift(data: ReportData) -> Html | None:
    named = (("drift", "KL(θ ‖ gen)", "c1"), ("drift_k3", "KL(gen ‖ θ)", "c2"))
    series = _lines(data.steps, named)
    over = sum(value > NEAR_POLICY_DRIFT for _, value in points(data.steps, "drift"))
    measured = counted(len(points(data.steps, "drift")), "measured step")
    caption = (
        f"{over:,} of {measured} {'lies' if over == 1 else 'lie'} above "
        f"{NEAR_POLICY_DRIFT:.2f}. Dotted: a refresh to a new snapshot."
    )
    line = Rule(NEAR_POLICY_DRIFT, f"near-policy line {NEAR_POLICY_DRIFT:.2f}", "bad")
    axes = Axes("step", "nats/token", from_zero=True)
    title = "Policy drift"
    return _chart(title, series, axes, caption=caption, rules=[line], markers=_refreshes(data))


def _lags(data: ReportData) -> Html | None:
    lags = [sample.lag for sample in data.samples if sample.lag is not None]
    if not lags:
        return None
    counts = Counter(min(lag, _MAX_LAGS) for lag in lags)
    names = {lag: f"≥ {lag}" if lag == _MAX_LAGS else str(lag) for lag in range(max(counts) + 1)}
    columns = {name: counts[lag] for lag, name in names.items()}
    axes = Axes("snapshots behind when trained on", "samples")
    drawing = draw(Columns(columns, axes, "c1"), "Lag histogram")
    mean = sum(lags) / len(lags)
    caption = f"{counted(len(lags), 'sample')}, mean {mean:.2f}, oldest {max(lags)}."
    return figure("Lag of the samples trained on", drawing, caption=caption)


# -- filter and texts --------------------------------------------------------------------------


_LEAVES = (
    ("trained_out", "trained out", "c3"),
    ("rejected", "rejected", "c2"),
    ("stale", "stale", "c4"),
    ("failed", "failed", "c5"),
    ("live", "live", "c6"),
)
_COLORS = {name: color for name, _, color in _LEAVES}


def selection(data: ReportData) -> Html:
    """The filter's decisions and the outcome of every sample."""
    deltas = _deltas(data) or note(
        "No sample has a Δ-IFD: the filter does not use it, or no sample was scored."
    )
    reasons = _reasons(data) or note("No sample was rejected, stale or failed.")
    intro = "The samples that were trained on, and the reasons for those that were not."
    return section("filter", "Filter", intro, _conservation(data), grid(deltas, reasons))


def _deltas(data: ReportData) -> Html | None:
    if not data.deltas:
        return None
    bounds = data.bounds
    cover = [] if bounds is None else [bounds.low - bounds.tolerance, bounds.high]
    groups = _groups(data)
    edges = bin_edges(data.deltas, 40, cover)
    axes = Axes("Δ-IFD = IFD of the teacher − IFD of the student", "samples")
    chart = Histogram(groups, edges, axes, _bound_rules(bounds))
    drawing = draw(chart, "Histogram of delta IFD")
    keys = [(g.name, g.color, f"{len(g.values):,}") for g in groups]
    return figure("Δ-IFD of the scored samples", drawing, keys=keys, caption=_quantiles(data))


def _groups(data: ReportData) -> list[Group]:
    """Δ-IFD of the scored samples by the filter's decision."""
    kinds = {
        "passed": ("passed the filter", "c1"),
        "degenerate": ("rejected below: degenerate", "c2"),
        "disconnect": ("rejected above: disconnect", "c5"),
        "other": ("rejected for another reason", "c6"),
    }
    values: dict[str, list[float]] = {kind: [] for kind in kinds}
    for sample in data.samples:
        if sample.delta is not None and math.isfinite(sample.delta):
            values[_kind(sample.outcome, sample.reason)].append(sample.delta)
    return [Group(*_named(kinds[kind], found)) for kind, found in values.items() if found]


def _named(kind: tuple[str, str], values: list[float]) -> tuple[str, list[float], str]:
    return kind[0], values, kind[1]


def _kind(outcome: Outcome | None, reason: str) -> str:
    if outcome is not Outcome.REJECTED:
        return "passed"
    return reason if reason in ("degenerate", "disconnect") else "other"


def _bound_rules(bounds: FilterBounds | None) -> list[Rule]:
    if bounds is None:
        return []
    rules = [Rule(bounds.high, f"high {_bound(bounds.high)}")]
    low = bounds.low - bounds.tolerance
    if bounds.tolerance > 0:
        label = f"low {_bound(bounds.low)} − tolerance {_bound(bounds.tolerance)}"
        return [*rules, Rule(bounds.low, "", "c6"), Rule(low, label)]
    return [*rules, Rule(low, f"low {_bound(low)}")]


def _bound(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _quantiles(data: ReportData) -> str:
    ordered = sorted(data.deltas)
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    found = [(share, ordered[round(share * (len(ordered) - 1))]) for share in shares]
    quantiles = ", ".join(f"{100 * share:.0f} %: {number(value, 2)}" for share, value in found)
    scored = counted(len(ordered), "scored sample")
    scored += f" (one in {data.every:,} of all)" if data.every > 1 else ""
    return f"{scored}. Quantiles {quantiles}. Outer bins include all values beyond."


def _reasons(data: ReportData) -> Html | None:
    left = Counter({k: n for k, n in data.reasons.items() if k[0] is not Outcome.TRAINED_OUT})
    asked = data.conservation.get("asked", 0)
    if not left or not asked:
        return None
    bars = [
        Bar(
            f"{outcome}: {reason or 'no reason given'}",
            n,
            f"{n:,} ({100 * n / asked:.1f} %)",
            _COLORS[str(outcome)],
        )
        for (outcome, reason), n in left.most_common(12)
    ]
    drawing = draw(Bars(bars, "samples"), "Why samples were not trained on")
    return figure("Why samples were not trained out", drawing, caption="Share of all samples.")


def _conservation(data: ReportData) -> Html | None:
    counts = data.conservation
    if not counts:
        return note("The ledger's counts are missing.")
    asked = counts.get("asked", 0)
    total = sum(counts.get(name, 0) for name, _, _ in _LEAVES)
    parts = [
        el("span", el("small", f"{sign} "), f"{counts.get(name, 0):,} ", el("small", title))
        for sign, (name, title, _) in zip("=++++", _LEAVES, strict=True)
    ]
    verdict = (
        el("span", "✓ adds up", class_="badge good")
        if total == asked
        else el("span", f"✗ does not add up: {total - asked:+,}", class_="badge bad")
    )
    line = el(
        "div", el("span", f"{asked:,} ", el("small", "asked")), *parts, verdict, class_="equation"
    )
    return el("div", line, _stack(counts, total), class_="card")


def _stack(counts: Mapping[str, int], total: int) -> Html:
    pieces = [
        el("span", title=f"{title}: {n:,}", class_=color, style=f"flex:{n}")
        for name, title, color in _LEAVES
        if (n := counts.get(name, 0))
    ]
    return el("div", *pieces, class_="stack", title=counted(total, "sample"))


def texts(data: ReportData) -> Html:
    """Texts of kept and rejected samples, and the student's held-out answers."""
    kept = [e for e in data.examples if e.outcome is not Outcome.REJECTED]
    cut = [e for e in data.examples if e.outcome is Outcome.REJECTED]
    shown = [
        grid(_column("Kept", kept), _column("Rejected", cut))
        if data.examples
        else note("No sample texts were kept for this report."),
        _answers(data.heldout_texts),
    ]
    intro = "Read a few texts: the numbers do not show everything."
    return section("texts", "Texts", intro, *shown)


def _column(title: str, examples: Sequence[Example]) -> Html:
    cards = [_example(example) for example in examples] or [note(f"No {title.lower()} sample.")]
    heading = el("h3", title, style="margin-bottom:8px")
    inside = el("div", *cards, style="display:grid;gap:12px")
    return el("div", heading, inside, style="min-width:0")


def _example(example: Example) -> Html:
    outcome = example.outcome or "live"
    known = (
        ("Δ-IFD", example.delta),
        ("teacher NLL", example.nll_teacher),
        ("student NLL", example.nll_student),
    )
    badge = str(outcome).replace("_", " ") + (f": {example.reason}" if example.reason else "")
    numbers = (el("span", f"{name} {v:.2f}") for name, v in known if v is not None)
    return el(
        "div",
        el("header", el("span", badge, class_=f"badge {_COLORS[str(outcome)]}"), *numbers),
        el("pre", example.prompt, class_="q"),
        el("pre", example.response, class_="r"),
        class_="card example",
    )


def _answers(answers: Sequence[HeldoutText]) -> Html | None:
    if not answers:
        return None
    heading = el("h3", "Held-out answers of the student", style="margin-bottom:8px")
    return el("div", heading, grid(*(_answer(answer) for answer in answers)))


def _answer(answer: HeldoutText) -> Html:
    parts = [el("pre", answer.prompt, class_="q")]
    if answer.before is not None:
        parts += [el("span", "before", class_="label"), el("pre", answer.before, class_="r")]
        parts.append(el("span", "after", class_="label"))
    parts.append(el("pre", answer.response, class_="r"))
    if answer.answer is not None:
        parts.append(el("span", f"expected: {answer.answer}", class_="label"))
    return el("div", *parts, class_="card example")


# -- machine and settings -----------------------------------------------------------------------


_KINDS = {"generate": "c1", "score": "c2", "train": "c3", "evaluate": "c4"}
_OTHER = "c6"
_FEEDING = ("generate", "score")


def machine(data: ReportData) -> Html:
    """The timeline, rates and idle shares of the workers."""
    timeline = _timeline(data) if data.spans else note("The run has no trace.")
    pair = [drawing for drawing in (_rates(data), _idle(data)) if drawing is not None]
    missing = None if pair else note("No throughput was recorded.")
    below = grid(*pair) if pair else missing
    intro = "The work of each worker over time. Stages above each other ran at the same time."
    return section("machine", "Machine", intro, timeline, below)


def _timeline(data: ReportData) -> Html:
    busy = busy_seconds(data.spans)
    seconds: dict[str, float] = {}
    for (_, name), spent in busy.items():
        kind = name if name in _KINDS else "other"
        seconds[kind] = seconds.get(kind, 0.0) + spent
    order = [*_KINDS, "other"]
    keys = [(k, _KINDS.get(k, _OTHER), duration(seconds[k])) for k in order if k in seconds]
    shared = overlap_intervals(data.spans, _FEEDING, ["train"])
    chart = Timeline(data.spans, data.started, _KINDS, shared)
    drawing = draw(chart, "Timeline of the workers")
    return figure("Timeline", drawing, keys=keys, caption=_overlap(data))


def _overlap(data: ReportData) -> str:
    both = total(overlap_intervals(data.spans, _FEEDING, ["train"]))
    train = overlap_seconds(data.spans, ["train"], ["train"])
    if train == 0:
        return "Nothing was trained."
    return (
        f"Shaded: generation or scoring while training, {duration(both)} in all, "
        f"{100 * both / train:.0f} % of the {duration(train)} of training."
    )


def _rates(data: ReportData) -> Html | None:
    if not data.throughput:
        return None
    bars = [
        Bar(stage, r.tokens_per_second, number(r.tokens_per_second), _KINDS.get(stage, _OTHER))
        for stage, r in data.throughput.items()
    ]
    caption = "; ".join(_amounts(stage, rate) for stage, rate in data.throughput.items())
    drawing = draw(Bars(bars, "tokens per busy second"), "Tokens per second by stage")
    return figure("Tokens per second by stage", drawing, caption=f"{caption}.")


def _amounts(stage: str, rate: StageRate) -> str:
    done = f"{counted(rate.tokens, 'token')} in {counted(rate.samples, 'sample')}"
    return f"{stage} {done}, busy {duration(rate.busy_seconds)}"


def _idle(data: ReportData) -> Html | None:
    shares = idle_shares(data.spans, data.started, data.ended)
    if not shares:
        return None
    bars = [Bar(w, s, f"{100 * s:.0f} %", _OTHER) for w, s in sorted(shares.items())]
    chart = Bars(bars, "idle, % of wall time", is_share=True)
    drawing = draw(chart, "Idle share by worker")
    return figure("Idle share by worker", drawing, caption="Wall time without work in the trace.")


def settings(data: ReportData) -> Html:
    """The resolved config and the environment."""
    return section(
        "settings",
        "Settings",
        "Everything needed to repeat this run.",
        el(
            "div",
            _environment(data),
            el("details", el("summary", "Resolved config"), _config(data)),
            class_="card",
        ),
    )


def _config(data: ReportData) -> Html:
    rows = flat(data.config)
    if not data.origins:
        return table(("Key", "Value"), [(el("code", k), el("code", v)) for k, v in rows], "config")
    cells = [
        (el("code", key), el("code", value), data.origins.get(key, "default"))
        for key, value in rows
    ]
    return table(("Key", "Value", "From"), cells, "config")


def _environment(data: ReportData) -> Html:
    if not data.environment:
        return note("The environment was not recorded.")
    rows = [(name, el("code", value)) for name, value in data.environment.items()]
    return table(("Environment", ""), rows, "config")

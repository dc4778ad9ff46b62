"""What was learned, and how near to the policy: loss, held-out quality, drift, lag.

Each function returns finished markup for one section from a `ReportData`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from npd.observe.live import NEAR_POLICY_DRIFT
from npd.observe.report.bars import category_chart
from npd.observe.report.charts import Axes, Rule, Series, line_chart
from npd.observe.report.data import Numbers, ReportData, points, teachers
from npd.observe.report.html import Html
from npd.observe.report.page import figure, grid, note, section
from npd.observe.report.scales import number, percent
from npd.wording import counted

_MAX_LAGS = 16


def training(data: ReportData) -> Html:
    """Loss parts over steps, and held-out quality over steps."""
    drawn = [_loss(data), _heldout_kl(data), _heldout_shares(data), _mass(data)]
    known = [drawing for drawing in drawn if drawing is not None]
    intro = "Loss on the student's own text, and quality on text it was never trained on."
    shown = [] if data.steps else [note("No optimiser step was taken.")]
    if data.steps and not data.evals:
        shown.append(note("No held-out evaluation was run: set eval.every_steps to see its curve."))
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
    drawing = line_chart(series, axes, label=title, rules=rules, markers=markers)
    return figure(title, drawing, keys=_keys(series, axes.as_percent), caption=caption)


def _refreshes(data: ReportData) -> list[Rule]:
    return [Rule(float(step), f"v{version}") for version, step in data.snapshots if version > 0]


def _loss(data: ReportData) -> Html | None:
    named = (("ce", "CE", "c2"), ("kd", "KD", "c1"), ("loss", "loss", "c3"))
    caption = (
        "Legend: value at the last step. Thin: every step; bold: moving mean. "
        "Dotted: a new snapshot began to write."
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
    axes = Axes("step", "%", as_percent=True, from_zero=True)
    return _chart("Held-out agreement and exact match", _lines(data.evals, named), axes)


def _mass(data: ReportData) -> Html | None:
    named = (
        ("teacher_mass", "teacher mass on its top-k", "c1"),
        ("student_mass", "student mass there", "c2"),
        ("agreement", "same top token", "c3"),
        ("overlap", "support put first", "c4"),
    )
    axes = Axes("step", "%", as_percent=True)
    caption = "On the rollouts trained on."
    return _chart(
        "Student and teacher on the support", _lines(data.steps, named), axes, caption=caption
    )


def near_policy(data: ReportData) -> Html:
    """Drift against the near-policy line, and the age of what was trained on."""
    drift = _drift(data) or note(
        "No drift was measured: it needs log-probabilities of rollouts of the newest snapshot."
    )
    lags = _lags(data) or note("No sample was trained on, so there is no lag to show.")
    intro = "How far the student moved from the snapshot that wrote its text."
    return section("near-policy", "Near-policy", intro, grid(drift, lags))


def _drift(data: ReportData) -> Html | None:
    named = (("drift", "KL(θ ‖ gen)", "c1"), ("drift_k3", "KL(gen ‖ θ)", "c2"))
    series = _lines(data.steps, named)
    over = sum(value > NEAR_POLICY_DRIFT for _, value in points(data.steps, "drift"))
    measured = counted(len(points(data.steps, "drift")), "measured step")
    caption = (
        f"{over:,} of {measured} {'lies' if over == 1 else 'lie'} above "
        f"{NEAR_POLICY_DRIFT:.2f}. Dotted: a new snapshot took over."
    )
    line = Rule(NEAR_POLICY_DRIFT, f"near-policy line {NEAR_POLICY_DRIFT:.2f}", "alarm")
    axes = Axes("step", "nats/token", from_zero=True)
    title = "Policy drift"
    return _chart(title, series, axes, caption=caption, rules=[line], markers=_refreshes(data))


def _lags(data: ReportData) -> Html | None:
    lags = [sample.lag for sample in data.samples if sample.lag is not None]
    if not lags:
        return None
    counts = Counter(min(lag, _MAX_LAGS) for lag in lags)
    names = {lag: f"≥ {lag}" if lag == _MAX_LAGS else str(lag) for lag in range(max(counts) + 1)}
    drawing = category_chart(
        {name: counts[lag] for lag, name in names.items()},
        Axes("snapshots behind when trained on", "samples"),
        "c1",
        label="Lag histogram",
    )
    mean = sum(lags) / len(lags)
    caption = f"{counted(len(lags), 'sample')}, mean {mean:.2f}, oldest {max(lags)}."
    return figure("Lag of the samples trained on", drawing, caption=caption)

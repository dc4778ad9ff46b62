"""What was learned, and how near to the policy: result, loss, held-out quality, drift, lag.

Each function returns finished markup for one section from a `ReportData`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npd.observe.live import NEAR_POLICY_DRIFT
from npd.observe.report.bars import category_chart
from npd.observe.report.charts import Axes, Rule, Series, line_chart
from npd.observe.report.data import Numbers, ReportData, by_step, points
from npd.observe.report.html import Html, el
from npd.observe.report.page import figure, grid, note, section, table, tile
from npd.observe.report.scales import duration, number, percent
from npd.observe.trace import overlap_seconds

_MAX_LAGS = 16


@dataclass(frozen=True, slots=True)
class Measure:
    """A held-out measure of the headline table."""

    name: str
    title: str
    meaning: str
    is_share: bool
    is_better_up: bool

    def write(self, value: float) -> str:
        """The value with its unit."""
        return percent(value) if self.is_share else number(value, 4)


MEASURES = (
    Measure("kl", "Held-out KL to the teacher", "nats/token, lower is better", False, False),
    Measure("agreement", "Top-token agreement", "share of held-out positions", True, True),
    Measure("exact_match", "Exact match", "greedy answers that are right", True, True),
)


def lead(data: ReportData) -> str:
    """The run in one sentence."""
    steps, spent = len(by_step(data.steps)), duration(data.wall_seconds)
    kl = points(data.evals, "kl")
    if len(kl) < 2 or kl[0][1] <= 0:
        return f"{steps:,} optimiser steps in {spent}; held-out quality was not measured twice."
    before, after = kl[0][1], kl[-1][1]
    change = (after - before) / before
    verb = "fell" if change < 0 else "rose"
    return (
        f"In {spent} and {steps:,} optimiser steps, the student's held-out divergence from its "
        f"teacher {verb} {abs(100 * change):.0f} %: from {number(before)} to {number(after)} nats "
        "per token."
    )


def result(data: ReportData) -> Html:
    """Before and after, and the run's own figures."""
    first, *others = MEASURES
    own = [replace(first, name=f"kl/{t}", title=f"{first.title} {t}") for t in _teachers(data)]
    rows = [_row(m, points(data.evals, m.name), data.evals) for m in (first, *own, *others)]
    known = [row for row in rows if row is not None]
    head = ("Held-out measure", ">Before", ">After", ">Change")
    shown = (
        el("div", table(head, known), class_="card")
        if known
        else note("No held-out evaluation was run, so nothing here says whether quality changed.")
    )
    return section("result", "Result", _evaluated(data), shown, _tiles(data))


def _evaluated(data: ReportData) -> str:
    evals = by_step(data.evals)
    if not evals:
        return "What the run changed."
    prompts, first, last = evals[-1].get("num_prompts"), evals[0]["step"], evals[-1]["step"]
    size = f"{prompts} held-out prompts" if prompts else "held-out prompts"
    return f"The student on {size}, at step {first} and at step {last}. {_time_to_best(data)}"


def _time_to_best(data: ReportData) -> str:
    """When the KL first came within a tenth of the gain to its best; empty if times are unknown."""
    known = [e for e in by_step(data.evals) if e.get("kl") is not None and "time" in e]
    if len(known) < 3:
        return ""
    best = min(e["kl"] for e in known)
    goal = best + 0.1 * (known[0]["kl"] - best)
    first = next(e for e in known if e["kl"] <= goal)
    if first is known[0]:
        return ""
    spent = duration(max(0.0, first["time"] - data.started))
    return f"Nine tenths of the best gain in KL were there after {spent} (step {first['step']})."


def _row(
    measure: Measure, found: Sequence[tuple[float, float]], evals: Sequence[Numbers]
) -> list[Html | str] | None:
    if not found:
        return None
    before, after = found[0][1], found[-1][1]
    name = el("td", measure.title, el("small", measure.meaning))
    shown = [_value(measure, before, evals), _value(measure, after, evals)]
    return [name, *shown, _change(measure, before, after) if len(found) > 1 else "–"]


def _value(measure: Measure, value: float, evals: Sequence[Numbers]) -> Html:
    error = _standard_error(value, evals) if measure.name == "exact_match" else None
    small = el("small", f"± {100 * error:.1f} (SE)") if error else None
    return el("td", measure.write(value), small, class_="num big")


def _standard_error(share: float, evals: Sequence[Numbers]) -> float | None:
    prompts = next((e["num_prompts"] for e in evals if e.get("num_prompts")), None)
    return math.sqrt(max(0.0, share * (1 - share)) / prompts) if prompts else None


def _change(measure: Measure, before: float, after: float) -> Html:
    gap = after - before
    sign = "+" if gap > 0 else "−" if gap < 0 else "±"
    size = f"{abs(100 * gap):.1f} points" if measure.is_share else number(abs(gap), 3)
    relative = f"{sign}{abs(100 * gap / before):.0f} %" if before else ""
    css = "" if gap == 0 else "good" if (gap > 0) == measure.is_better_up else "bad"
    return el("td", f"{sign}{size}", el("small", relative), class_=f"num big {css}".strip())


def _tiles(data: ReportData) -> Html:
    counts, wall = data.conservation, data.wall_seconds
    trained, asked = counts.get("trained_out", 0), counts.get("asked", 0)
    train = data.throughput.get("train")
    rate = number(train.tokens_per_second) if train else "–"
    hourly = f"{3600 * trained / wall:,.0f}" if wall > 0 and counts else "–"
    return el(
        "div",
        tile("Wall time", duration(wall), "", f"{len(by_step(data.steps)):,} optimiser steps"),
        tile(
            "Samples trained out",
            f"{trained:,}",
            "",
            f"of {asked:,} asked, {counts.get('rejected', 0):,} rejected",
        ),
        tile("Trainer", rate, "tokens/s", "while training"),
        tile("End to end", hourly, "samples/h", "generation and scoring included"),
        _overlap_tile(data),
        class_="tiles",
    )


def _overlap_tile(data: ReportData) -> Html:
    train = overlap_seconds(data.spans, ["train"], ["train"])
    both = overlap_seconds(data.spans, ["generate", "score"], ["train"])
    share = f"{100 * both / train:.0f} %" if train > 0 else "–"
    return tile("Overlap", share, "", "of training time also generating or scoring")


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


def _teachers(data: ReportData) -> list[str]:
    """Names of the teachers that the held-out KL is told of, where there are several."""
    names = {name for record in data.evals for name in record if name.startswith("kl/")}
    return sorted(name.removeprefix("kl/") for name in names)


def _heldout_kl(data: ReportData) -> Html | None:
    own = [(f"kl/{t}", t, f"c{2 + i % 5}") for i, t in enumerate(_teachers(data))]
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
    caption = (
        f"{over:,} of {len(points(data.steps, 'drift')):,} measured steps lie above "
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
    caption = f"{len(lags):,} samples, mean {mean:.2f}, oldest {max(lags)}."
    return figure("Lag of the samples trained on", drawing, caption=caption)

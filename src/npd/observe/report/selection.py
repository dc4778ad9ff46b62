"""What was trained on and what was not: Δ-IFD, reasons, the count of every sample, texts.

Each function returns finished markup for one section from a `ReportData`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from npd.observe.report.bars import Bar, Group, bar_chart, bin_edges, histogram
from npd.observe.report.charts import Axes, Rule
from npd.observe.report.data import Example, FilterBounds, HeldoutText, ReportData
from npd.observe.report.html import Html, el
from npd.observe.report.page import figure, grid, note, section
from npd.observe.report.scales import number
from npd.types import Outcome
from npd.wording import counted

_LEAVES = (
    ("trained_out", "trained out", "c3"),
    ("rejected", "rejected", "c2"),
    ("stale", "stale", "c4"),
    ("failed", "failed", "c5"),
    ("live", "live", "c6"),
)
_COLORS = {name: color for name, _, color in _LEAVES}


def selection(data: ReportData) -> Html:
    """What the filter cut and where every sample went."""
    deltas = _deltas(data) or note(
        "No sample has a Δ-IFD: the filter did not ask for it, or nothing was scored."
    )
    reasons = _reasons(data) or note("No sample was rejected, went stale or failed.")
    intro = "Which rollouts were trained on, and why the others were not."
    return section("filter", "Filter", intro, _conservation(data), grid(deltas, reasons))


def _deltas(data: ReportData) -> Html | None:
    if not data.deltas:
        return None
    bounds = data.bounds
    cover = [] if bounds is None else [bounds.low - bounds.tolerance, bounds.high]
    groups = _groups(data)
    drawing = histogram(
        groups,
        bin_edges(data.deltas, 40, cover),
        Axes("Δ-IFD = IFD of the teacher − IFD of the student", "samples"),
        label="Histogram of delta IFD",
        rules=_bound_rules(bounds),
    )
    keys = [(g.name, g.color, f"{len(g.values):,}") for g in groups]
    return figure("Δ-IFD of the scored samples", drawing, keys=keys, caption=_quantiles(data))


def _groups(data: ReportData) -> list[Group]:
    """Scored samples by what became of them; the outermost bins hold what lies beyond."""
    kinds = {
        "passed": ("passed the filter", "c1"),
        "degenerate": ("cut below: degenerate", "c2"),
        "disconnect": ("cut above: disconnect", "c5"),
        "other": ("rejected otherwise", "c6"),
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
    rules = [Rule(bounds.high, f"high {bounds.high:.3g}")]
    low = bounds.low - bounds.tolerance
    if bounds.tolerance > 0:
        told = f"low {bounds.low:.3g} − tolerance {bounds.tolerance:.3g}"
        return [*rules, Rule(bounds.low, "", "light"), Rule(low, told)]
    return [*rules, Rule(low, f"low {low:.3g}")]


def _quantiles(data: ReportData) -> str:
    ordered = sorted(data.deltas)
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    found = [(share, ordered[round(share * (len(ordered) - 1))]) for share in shares]
    told = ", ".join(f"{100 * share:.0f} %: {number(value, 2)}" for share, value in found)
    scored = counted(len(ordered), "scored sample")
    scored += f" (one in {data.every:,} of all)" if data.every > 1 else ""
    return f"{scored}. Quantiles {told}. Outer bins hold what lies beyond."


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
    drawing = bar_chart(bars, "samples", label="Why samples were not trained on")
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
        el("span", "✓ nothing lost", class_="badge good")
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
    """Sample texts: trained on and rejected, and the student's held-out answers."""
    kept = [e for e in data.examples if e.outcome is not Outcome.REJECTED]
    cut = [e for e in data.examples if e.outcome is Outcome.REJECTED]
    shown = [
        grid(_column("Kept", kept), _column("Rejected", cut))
        if data.examples
        else note("No sample texts were kept for this report."),
        _answers(data.heldout_texts),
    ]
    intro = "Read a few: numbers do not notice everything."
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

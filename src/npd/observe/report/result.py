"""The result section of a report: held-out quality before and after, noise, the run's figures.

Each function returns text or markup from a `ReportData`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from npd.observe.report.data import (
    Numbers,
    ReportData,
    by_step,
    change_error,
    is_noise,
    points,
    share_error,
    teachers,
)
from npd.observe.report.page import Html, duration, el, note, number, percent, section, table, tile
from npd.observe.trace import overlap_seconds
from npd.text import counted


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
    Measure("exact_match", "Exact match", "share of correct greedy answers", True, True),
)


def lead(data: ReportData) -> str:
    """The run in one sentence."""
    steps = counted(len(by_step(data.steps)), "optimiser step")
    spent, kl = duration(data.wall_seconds), points(data.evals, "kl")
    if len(kl) < 2 or kl[0][1] <= 0:
        return f"{steps} in {spent}; held-out quality was measured less than twice."
    before, after = kl[0][1], kl[-1][1]
    start = f"In {spent} and {steps}, the student's held-out divergence from its teacher"
    ends = f"from {number(before)} to {number(after)} nats per token"
    error = change_error(data.evals, "kl")
    if is_noise(after - before, error):
        return f"{start} did not change by more than noise: {ends}{_margin(error)}."
    change = (after - before) / before
    verb, size = "fell" if change < 0 else "rose", abs(100 * change)
    return f"{start} {verb} {'under 1' if size < 0.5 else f'{size:.0f}'} %: {ends}."


def _margin(error: float | None) -> str:
    """Two standard errors; a larger change counts."""
    return f" (± {number(2 * error)})" if error else ""


def result(data: ReportData) -> Html:
    """Quality before and after, and the run's figures."""
    first, *others = MEASURES
    own = [replace(first, name=f"kl/{t}", title=f"{first.title} {t}") for t in teachers(data)]
    rows = [_row(m, points(data.evals, m.name), data.evals) for m in (first, *own, *others)]
    known = [row for row in rows if row is not None]
    head = ("Held-out measure", ">Before", ">After", ">Change")
    shown = (
        el("div", table(head, known), class_="card")
        if known
        else note("No held-out evaluation was run, so the change in quality is unknown.")
    )
    return section("result", "Result", _evaluated(data), shown, _tiles(data))


def _evaluated(data: ReportData) -> str:
    evals = by_step(data.evals)
    if not evals:
        return "Held-out quality before and after the run."
    prompts, first, last = evals[-1].get("num_prompts"), evals[0]["step"], evals[-1]["step"]
    size = counted(prompts, "held-out prompt") if prompts else "held-out prompts"
    return f"The student on {size}, at step {first} and at step {last}. {_time_to_best(data)}"


def _time_to_best(data: ReportData) -> str:
    """The time to nine tenths of the best gain in KL; empty if times are unknown."""
    known = [e for e in by_step(data.evals) if e.get("kl") is not None and "time" in e]
    if len(known) < 3:
        return ""
    best = min(e["kl"] for e in known)
    goal = best + 0.1 * (known[0]["kl"] - best)
    first = next(e for e in known if e["kl"] <= goal)
    if first is known[0]:
        return ""
    spent = duration(max(0.0, first["time"] - data.started))
    return f"Nine tenths of the best gain in KL were reached after {spent} (step {first['step']})."


def _row(
    measure: Measure, found: Sequence[tuple[float, float]], evals: Sequence[Numbers]
) -> list[Html | str] | None:
    if not found:
        return None
    before, after = found[0][1], found[-1][1]
    name = el("td", measure.title, el("small", measure.meaning))
    shown = [_value(measure, before, evals), _value(measure, after, evals)]
    change = _change(measure, before, after, change_error(evals, measure.name))
    return [name, *shown, change if len(found) > 1 else "–"]


def _value(measure: Measure, value: float, evals: Sequence[Numbers]) -> Html:
    error = share_error(value, evals) if measure.name == "exact_match" else None
    small = el("small", f"± {100 * error:.1f} (SE)") if error else None
    return el("td", measure.write(value), small, class_="num big")


def _change(measure: Measure, before: float, after: float, error: float | None) -> Html:
    gap = after - before
    sign = "+" if gap > 0 else "−" if gap < 0 else "±"
    size = f"{abs(100 * gap):.1f} points" if measure.is_share else number(abs(gap), 3)
    relative = f"{sign}{abs(100 * gap / before):.0f} %" if before else ""
    css = "good" if (gap > 0) == measure.is_better_up else "bad"
    if is_noise(gap, error):
        css, relative = "", f"{relative}, within noise".removeprefix(", ")
    return el("td", f"{sign}{size}", el("small", relative), class_=f"num big {css}".strip())


def _tiles(data: ReportData) -> Html:
    counts, wall = data.conservation, data.wall_seconds
    trained, asked = counts.get("trained_out", 0), counts.get("asked", 0)
    train = data.throughput.get("train")
    rate = number(train.tokens_per_second) if train else "–"
    hourly = f"{3600 * trained / wall:,.0f}" if wall > 0 and counts else "–"
    return el(
        "div",
        tile("Wall time", duration(wall), "", counted(len(by_step(data.steps)), "optimiser step")),
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

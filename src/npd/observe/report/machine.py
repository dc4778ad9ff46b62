"""How the machine was used: the lanes of the workers, tokens per second, idle time, settings.

Each function returns finished markup for one section from a `ReportData`.
"""

from __future__ import annotations

from npd.observe.report.bars import Bar, bar_chart
from npd.observe.report.data import ReportData, StageRate
from npd.observe.report.gantt import gantt
from npd.observe.report.html import Html, el
from npd.observe.report.page import figure, flat, grid, note, section, table
from npd.observe.report.scales import duration, number
from npd.observe.trace import busy_seconds, idle_shares, overlap_intervals, overlap_seconds, total
from npd.wording import counted

_KINDS = {"generate": "c1", "score": "c2", "train": "c3", "evaluate": "c4"}
_OTHER = "c6"
_FEEDING = ("generate", "score")


def machine(data: ReportData) -> Html:
    """Timeline, rates and idle shares."""
    timeline = _timeline(data) if data.spans else note("No trace was kept: set observe.trace.")
    pair = [drawing for drawing in (_rates(data), _idle(data)) if drawing is not None]
    missing = None if pair else note("No throughput was recorded.")
    below = grid(*pair) if pair else missing
    intro = "Who worked when. Stages that stand above each other ran at the same time."
    return section("machine", "Machine", intro, timeline, below)


def _timeline(data: ReportData) -> Html:
    busy = busy_seconds(data.spans)
    seconds: dict[str, float] = {}
    for (_, name), spent in busy.items():
        kind = name if name in _KINDS else "other"
        seconds[kind] = seconds.get(kind, 0.0) + spent
    order = [*_KINDS, "other"]
    keys = [(k, _KINDS.get(k, _OTHER), duration(seconds[k])) for k in order if k in seconds]
    drawing = gantt(
        data.spans,
        data.started,
        _KINDS,
        shared=overlap_intervals(data.spans, _FEEDING, ["train"]),
        label="Timeline of the workers",
    )
    return figure("Timeline", drawing, keys=keys, caption=_overlap(data), is_wide=True)


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
    told = "; ".join(_told(stage, rate) for stage, rate in data.throughput.items())
    drawing = bar_chart(bars, "tokens per busy second", label="Tokens per second by stage")
    return figure("Tokens per second by stage", drawing, caption=f"{told}.")


def _told(stage: str, rate: StageRate) -> str:
    done = f"{counted(rate.tokens, 'token')} in {counted(rate.samples, 'sample')}"
    return f"{stage} {done}, busy {duration(rate.busy_seconds)}"


def _idle(data: ReportData) -> Html | None:
    shares = idle_shares(data.spans, data.started, data.ended)
    if not shares:
        return None
    bars = [Bar(w, s, f"{100 * s:.0f} %", _OTHER) for w, s in sorted(shares.items())]
    drawing = bar_chart(bars, "idle, % of wall time", label="Idle share by worker", full=1.0)
    return figure("Idle share by worker", drawing, caption="Wall time without a span of its own.")


def settings(data: ReportData) -> Html:
    """The resolved config and the environment."""
    return section(
        "settings",
        "Settings",
        "Everything needed to run this again.",
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

"""The report of a run: one self-contained HTML file with its numbers, charts and texts.

Promises: the same data gives the same page. Measures nothing.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

from npd.observe.report.advice import advice, wasted_line
from npd.observe.report.charts import can_draw, remedy, scripts
from npd.observe.report.data import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
)
from npd.observe.report.page import Html, el, join, note, page
from npd.observe.report.result import lead, result
from npd.observe.report.sections import (
    machine,
    near_policy,
    selection,
    settings,
    texts,
    training,
)

__all__ = [
    "Example",
    "FilterBounds",
    "HeldoutText",
    "ReportData",
    "ReportSample",
    "StageRate",
    "build_report",
    "remedy_of_tables",
]

_TABLES = "Tables stand in place of charts."  # also found in reports of earlier versions
_SECTIONS = (
    ("result", "Result"),
    ("training", "Training"),
    ("near-policy", "Near-policy"),
    ("filter", "Filter"),
    ("machine", "Machine"),
    ("texts", "Texts"),
    ("settings", "Settings"),
)


def build_report(data: ReportData) -> str:
    """One self-contained HTML page about the run."""
    body = join(
        result(data),
        training(data),
        near_policy(data),
        selection(data),
        machine(data),
        texts(data),
        settings(data),
    )
    return page(f"{data.title}: npd report", _header(data), body, _footer(data), scripts(body))


def remedy_of_tables(written: Path) -> str | None:
    """The command that adds charts to a report with tables; None if it does not apply."""
    has_tables = _TABLES.encode() in written.read_bytes()
    return remedy(shlex.quote(str(written.parent))) if has_tables and not can_draw() else None


def _header(data: ReportData) -> Html:
    wasted = wasted_line(data)
    links = (el("a", title, href=f"#{anchor}") for anchor, title in _SECTIONS)
    return join(
        el("p", "Near-policy distillation", class_="eyebrow"),
        el("h1", data.title),
        el("div", _subtitle(data), class_="soft"),
        el("p", lead(data), class_="lead"),
        el("p", wasted, class_="warning") if wasted else None,
        *(el("p", str(finding), class_="advice") for finding in advice(data)),
        None if can_draw() else note(f"{_TABLES} For charts: {remedy()}"),
        el("nav", *links),
    )


def _subtitle(data: ReportData) -> str:
    named = data.config.get("teachers") or {}
    teachers = [data.config.get("teacher"), *(f"{t['model']} ({n})" for n, t in named.items())]
    named_models = [", ".join(str(t) for t in teachers if t), str(data.config.get("student") or "")]
    models = [model for model in named_models if model]
    when = f"{_moment(data.started)} to {_moment(data.ended)} UTC"
    return " · ".join([*([" → ".join(models)] if models else []), when])


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _footer(data: ReportData) -> str:
    version = data.environment.get("npd")
    return "Made by npd" + (f" {version}" if version else "") + ". Loads no other files."

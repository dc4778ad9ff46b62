"""Puts the sections of a report together.

Promises: the same data gives the same page; data that is missing is named in a sentence instead of
drawn as an empty chart. Reads no file and measures nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime

from npd.observe.report.data import ReportData
from npd.observe.report.html import Html, el, join
from npd.observe.report.learning import near_policy, training
from npd.observe.report.machine import machine, settings
from npd.observe.report.page import page
from npd.observe.report.result import lead, result
from npd.observe.report.selection import selection, texts
from npd.observe.report.waste import wasted_line

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
    return page(f"{data.title}: npd report", _header(data), body, _footer(data))


def _header(data: ReportData) -> Html:
    wasted = wasted_line(data)
    links = (el("a", title, href=f"#{anchor}") for anchor, title in _SECTIONS)
    return join(
        el("p", "Near-policy distillation", class_="eyebrow"),
        el("h1", data.title),
        el("div", _subtitle(data), class_="soft"),
        el("p", lead(data), class_="lead"),
        el("p", wasted, class_="warning") if wasted else None,
        el("nav", *links),
    )


def _subtitle(data: ReportData) -> str:
    named = data.config.get("teachers") or {}
    teachers = [data.config.get("teacher"), *(f"{t['model']} ({n})" for n, t in named.items())]
    told = [", ".join(str(t) for t in teachers if t), str(data.config.get("student") or "")]
    models = [model for model in told if model]
    when = f"{_moment(data.started)} to {_moment(data.ended)} UTC"
    return " · ".join([*([" → ".join(models)] if models else []), when])


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _footer(data: ReportData) -> str:
    version = data.environment.get("npd")
    return "Made by npd" + (f" {version}" if version else "") + ". Loads nothing from elsewhere."

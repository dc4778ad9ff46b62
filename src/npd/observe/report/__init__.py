"""The report of a run: one HTML file with its numbers, charts and texts, and nothing loaded."""

from npd.observe.report.build import build_report
from npd.observe.report.data import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
)

__all__ = [
    "Example",
    "FilterBounds",
    "HeldoutText",
    "ReportData",
    "ReportSample",
    "StageRate",
    "build_report",
]

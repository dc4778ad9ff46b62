"""Figures of benchmarks as SVG files: the same values give the same file, byte for byte.

Colours are Okabe and Ito's, which the colour-blind can tell apart; series differ by their dashes
too. Needs matplotlib (the `bench` extra), which is imported late. Does not compute: means and bands
are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), "-")
_STYLE = {
    "svg.hashsalt": "npd", "svg.fonttype": "none", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"], "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A series: a value for each x, and optionally the half-width of a band around it."""

    xs: Sequence[float]
    ys: Sequence[float]
    halves: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes and its series by name; a name has one colour in all panels."""

    ylabel: str
    lines: Mapping[str, Line]


def curves(path: Path, panels: Sequence[Panel], xlabel: str) -> Path:
    """Panels side by side over the same x, one legend below them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    with drawing(path, len(panels), (3.6 * len(panels), 3.4)) as (figure, all_axes):
        for axes, panel in zip(all_axes, panels, strict=True):
            for name, line in panel.lines.items():
                _draw(axes, name, line, names.index(name))
            axes.set(xlabel=xlabel, ylabel=panel.ylabel)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    return path


@dataclass(frozen=True)
class Dots:
    """A column of dots by row name: middles, and the half-widths of the lines through them."""

    xlabel: str
    middles: Mapping[str, float]
    halves: Mapping[str, float]
    points: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What the middles are means of, drawn small and pale."""


def dots(path: Path, rows: Sequence[str], columns: Sequence[Dots]) -> Path:
    """Columns side by side over the same rows, the first row on top; a line marks 0 if it shows."""
    inches = (2.2 + 2.6 * len(columns), 0.9 + 0.3 * len(rows))
    with drawing(path, len(columns), inches) as (_, all_axes):
        for axes, column in zip(all_axes, columns, strict=True):
            for place, name in enumerate(rows):
                for value in column.points.get(name, ()):
                    axes.plot(value, place, "o", color=COLOURS[0], alpha=0.25, markersize=3)
                if name in column.middles:
                    axes.errorbar(
                        column.middles[name], place, xerr=column.halves.get(name), fmt="o",
                        color=COLOURS[0], capsize=3, markersize=5,
                    )  # fmt: skip
            is_first = axes is all_axes[0]
            axes.set_yticks(range(len(rows)), rows if is_first else [""] * len(rows))
            axes.set(xlabel=column.xlabel, ylim=(len(rows) - 0.5, -0.5))
            low, high = axes.get_xlim()
            if low < 0 < high:
                axes.axvline(0, color="black", linewidth=0.8)
    return path


@contextmanager
def drawing(path: Path, columns: int, inches: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure in the house's style with its axes in a row, saved to `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(inches, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)  # inches
        yield figure, figure.subplots(1, columns, squeeze=False)[0]
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw(axes: Any, name: str, line: Line, index: int) -> None:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    axes.plot(line.xs, line.ys, color=colour, linestyle=dash, linewidth=1.8, label=name)
    if line.halves:
        low = [y - half for y, half in zip(line.ys, line.halves, strict=True)]
        high = [y + half for y, half in zip(line.ys, line.halves, strict=True)]
        axes.fill_between(line.xs, low, high, color=colour, alpha=0.15, linewidth=0)

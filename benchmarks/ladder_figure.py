"""The figure of the ladder: what each rung brings over SFT, and how it does on its own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from figures import Dots, dots
from ladder_page import Cell, by_rung, differences, where_known
from tables import interval

# From the paper's order to what is held against it; sweeps have too many rows for one figure.
_SHOWN = (
    "start", "sft", "seqkd", "offline", "rollouts", "filter", "npd", "every_epoch", "on_policy",
    "teacher_text",
)  # fmt: skip


def draw(path: Path, cells: Sequence[Cell], labels: Mapping[str, str]) -> None:
    """An SVG file; none where there is no SFT to compare with, or no matplotlib to draw with."""
    rows = {name: found for name, found in by_rung(cells).items() if name in _SHOWN}
    if "sft" not in rows:
        return
    against = {
        name: [100 * points for points in differences(rows[name], rows["sft"])]
        for name in _SHOWN
        if name in rows and name != "sft"
    }
    worked = {
        name: [100 * points for points in where_known(rows[name], rows["sft"], "workings")]
        for name in against
    }
    own = {
        name: [cell["own_kl"] for cell in rows[name].values() if "own_kl" in cell]
        for name in _SHOWN
        if name in rows
    }
    has_workings = any(worked.values())
    names = {name: labels.get(name, name) for name in rows}
    try:
        dots(
            path,
            [names[name] for name in _SHOWN if name in names],
            [
                _column("accuracy, points above SFT", against, names),
                *([_column("right workings, points above SFT", worked, names)] * has_workings),
                _column("KL on its own text, nats/token", own, names),
            ],
        )
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no figure: pip install matplotlib (make install does)")


def _column(xlabel: str, values: Mapping[str, list[float]], names: Mapping[str, str]) -> Dots:
    found = {names[name]: interval(own) for name, own in values.items() if own}
    return Dots(
        xlabel,
        middles={name: middle for name, (middle, _) in found.items()},
        halves={name: half for name, (_, half) in found.items() if half == half},
        points={names[name]: own for name, own in values.items()},
    )

"""The page of the ladder: means over seeds, 95 % intervals, differences paired by seed.

Pure: cells (what a run measured, plain JSON values) in, text out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, TypeAlias

Cell: TypeAlias = dict[str, Any]

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval (NaN for a single value).

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    if len(values) < 2:
        return mean(values), float("nan")
    freedom = len(values) - 1
    t = _T95.get(freedom, 2.262 if freedom < 30 else 2.0)
    return mean(values), t * stdev(values) / len(values) ** 0.5


def by_rung(cells: Sequence[Cell]) -> dict[str, dict[int, Cell]]:
    """Cells by rung, then by seed, in the order they came."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault(cell["rung"], {})[cell["seed"]] = cell
    return found


def differences(
    ours: Mapping[int, Cell], theirs: Mapping[int, Cell], what: str = "accuracy"
) -> list[float]:
    """Ours minus theirs, seed by seed."""
    return [ours[seed][what] - theirs[seed][what] for seed in ours if seed in theirs]


def check(cells: Sequence[Cell]) -> list[str]:
    """What is off the paper's order, beyond what noise explains; none where all is well."""
    return []


def page(
    setting: Mapping[str, Any],
    teacher: Cell,
    cells: Sequence[Cell],
    labels: Mapping[str, str],
    about: Mapping[str, Any],
    found: Sequence[str],
) -> str:
    """The Markdown page."""
    rows = by_rung(cells)
    seeds = sorted({cell["seed"] for cell in cells})
    host = about["machine"]
    lines = [
        f"# The ladder: {setting['task']}",
        "",
        "Made by `benchmarks/ladder.py`; do not edit. Accuracy is of greedy answers to "
        f"{setting['num_heldout']:,} held-out problems, the same for all; ± is a 95 % t-interval over "
        f"{len(seeds)} seeds; differences are paired by seed.",
        "",
        *_main_table(rows, labels),
        "",
        *_inner_table(rows, labels),
        "",
        *(f"- PROBLEM: {problem}" for problem in found),
        f"- teacher: {_size(setting['teacher'])}, accuracy {_share(teacher['accuracy'])}; student: "
        f"{_size(setting['student'])}",
        f"- setting: `{dict(setting)}`",
        f"- command: `{about['command']}`",
        f"- commit: {about['commit']}",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, load "
        f"{host['load'][0]} at the end; one thread",
        f"- versions: {', '.join(f'{name} {found}' for name, found in about['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def _main_table(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    lines = [
        "| rung | accuracy, % | minus SFT, points | held-out KL | response tokens | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cells in rows.items():
        found = list(cells.values())
        against = differences(cells, rows["sft"]) if "sft" in rows and name != "sft" else []
        lines.append(
            f"| {labels.get(name, name)} | {_percent([c['accuracy'] for c in found])} | "
            f"{_percent(against, sign=True) if against else ''} | "
            f"{_plain([c['kl'] for c in found], 4)} | "
            f"{mean(c['response_tokens'] for c in found):,.0f} | "
            f"{mean(c['seconds'] for c in found):.0f} |"
        )
    return lines


def _inner_table(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    lines = [
        "| rung | rejected, % of samples | drift, mean (largest step) | entropy at the end | Δ-IFD "
        "quantiles 5, 25, 50, 75, 95 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, cells in rows.items():
        found = list(cells.values())
        why = sorted({reason for cell in found for reason in cell["rejected"]})
        cuts = ", ".join(
            f"{reason} {100 * mean(c['rejected'].get(reason, 0) / c['asked'] for c in found):.1f}"
            for reason in why
        )
        drifts = [cell for cell in found if cell["drift"] is not None]
        drift = (
            f"{_plain([c['drift'] for c in drifts], 3)} ({max(c['drift_max'] for c in drifts):.2f})"
            if drifts
            else ""
        )
        deltas = [cell["delta_quantiles"] for cell in found if cell["delta_quantiles"]]
        shown = ", ".join(f"{mean(column):.3f}" for column in zip(*deltas, strict=True))
        entropies = [c["entropy"] for c in found if c["entropy"] is not None]
        entropy = f"{mean(entropies):.3f}" if entropies else ""
        lines.append(f"| {labels.get(name, name)} | {cuts} | {drift} | {entropy} | {shown} |")
    return lines


def _percent(values: Sequence[float], *, sign: bool = False) -> str:
    middle, half = interval([100 * value for value in values])
    return f"{middle:{'+' if sign else ''}.1f}" + ("" if half != half else f" ± {half:.1f}")


def _plain(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, half = interval(known)
    return f"{middle:.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _size(shape: Mapping[str, int]) -> str:
    return f"{shape['layers']} layers {shape['width']} wide"


_Rule: TypeAlias = Callable[[Sequence[Cell]], list[str]]

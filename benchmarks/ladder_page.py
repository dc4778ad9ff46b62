"""The page of the ladder: means over seeds, 95 % intervals, differences paired by seed.

Pure: cells (what a run measured, plain JSON values) in, text and verdicts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any, TypeAlias

from tables import head, number, points, row

Cell: TypeAlias = dict[str, Any]

# What a short ladder must show, as means over its two seeds. Measured on those: 9.3 points over SFT
# (offline KD) and 10.0 (NPD), 0.7 of NPD over offline KD; a KL a sixth of SFT's. The rest is room
# for other machines, whose float noise makes other runs of these.
MARGINS = {("offline", "sft"): 0.04, ("npd", "sft"): 0.04, ("npd", "offline"): -0.03}
MOST_KL = {("offline", "sft"): 0.5, ("npd", "sft"): 0.5}
"""The most that the later rung's held-out KL may be, as a share of the earlier one's."""
ORDER = ("sft", "offline", "rollouts", "filter", "npd")
"""The paper's (2605.05940)."""
# Its points in that order: the average of 11 benchmarks, a 1B student.
_PAPER = {"sft": 56.28, "offline": 58.79, "rollouts": 61.63, "filter": 62.78, "npd": 64.37}
_SKIP = "-skip"  # what the names of rungs end in that skip
_OTHERS = (*ORDER, "seqkd", "on_policy", "every_epoch", "sft_long", "teacher_text")


def by_rung(cells: Sequence[Cell]) -> dict[str, dict[int, Cell]]:
    """Cells by rung, then by seed, in the order they came."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault(cell["rung"], {})[cell["seed"]] = cell
    return found


def differences(
    ours: Mapping[int, Cell], theirs: Mapping[int, Cell], what: str = "accuracy"
) -> list[float]:
    """Ours minus theirs, of the seeds that both have."""
    return [ours[seed][what] - theirs[seed][what] for seed in ours if seed in theirs]


def where_known(
    ours: Mapping[int, Cell], theirs: Mapping[int, Cell], what: str = "own_kl"
) -> list[float]:
    """Differences of a figure that older cells lack, where both seeds have it."""
    ours, theirs = (
        {seed: cell for seed, cell in cells.items() if what in cell} for cells in (ours, theirs)
    )
    return differences(ours, theirs, what)


def _ratios(ours: Mapping[int, Cell], theirs: Mapping[int, Cell], what: str) -> list[float]:
    """Ours as a share of theirs, of the seeds that both have."""
    return [ours[seed][what] / theirs[seed][what] for seed in ours if seed in theirs]


def check(cells: Sequence[Cell]) -> list[str]:
    """Where the mean over seeds is off the order by more than its margin; none if all is well."""
    rows = by_rung(cells)
    problems = []
    for (later, earlier), margin in MARGINS.items():
        points = 100 * mean(differences(rows[later], rows[earlier]))
        if points < 100 * margin:
            problems.append(
                f"{later} minus {earlier}: {points:+.1f} points, at least {100 * margin:+.1f} "
                "expected"
            )
    for (later, earlier), most in MOST_KL.items():
        ratio = mean(rows[later][seed]["kl"] / rows[earlier][seed]["kl"] for seed in rows[later])
        if ratio > most:
            problems.append(
                f"{later}: KL {ratio:.2f} of that of {earlier}, at most {most} expected"
            )
    return problems


def page(
    setting: Mapping[str, Any],
    teacher: Cell,
    cells: Sequence[Cell],
    labels: Mapping[str, str],
    about: Mapping[str, Any],
    problems: Sequence[str],
) -> str:
    """The Markdown page."""
    rows, host = by_rung(cells), about["machine"]
    measured_at = sorted({cell["commit"] for cell in cells})
    lines = [
        f"# The ladder in miniature: {setting['task']}",
        "",
        "Made by `benchmarks/ladder.py`; do not edit. What each row is, is said there.",
        "",
        f"Accuracy: greedy answers to {setting['num_heldout']:,} held-out problems, the same for "
        "all; right workings: every step of them right. ±: 95 % t-interval of the mean over seeds "
        "(each with prompts, a student and a start of its own). Differences are paired by seed. "
        "Rows with fewer seeds: what there was time for. Sampled accuracy and KL(teacher || "
        "student) on own text: of one answer to each of 500 held-out problems, drawn at "
        "temperature 1.",
        "",
        *_outcomes(rows, labels),
        "",
        *_steps(rows, labels),
        "",
        *_skips(rows, labels),
        *_variants(rows, labels),
        *_insides(rows, labels),
        "",
        *(f"- OFF THE ORDER: {problem}" for problem in problems),
        f"- teacher: {_shape(setting['teacher'])}, {100 * teacher['accuracy']:.1f} % right; "
        f"student: {_shape(setting['student'])}",
        f"- setting: `{' '.join(f'{name}={value}' for name, value in setting.items())}`",
        f"- command: `{about['command']}`",
        f"- commits of the runs: {', '.join(measured_at)}",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, load "
        f"{host['load'][0]} at the end; one thread",
        f"- versions: {', '.join(f'{name} {found}' for name, found in about['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def _outcomes(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """How good each rung is, and what it took."""
    lines = head(
        "rung", "seeds", "accuracy, %", "minus SFT, points", "right workings, %",
        "minus SFT, points", "sampled accuracy, %",
        "held-out KL, nats/token", "KL on its own text", "response tokens trained on", "CPU s",
    )  # fmt: skip
    for name, cells in rows.items():
        found = list(cells.values())
        base = rows["sft"] if "sft" in rows and name != "sft" else {}
        against = differences(cells, base)
        lines.append(
            row(
                labels.get(name, name),
                str(len(found)),
                points([cell["accuracy"] for cell in found]),
                points(against, signed=True),
                points(_known(found, "workings")),
                points(where_known(cells, rows["sft"], "workings") if against else [], signed=True),
                points(_known(found, "sampled_accuracy")),
                number([cell["kl"] for cell in found], 4),
                number(_known(found, "own_kl"), 4),
                f"{mean(cell['response_tokens'] for cell in found):,.0f}",
                f"{mean(cell['cpu_seconds'] for cell in found):.0f}",
            )
        )
    return lines


def _steps(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """What each rung of the paper's order brings over the one before."""
    present = [name for name in ORDER if name in rows]
    if len(present) < 2:
        return []
    lines = head(
        "step of the ladder", "points", "seeds above 0", "right workings, points", "seeds above 0",
        "the paper's points", "KL, nats/token", "KL on its own text", "mean drift, nats/token",
    )  # fmt: skip
    for before, after in [*pairwise(present), (present[0], present[-1])]:
        have_drift = all(
            cell["drift"] is not None for name in (before, after) for cell in rows[name].values()
        )
        drift = differences(rows[after], rows[before], "drift") if have_drift else []
        right, kl = _gains(rows[after], rows[before])
        paper = f"{_PAPER[after] - _PAPER[before]:+.2f}"
        label = f"{labels[before]} → {labels[after]}"
        lines.append(row(label, *right, paper, *kl, number(drift, 3, signed=True)))
    return lines


def _gains(after: Mapping[int, Cell], before: Mapping[int, Cell]) -> tuple[list[str], list[str]]:
    """Right answers and workings, each with its seeds above 0; both KLs."""
    gained = differences(after, before)
    worked = where_known(after, before, "workings")
    right = [text for found in (gained, worked) for text in (_signed(found), _above(found))]
    kl = (differences(after, before, "kl"), where_known(after, before))
    return right, [number(found, 4, signed=True) for found in kl]


def _signed(values: Sequence[float]) -> str:
    return points(values, signed=True)


def _skips(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """What `loss.skip_after` changes in each rung; nothing where none was run."""
    lines = head(
        "with `loss.skip_after`", "against", "points", "seeds above 0", "right workings, points",
        "seeds above 0", "KL, nats/token", "KL on its own text",
    )  # fmt: skip
    found = [name for name in rows if name.endswith(_SKIP)]
    for name in found:
        for base in (name.removesuffix(_SKIP), "offline"):
            if base in rows:
                right, kl = _gains(rows[name], rows[base])
                lines.append(row(labels[name], labels[base], *right, *kl))
    return [*lines, ""] if found else []


def _above(values: Sequence[float]) -> str:
    return f"{sum(value > 0 for value in values)} of {len(values)}" if values else ""


def _variants(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """What one other choice in NPD changes; nothing where none was run."""
    present = [
        name for name in rows if name in labels and not (name in _OTHERS or name.endswith(_SKIP))
    ]
    if not present or "npd" not in rows:
        return []
    lines = head(
        "NPD, but for", "seeds", "points against NPD", "right workings against NPD, points",
        "KL against NPD", "KL on its own text",
        "response tokens, of NPD's", "CPU time, of NPD's",
    )  # fmt: skip
    for name in present:
        accuracy = differences(rows[name], rows["npd"])
        kl = differences(rows[name], rows["npd"], "kl")
        lines.append(
            row(
                labels[name],
                str(len(accuracy)),
                points(accuracy, signed=True),
                points(where_known(rows[name], rows["npd"], "workings"), signed=True),
                number(kl, 4, signed=True),
                number(where_known(rows[name], rows["npd"]), 4, signed=True),
                number(_ratios(rows[name], rows["npd"], "response_tokens"), 2),
                number(_ratios(rows[name], rows["npd"], "cpu_seconds"), 2),
            )
        )
    return [*lines, ""]


def _insides(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """What was cut, how far students went from their snapshots, how sure they ended."""
    lines = head(
        "rung", "left out, % of samples", "of them right, %", "of kept right, %", "drift, mean",
        "drift, last tenth", "entropy, last tenth", "Δ-IFD at 5, 25, 50, 75, 95 %",
    )  # fmt: skip
    for name, cells in rows.items():
        found = list(cells.values())
        reasons = sorted({reason for cell in found for reason in cell["rejected"]})
        shares = {
            reason: mean(cell["rejected"].get(reason, 0) / cell["asked"] for cell in found)
            for reason in reasons
        }
        kept = [share for cell in found if (share := _kept(cell)) is not None]
        deltas = [cell["delta_quantiles"] for cell in found if cell["delta_quantiles"]]
        lines.append(
            row(
                labels.get(name, name),
                ", ".join(f"{reason} {100 * share:.1f}" for reason, share in shares.items()),
                _lost(found, reasons),
                points(kept),
                number([cell["drift"] for cell in found], 4),
                number([cell["drift_end"] for cell in found], 4),
                number([cell["entropy"] for cell in found], 3),
                ", ".join(f"{mean(column):.3f}" for column in zip(*deltas, strict=True)),
            )
        )
    return lines


def _known(cells: Sequence[Cell], what: str) -> list[float]:
    """A figure of those that have it (older ones lack some)."""
    return [cell[what] for cell in cells if what in cell]


def _kept(cell: Cell) -> float | None:
    share: float | None = cell.get("right", {}).get("kept")
    return share


def _lost(found: Sequence[Cell], reasons: Sequence[str]) -> str:
    """Of the samples left out for each reason, the share that was right (mean over seeds)."""
    shown = []
    for reason in reasons:
        shares = [cell["right"][reason] for cell in found if reason in cell.get("right", {})]
        if shares:
            shown.append(f"{reason} {100 * mean(shares):.0f}")
    return ", ".join(shown)


def _shape(shape: Mapping[str, int]) -> str:
    return f"{shape['layers']} layers {shape['width']} wide"

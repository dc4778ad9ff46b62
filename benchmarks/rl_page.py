"""The page and the figure of RL afterwards: means over seeds, gains paired by seed.

Pure but for the figure's file: a record (what was run and measured, plain JSON values) in, text
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from figures import Line, Panel, curves
from ladder_page import Cell, by_rung
from tables import head, interval, number, points, row

Rows: TypeAlias = Mapping[str, Mapping[int, Cell]]

LABELS = {"sft": "SFT", "npd": "NPD", "no_filter": "NPD without filter"}
# 2605.05940: what GRPO gains from either start; what the filter adds to NPD's gain.
_PAPER_GAIN = {"npd": 4.36, "sft": 3.58}
_PAPER_FILTER = 1.88


def gain(cell: Cell) -> float:
    """What RL added to the share of right greedy answers."""
    return float(last(cell) - first(cell))


def first(cell: Cell) -> float:
    """Greedy accuracy before RL."""
    return float(cell["curve"][0][1])


def last(cell: Cell) -> float:
    """Greedy accuracy after RL."""
    return float(cell["curve"][-1][1])


def sampled_gain(cell: Cell) -> float:
    """What RL added to pass@1 at temperature 1."""
    return sampled_last(cell) - float(cell["before"]["pass"]["1"])


def sampled_last(cell: Cell) -> float:
    """pass@1 at temperature 1 after RL."""
    return float(cell["after"]["pass"]["1"])


def paired(rows: Rows, ours: str, theirs: str, what: Callable[[Cell], float]) -> list[float]:
    """`what` of ours minus of theirs, of the seeds that both have."""
    return [
        what(rows[ours][seed]) - what(rows[theirs][seed])
        for seed in rows[ours]
        if seed in rows[theirs]
    ]


def page(record: Mapping[str, Any]) -> str:
    """The Markdown page."""
    rows, host, rl = by_rung(record["cells"]), record["machine"], record["rl"]
    num_heldout, seconds = record["setting"]["num_heldout"], cpu_seconds(record)
    lines = [
        f"# RL afterwards, in miniature: {record['setting']['task']}",
        "",
        "Made by `benchmarks/rl.py`; do not edit.",
        "",
        f"GRPO (TRL's, by `examples/grpo.py`) from students of the ladder: {rl['steps']} steps of "
        f"{rl['prompts']} problems, new draws for each seed ({_seen(record)}), "
        f"{rl['samples']} samples each, the same for all students of a seed; reward 1 for a right "
        f"answer. Accuracy: greedy answers to {num_heldout:,} held-out problems. ±: 95 % "
        "t-interval of the mean over seeds; differences are paired by seed. Left out: of the "
        "samples that a student's distillation asked for, those it was not trained on.",
        "",
        *_gains(rows, by_rung(record["ladder"])),
        "",
        *_claims(rows),
        "",
        f"Exploration, at temperature 1: pass@k on {rl['problems']} held-out problems from "
        f"{rl['draws']} draws each (unbiased), entropy of the policy on its own text, in nats a "
        "token. No signal: of the groups of samples, those that were all right or all wrong.",
        "",
        *_exploration(rows),
        "",
        *_spread(rows),
        "![accuracy, reward and entropy over GRPO's steps](rl.svg)",
        "",
        "- the band is the 95 % t-interval of the mean over seeds; reward and entropy are of the "
        "samples trained on, means of ten steps",
        *(f"- {note}" for note in record.get("notes", ())),
        f"- GRPO: `{' '.join(f'{name}={value}' for name, value in rl.items())}`, learning rate "
        "rising for a tenth of the steps, then falling to 0; else TRL's defaults",
        f"- students: `{' '.join(f'{k}={v}' for k, v in record['setting'].items())}`",
        f"- CPU time: {seconds['rl']:.1f} min of GRPO and its evaluations, {seconds['ladder']:.1f} "
        "min of the ladder's teacher and rungs",
        f"- command: `{record['command']}`",
        f"- commits of the runs: {', '.join(sorted({cell['commit'] for cell in record['cells']}))}",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, load "
        f"{host['load'][0]} at the end; one thread",
        f"- versions: {', '.join(f'{name} {at}' for name, at in record['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def cpu_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """Minutes of CPU time, of GRPO and of what came before it."""
    spent = sum(cell["cpu_seconds"] for cell in record["cells"])
    return {"rl": spent / 60, "ladder": record["ladder_cpu_seconds"] / 60}


def _seen(record: Mapping[str, Any]) -> str:
    """How many of GRPO's problems were not new to what came before it."""
    ranges = []
    for whose in ("teacher", "start", "rungs"):
        counts = [seed[whose] for seed in record["seen"]]
        few, many = min(counts), max(counts)
        ranges.append(f"{few} to {many}" if few < many else str(few))
    total = record["rl"]["steps"] * record["rl"]["prompts"]
    return (
        f"of the {total:,}, by chance, {ranges[0]} are also in the teacher's training set, "
        f"{ranges[1]} in that of the ladder's start and {ranges[2]} in that of the rungs"
    )


def left_out(cell: Cell) -> float:
    """Of the samples that a run asked for, the share that it did not train on."""
    return float(sum(cell["rejected"].values()) / cell["asked"])


def _gains(rows: Rows, ladder: Rows) -> list[str]:
    lines = head(
        "start", "seeds", "accuracy before, %", "after, %", "gain, points", "seeds above 0",
        "the paper's gain", "left out, %", "CPU s",
    )  # fmt: skip
    for name, cells in rows.items():
        found = list(cells.values())
        gains = [gain(cell) for cell in found]
        lines.append(
            row(
                LABELS.get(name, name),
                str(len(found)),
                points([first(cell) for cell in found]),
                points([last(cell) for cell in found]),
                points(gains, signed=True),
                f"{sum(value > 0 for value in gains)} of {len(gains)}",
                f"{_PAPER_GAIN[name]:+.2f}" if name in _PAPER_GAIN else "",
                points([left_out(ladder[name][seed]) for seed in cells]),
                f"{mean(cell['cpu_seconds'] for cell in found):.0f}",
            )
        )
    return lines


def _claims(rows: Rows) -> list[str]:
    """What differs between starts, seed by seed."""
    lines = head("difference", "points", "each seed's", "the paper's points")
    gap = f"{_PAPER_GAIN['npd'] - _PAPER_GAIN['sft']:+.2f}"
    wanted = [
        ("before RL, NPD minus SFT", "npd", "sft", first, ""),
        ("gain from NPD minus gain from SFT", "npd", "sft", gain, gap),
        ("after RL, NPD minus SFT", "npd", "sft", last, ""),
        ("gain in pass@1, NPD's minus SFT's", "npd", "sft", sampled_gain, ""),
        ("after RL, pass@1, NPD minus SFT", "npd", "sft", sampled_last, ""),
        ("what the filter adds to the gain", "npd", "no_filter", gain, f"{_PAPER_FILTER:+.2f}"),
        ("after RL, with minus without filter", "npd", "no_filter", last, ""),
    ]
    for label, ours, theirs, what, paper in wanted:
        if ours in rows and theirs in rows:
            found = paired(rows, ours, theirs, what)
            each = ", ".join(f"{100 * value:+.1f}" for value in found)
            lines.append(row(label, points(found, signed=True), each, paper))
    return lines


def _exploration(rows: Rows) -> list[str]:
    ks = list(next(iter(next(iter(rows.values())).values()))["before"]["pass"])
    lines = head(
        "start", "", *(f"pass@{k}, %" for k in ks), "entropy", "reward, first and last tenth",
        "no signal, %",
    )  # fmt: skip
    for name, cells in rows.items():
        found = list(cells.values())
        few = _tenth(found)
        for when, part in (("before", slice(None, few)), ("after", slice(-few, None))):
            lines.append(
                row(
                    LABELS.get(name, name),
                    when,
                    *(points([cell[when]["pass"][k] for cell in found]) for k in ks),
                    number([cell[when]["entropy"] for cell in found], 3),
                    number([mean(cell["reward"][part]) for cell in found], 3),
                    points([mean(cell["no_signal"][part]) for cell in found]),
                )
            )
    return lines


def _spread(rows: Rows) -> list[str]:
    """How much more NPD explores than SFT; nothing where one of them is missing."""
    if not {"npd", "sft"} <= rows.keys():
        return []
    k = list(next(iter(rows["sft"].values()))["before"]["pass"])[-1]
    said = []
    for when in ("before", "after"):
        entropy = paired(rows, "npd", "sft", lambda cell, at=when: cell[at]["entropy"])
        passed = paired(rows, "npd", "sft", lambda cell, at=when: cell[at]["pass"][k])
        said.append(
            f"{when} RL {number(entropy, 3, signed=True)} nats a token and "
            f"{points(passed, signed=True)} points of pass@{k}"
        )
    return [f"NPD minus SFT, paired: {'; '.join(said)}.", ""]


def _tenth(cells: Sequence[Cell]) -> int:
    return max(1, len(cells[0]["reward"]) // 10)


def draw(path: Path, record: Mapping[str, Any]) -> Path:
    """The figure: accuracy, reward and entropy over steps, mean and band over seeds."""
    rows = by_rung(record["cells"])
    panels = [
        Panel("held-out accuracy, %", _lines(rows, accuracy_curve)),
        Panel("accuracy minus SFT's, points", _against(rows, "sft")),
        Panel("mean reward of samples", _lines(rows, lambda cell: smooth(cell["reward"]))),
        Panel("entropy, nats/token", _lines(rows, lambda cell: smooth(cell["entropy"]))),
    ]
    return curves(path, panels, "GRPO step")


def _against(rows: Rows, name: str) -> dict[str, Line]:
    """Accuracy minus that of `name`'s at the same step, seed by seed."""
    base = {seed: accuracy_curve(cell) for seed, cell in rows.get(name, {}).items()}

    def curve(cell: Cell) -> list[tuple[float, float]]:
        pairs = zip(accuracy_curve(cell), base[cell["seed"]], strict=True)
        return [(step, ours - theirs) for (step, ours), (_, theirs) in pairs]

    shared = {
        other: {seed: cell for seed, cell in cells.items() if seed in base}
        for other, cells in rows.items()
    }
    return _lines({other: cells for other, cells in shared.items() if cells}, curve)


def accuracy_curve(cell: Cell) -> list[tuple[float, float]]:
    """Held-out accuracy in per cent at the steps it was measured."""
    return [(step, 100 * value) for step, value in cell["curve"]]


def smooth(values: Sequence[float], width: int = 10) -> list[tuple[float, float]]:
    """Means of `width` values in a row, each at the middle of its steps (which count from 1)."""
    found = []
    for at in range(0, len(values), width):
        part = values[at : at + width]
        found.append((at + (len(part) + 1) / 2, mean(part)))
    return found


def _lines(rows: Rows, curve: Callable[[Cell], list[tuple[float, float]]]) -> dict[str, Line]:
    lines = {}
    for name, cells in rows.items():
        found = [curve(cell) for cell in cells.values()]
        middle = [interval([y for _, y in at]) for at in zip(*found, strict=True)]
        halves = [half for _, half in middle] if len(found) > 1 else []
        xs, ys = [x for x, _ in found[0]], [y for y, _ in middle]
        lines[LABELS.get(name, name)] = Line(xs, ys, halves)
    return lines

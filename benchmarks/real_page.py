"""The page of `real.py`: each rung, and what it changes against the one before, paired by seed.

Pure: cells (what a run measured, plain JSON values) in, text out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ladder_page import Cell, by_rung, differences
from pair_out import BOUND, FEWER, OWN_KL, foot, spread
from tables import head, row

# Rungs and what each is held against, where both were run.
STEPS = (
    ("sft", "offline"), ("offline", "rollouts"), ("rollouts", "filter"), ("filter", "npd"),
    ("rollouts", "npd"), ("offline", "npd"), ("sft", "npd"), ("npd", "tail"),
    ("tail", "tail-lambda=1"), ("npd", "tail-lambda=1"), ("npd", "every_epoch"),
    ("npd", "on_policy"),
)  # fmt: skip
SAME = "identical runs: nothing was rejected"


def page(
    start: Cell, cells: Sequence[Cell], labels: Mapping[str, str], about: Mapping[str, Any]
) -> str:
    """The Markdown page."""
    rows = by_rung(cells)
    setting = about["setting"]
    lines = [
        "# The ladder on the real pair",
        "",
        "Made by `benchmarks/real.py`; do not edit. What each row is, is said there.",
        "",
        "Teacher: SmolLM2-135M-Instruct. Student: 15 of its 30 layers, fine-tuned on the "
        f"teacher's responses to {setting['warm_prompts']} prompts (start). Held out: "
        f"{setting['num_heldout']} prompts, the same for all. ±: 95 % t-interval of the mean over "
        "seeds, each with prompts of its own, sampling and order; without it, one seed. The start "
        f"is the same for all: it is in no interval. {BOUND} {FEWER}",
        "",
        *_outcomes(start, rows, labels),
        "",
        *_steps(rows, labels),
        "",
        *foot(about, setting, [load for cell in cells for load in cell["load"]]),
    ]
    return "\n".join(lines) + "\n"


def _outcomes(
    start: Cell, rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]
) -> list[str]:
    lines = head(
        "rung", "seeds", "held-out KL, nats/token", OWN_KL, "same top token, %",
        "ROUGE-L, %", "mean drift, nats/token", "teacher's mass in its top-k, %", "left out, %",
        "response tokens trained on", "CPU s",
    )  # fmt: skip
    for label, cells in [
        ("as pruned", [{**_nothing(start), "kl": start["start_kl"]}]),
        ("start", [start]),
        *((labels[name], list(found.values())) for name, found in rows.items()),
    ]:
        lines.append(_outcome(label, cells))
    return lines


def _nothing(start: Cell) -> Cell:
    """A row of which only the start's own first evaluation is known."""
    return {"load": start["load"]}


def _outcome(label: str, cells: Sequence[Cell]) -> str:
    def column(name: str, digits: int, scale: float = 1.0) -> str:
        known = [scale * cell[name] for cell in cells if cell.get(name) is not None]
        return spread(known, digits)

    lost = [100 * sum(c["rejected"].values()) / c["asked"] for c in cells if "rejected" in c]
    return row(
        label,
        str(len(cells)),
        column("kl", 4),
        column("own_kl", 4),
        column("agreement", 1, 100),
        column("rouge_l", 1, 100),
        column("drift", 3),
        column("teacher_mass", 1, 100),
        spread(lost, 1),
        f"{mean(c['response_tokens'] for c in cells):,.0f}"
        if "response_tokens" in cells[0]
        else "",
        column("cpu_seconds", 0),
    )


def is_same(before: Mapping[int, Cell], after: Mapping[int, Cell]) -> bool:
    """Whether two rungs have the same runs, all that was measured alike, and nothing left out."""
    shared = [(before[seed], after[seed]) for seed in after if seed in before]
    return bool(shared) and all(
        not one["rejected"]
        and not other["rejected"]
        and all(one[name] == other[name] for name in ("kl", "own_kl", "rouge_l", "drift"))
        for one, other in shared
    )


def _steps(rows: Mapping[str, Mapping[int, Cell]], labels: Mapping[str, str]) -> list[str]:
    """What rungs bring over others (`STEPS`)."""
    present = list(rows)
    if len(present) < 2:
        return []
    lines = head(
        "step", "held-out KL", "seeds better", OWN_KL, "seeds better",
        "ROUGE-L, points", "seeds better",
    )  # fmt: skip
    for before, after in [pair for pair in STEPS if set(pair) <= set(present)]:
        if is_same(rows[before], rows[after]):
            step = f"{labels[before]} → {labels[after]}"
            seeds = sum(seed in rows[before] for seed in rows[after])
            lines.append(row(step, f"{SAME} (seeds: {seeds})", *[""] * 5))
            continue
        kl = differences(rows[after], rows[before], "kl")
        own = differences(rows[after], rows[before], "own_kl")
        rouge = [100 * value for value in differences(rows[after], rows[before], "rouge_l")]
        lines.append(
            row(
                f"{labels[before]} → {labels[after]}",
                spread(kl, 4, signed=True),
                f"{sum(value < 0 for value in kl)} of {len(kl)}",
                spread(own, 4, signed=True),
                f"{sum(value < 0 for value in own)} of {len(own)}",
                spread(rouge, 1, signed=True),
                f"{sum(value > 0 for value in rouge)} of {len(rouge)}",
            )
        )
    return lines

"""The page of `peers_run.py`: three numbers against each peer, where the time goes, the curves.

Pure: cells (what a run measured, plain JSON values) in, text out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

from common import number
from pair_out import BOUND, FEWER, OWN_KL, foot, spread
from tables import head, row

Cell: TypeAlias = dict[str, Any]

NAMES = {
    "npd": "npd, preset `npd`",
    "npd_tail": "npd, second setting",
    "distillation": "TRL `DistillationTrainer`",
    "gkd": "TRL `GKDTrainer`",
}
OURS = ("npd", "npd_tail")
# What is aimed at: the paper's factor for a trainer's speed, three times the samples, a third of
# the time.
TARGETS = {"trainer": 8.1, "samples": 3.0, "time": 1 / 3}
TRAINER = "trainer tokens/s (TRL: of whole steps)"
BARE = "tokens/s without generation and the teacher's layers"
REST = "student, heads, loss, optimiser"
# What less of is better: the name on a curve and the words for it. Wrong: on a task of the ladder.
KLS = {"kl": "held-out KL", "own_kl": "KL on own text", "wrong": "share of wrong workings"}
NO_TARGET = "no target: the peer is never below its start"


def target_of(curve: Sequence[Mapping[str, float]], kl: str) -> tuple[float, float] | None:
    """The lowest `kl` after the start and the CPU time of it; None if none is below the start."""
    best = min(curve[1:], key=lambda point: point[kl], default=None)
    if best is None or best[kl] >= curve[0][kl]:
        return None
    return best[kl], best["seconds"]


def reached_at(curve: Sequence[Mapping[str, float]], kl: str, value: float) -> float | None:
    """CPU time of the first evaluation after the start whose `kl` is at most `value`."""
    return next((point["seconds"] for point in curve[1:] if point[kl] <= value), None)


def speeds(cell: Cell) -> dict[str, float]:
    """The rates of one run: tokens a second of the trainer, samples an hour of all it took.

    `bare`: tokens a second of training alone, without generation and the teacher's layers; npd's
    trainer has neither.
    """
    hours = cell["seconds"]["step"] / 3600
    bare = parts(cell["seconds"]).get(REST, cell["trainer_seconds"])
    return {
        "trainer": cell["tokens"] / cell["trainer_seconds"],
        "bare": cell["tokens"] / bare,
        "samples": cell["samples"] / hours,
        "fresh": cell["fresh"] / hours,
    }


def page(start: Cell, cells: Sequence[Cell], about: Mapping[str, Any]) -> str:
    """The Markdown page."""
    sides = {name: [c for c in cells if c["side"] == name] for name in NAMES}
    sides = {name: found for name, found in sides.items() if found}
    known = {name: words for name, words in KLS.items() if name in start}
    lines = [
        f"# Whole runs against TRL, on the {_pair_of(about)}",
        "",
        "Made by `benchmarks/peers_run.py`; do not edit. What is counted, and how the sides are "
        f"kept alike, is said there. {_time_of(about)}; ±: 95 % t-interval over seeds; without "
        "it, one seed. Ratios are npd's over the peer's, paired by seed: of rates (1 and 2) more "
        f"is better, of the time (3) less. Met: by every seed. {BOUND} {FEWER}",
        "",
        _weights(about["setting"], about.get("tried", ()), has_second="npd_tail" in sides),
        "",
        f"The start: {', '.join(f'{words} {start[name]:.4f}' for name, words in known.items())}; "
        f"fine-tuned from a student at held-out KL {start['start_kl']:.3f}. It is the same for all "
        "seeds, and so is the teacher; seeds have prompts of their own.",
        "",
        *_numbers(sides, known),
        "",
        *_ratios(sides, known),
        "",
        *_where(sides),
        "",
        *_curves(sides, known),
        "",
        *_second(about, has_second="npd_tail" in sides),
        *_tried(about),
        *foot(about, about["setting"], [load for c in cells for load in c["load"]]),
    ]
    return "\n".join(lines) + "\n"


def _pair_of(about: Mapping[str, Any]) -> str:
    task = about.get("task")
    return f"ladder's pair (task {task})" if task else "real pair"


def _second(about: Mapping[str, Any], *, has_second: bool) -> list[str]:
    told = ", ".join(f"{name}={value}" for name, value in about["second"].items())
    return [f"- npd's second setting: {told}"] if has_second else []


def _tried(about: Mapping[str, Any]) -> list[str]:
    """What was tried before."""
    if "tuned_task" in about:
        rates = "; ".join(
            f"{NAMES[side]} {rate:g}: {kl:.4f}, {own:.4f}, {wrong:.3f} ({seconds})"
            for side, rate, seconds, kl, own, wrong in about["tuned_task"]
        )
        return [
            "- learning rates tried before on sums, one run each, other prompts: lowest held-out "
            f"KL, KL on own text, share of wrong workings (of so many CPU s): {rates}"
        ]
    if "tuned" not in about:
        return []
    rates = "; ".join(
        f"{NAMES.get(side, side)} ({start}){f' {dtype}' if dtype else ''} {rate:g}: {kl:.3f}, "
        f"{own:.3f} ({seconds})"
        for side, start, rate, dtype, seconds, kl, own in about["tuned"]
    )
    sizes = "; ".join(
        f"{name} {dtype} batch {n}: {rate}" for name, dtype, n, rate in about["tried"]
    )
    return [
        "- learning rates tried before, one run each, 64 tokens (prompts of the start): held-out "
        f"KL, KL on own text after so many CPU s: {rates}",
        f"- tried for TRL before, two steps each, samples a CPU second: {sizes}",
    ]


def _time_of(about: Mapping[str, Any]) -> str:
    is_cpu = about["setting"].get("device", "cpu") == "cpu"
    return (
        "CPU time of one thread" if is_cpu else "CPU time here means wall time, the GPU's included"
    )


def _weights(
    setting: Mapping[str, Any], tried: Sequence[Sequence[Any]], *, has_second: bool
) -> str:
    """What the sides' weights and learning rates are."""
    dtype = setting["peer_dtype"]
    fastest = max(tried, key=lambda one: one[3])[1] if tried else None
    why = ", the fastest of those tried" if dtype == fastest else ""
    second = (
        f", and {setting['second_lr']:g} with the second setting, which was made after the preset "
        "had been seen"
    )
    return (
        f"TRL: {dtype} weights and optimiser state{why}, learning rate {setting['peer_lr']:g}; "
        f"npd: float32 weights, {setting['npd_lr']:g}{second if has_second else ''}. Speeds are "
        "comparable; of KLs remember that, and that rates were chosen by few runs (see below)."
    )


def _numbers(sides: Mapping[str, Sequence[Cell]], known: Mapping[str, str]) -> list[str]:
    lines = head(
        "", "seeds", TRAINER, BARE, "samples trained on, an hour", "fresh samples, an hour",
        "CPU s", "samples trained on", "of them fresh",
        *(f"{OWN_KL if name == 'own_kl' else words}, at the end" for name, words in known.items()),
    )  # fmt: skip
    for name, cells in sides.items():
        found = [speeds(cell) for cell in cells]
        lines.append(
            row(
                NAMES[name],
                str(len(cells)),
                spread([speed["trainer"] for speed in found]),
                spread([speed["bare"] for speed in found]),
                spread([speed["samples"] for speed in found]),
                spread([speed["fresh"] for speed in found]),
                spread([cell["seconds"]["step"] for cell in cells]),
                f"{mean(cell['samples'] for cell in cells):,.0f}",
                f"{mean(cell['fresh'] for cell in cells):,.0f}",
                *(spread([cell[kl] for cell in cells], 4) for kl in known),
            )
        )
    return lines


def _ratios(sides: Mapping[str, Sequence[Cell]], known: Mapping[str, str]) -> list[str]:
    lines = head("", "against", "what", "ratio", "aim", "result")
    for own in OURS:
        mine = {cell["seed"]: cell for cell in sides.get(own, ())}
        for name, cells in sides.items():
            pairs = [(mine[cell["seed"]], cell) for cell in cells if cell["seed"] in mine]
            if name not in OURS and pairs:
                rows = [*_speed_ratios(pairs), *(_time(pairs, *kind) for kind in known.items())]
                lines += [row(NAMES[own], NAMES[name], *cells) for cells in rows]
    return lines


def _speed_ratios(pairs: Sequence[tuple[Cell, Cell]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for what, label in (
        ("trainer", f"1. {TRAINER}"),
        ("bare", f"1. {BARE}"),
        ("samples", "2. samples trained on, an hour"),
        ("fresh", "2. fresh samples, an hour"),
    ):
        values = [speeds(mine)[what] / speeds(theirs)[what] for mine, theirs in pairs]
        aim = TARGETS.get(what)
        result = "" if aim is None else _verdict(values, aim)
        lines.append((label, spread(values), "" if aim is None else f">= {aim:g}", result))
    return lines


def _verdict(values: Sequence[float], aim: float) -> str:
    """Met is what every seed meets; of values of which more is better."""
    if mean(values) < aim:
        return "MISSED"
    return "met" if min(values) >= aim else "met on average, not by every seed"


def _time(pairs: Sequence[tuple[Cell, Cell]], kl: str, name: str) -> tuple[str, ...]:
    """CPU time of npd to each peer's lowest `kl`, as a share of the peer's.

    A seed whose peer is never below its start sets no target, and is in no verdict.
    """
    label = f"3. CPU time to the peer's lowest {name}, share"
    shares, notes = [], []
    for mine, theirs in pairs:
        target = target_of(theirs["curve"], kl)
        if target is None:
            notes.append(f"seed {theirs['seed']}: {NO_TARGET}")
            continue
        value, seconds = target
        reached = reached_at(mine["curve"], kl, value)
        if reached is None:
            shares.append(math.inf)
            notes.append(f"seed {theirs['seed']}: npd never at {value:.4f}")
        else:
            shares.append(reached / seconds)
            unit = "" if kl == "wrong" else "KL "
            notes.append(f"{unit}{value:.4f}: {reached:.0f} s against {seconds:.0f} s")
    if not shares:
        return label, "", "<= 1/3", NO_TARGET
    known = [share for share in shares if math.isfinite(share)]
    what = f"{spread(known) if known else 'none'} ({'; '.join(notes)})"
    result = _verdict([-share for share in shares], -TARGETS["time"])
    return label, what, "<= 1/3", result


def _where(sides: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Where the time goes: seconds a sample trained on, by part, and what a sample is."""
    lines = head(
        "", "part", "share of CPU time, %", "ms a sample trained on", "ms a fresh sample",
        "tokens a sample", "response tokens a sample",
    )  # fmt: skip
    for name, cells in sides.items():
        for part in parts(cells[0]["seconds"]):
            shares = [parts(cell["seconds"])[part] / cell["seconds"]["step"] for cell in cells]
            each = [1000 * parts(c["seconds"])[part] / c["samples"] for c in cells]
            fresh = [1000 * parts(c["seconds"])[part] / c["fresh"] for c in cells]
            lines.append(
                row(
                    NAMES[name],
                    part,
                    f"{100 * mean(shares):.0f}",
                    number(mean(each)),
                    number(mean(fresh)),
                    f"{mean(c['tokens'] / c['samples'] for c in cells):.0f}",
                    f"{mean(c['response_tokens'] / c['samples'] for c in cells):.0f}",
                )
            )
    return lines


def parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by part: all but the whole, and what the named parts leave of it."""
    named = {name: taken for name, taken in seconds.items() if name != "step"}
    rest = seconds["step"] - sum(named.values())
    if "teacher" not in named:
        return named
    return {
        "generate": named["generate"],
        "teacher's layers": named["teacher"],
        REST: rest,
    }


def _curves(sides: Mapping[str, Sequence[Cell]], known: Mapping[str, str]) -> list[str]:
    lines = head("", "seed", f"{', '.join(known.values())} at (CPU s, samples trained on)")
    for name, cells in sides.items():
        for cell in cells:
            points = "; ".join(
                f"{', '.join(f'{point[kl]:.4f}' for kl in known)} "
                f"({point['seconds']:.0f}, {point['samples']:.0f})"
                for point in cell["curve"]
            )
            lines.append(row(NAMES[name], str(cell["seed"]), points))
    return lines

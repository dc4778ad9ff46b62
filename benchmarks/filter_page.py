"""The page of the filter study: what rules cut, what statistics tell, what students make of it.

Pure: the record of `filter_study.py` (plain JSON values) in, Markdown out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

from filter_rules import MOST_CUT
from ladder_page import Cell, by_rung, differences
from noise import KINDS
from tables import head, interval, row

Record: TypeAlias = Mapping[str, Any]

LABELS = {
    "none": "no filter",
    "random": "random, the planted share cut",
    "letter": "Δ-IFD to the letter",
    "default": "Δ-IFD, default",
    "quantile": "Δ-IFD, quantiles 0.05 to 0.95",
    "ppl": "ppl ratio, default",
    "teacher_nll": "teacher NLL, the planted share cut",
    "best both": "best rule for both kinds of text",
    "outlier": "outlier, as it ships",
    "best both, long": "the same rule, as many steps as without a filter, post hoc",
    "oracle": "oracle: exactly the planted cut",
}


def page(record: Record) -> str:
    """The Markdown page."""
    found, host = record["sum"], record["machine"]
    lines = [
        "# What the filter is worth",
        "",
        "Made by `benchmarks/filter_study.py`; do not edit. What each row is, is said there.",
        "",
        f"Noise is planted into {record['share']:.0%} of a student's own texts, in equal parts: "
        "`truncated` (cut at a random token, ended as if whole), `shuffled` (its steps, or words, "
        "in another order), `off_topic` (the response to another prompt), `hot` (sampled at "
        f"temperature {record['hot']:g}). Good: clean, and right where that can be told. ±: 95 % "
        "t-interval of the mean over seeds. Rows with fewer seeds: what there was time for.",
        "",
        "## Detection: sums",
        "",
        *_detection(found),
        "",
        *_effects(record["cells"]),
    ]
    if "real" in record:
        lines += [f"## Detection: real text ({record['real']['what']})", ""]
        lines += [*_detection(record["real"]), ""]
    lines += [
        f"- setting: `{' '.join(f'{key}={value}' for key, value in record['setting'].items())}`",
        f"- command: `{record['command']}`",
        f"- commit: {record['commit']}; of the trainings: "
        f"{', '.join(sorted({cell['commit'] for cell in record['cells']})) or 'none'}",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB; one thread",
        f"- versions: {', '.join(f'{name} {v}' for name, v in record['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


# -- Detection ---------------------------------------------------------------------------------


def _detection(found: Record) -> list[str]:
    first = len(found["chosen_on"])
    names = {rule["label"] for rule in found["chosen"].values()}
    plain = {label: values for label, values in found["rules"].items() if label not in names}
    others = {label: found["rules"][label][first:] for label in names}
    others = {label: others[label] for label in found["rules"] if label in names}
    lines = [*_counts(found), "", *_rules(plain), ""]
    lines += [
        f"The best of the grid, chosen on seeds {_listed(found['chosen_on'])} (most noise found "
        "with at most 2 % of the good samples cut, with the noise beside them and without); these "
        f"figures are of the other {found['num_seeds'] - first} seeds:",
        "",
        *_rules(others),
        "",
        "Where nothing was planted (the clean samples alone), the same rules cut:",
        "",
        *_rules(found["unplanted"], kinds=False),
        "",
        "How the grid's best did on the seeds they were ranked by, and on the others:",
        "",
        *_sweep(found["sweep"]),
        "",
        f"Every statistic, and chance, at the same share cut ({_share_cut(found)}), and its AUC "
        "(0.5 is chance) for noise of each kind against good samples:",
        "",
        *_statistics(found),
    ]
    return lines


def _counts(found: Record) -> list[str]:
    counts = found["counts"]
    cut: dict[tuple[str, str], list[int]] = {}
    for each in counts:
        for kind, why, number in each["prefiltered"]:
            cut.setdefault((kind or "clean", why), []).append(number)
    told = [f"{kind} {why} {sum(n) / len(counts):.1f}" for (kind, why), n in sorted(cut.items())]
    responses = mean(sum(each["responses"].values()) for each in counts)
    right = mean(each["clean_right"] for each in counts)
    return [
        f"{found['num_seeds']} seeds of {responses:,.0f} responses, {100 * right:.1f} % of the "
        f"clean ones good. The pre-filters cut before any score, a seed: "
        f"{', '.join(told) or 'nothing'}. The figures below are of what is left, "
        f"{mean(each['scored'] for each in counts):,.0f} samples a seed."
    ]


def _rules(rules: Mapping[str, Sequence[Record]], *, kinds: bool = True) -> list[str]:
    planted = ("noise found, %", *KINDS, "precision, %") if kinds else ()
    lines = head("rule", "cut, %", *planted, "good ones cut, %", "clean but wrong cut, %")
    for label, seeds in rules.items():
        told = [_percent(seeds, "recall"), *(_percent(seeds, k, bare=True) for k in KINDS)]
        told += [_percent(seeds, "precision", bare=True)]
        lines.append(
            row(
                label,
                _percent(seeds, "cut"),
                *(told if kinds else ()),
                _percent(seeds, "good_cut"),
                _percent(seeds, "wrong_cut", bare=True),
            )
        )
    return lines


def _sweep(sweep: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The three best of each way to bound Δ-IFD, and the ten best others, one of a kind each."""
    lines = head(
        "rule", "noise found, % (chosen on)", "good cut, %", "noise found, % (others)",
        "good cut, %",
    )  # fmt: skip
    allowed = [label for label, halves in sweep.items() if halves["chosen_on"][1] <= MOST_CUT]
    allowed.sort(key=lambda label: -sweep[label]["chosen_on"][0])
    families: dict[str, list[str]] = {}
    for label in allowed:
        families.setdefault(_family(label), []).append(label)
    npd = [label for name in _NPD for label in families.pop(name, [])[:3]]
    for label in (*npd, *(labels[0] for labels in [*families.values()][:10])):
        cells = (*sweep[label]["chosen_on"], *sweep[label]["others"])
        lines.append(row(label, *(f"{100 * value:.1f}" for value in cells)))
    return lines


# The bounds that `FilterConfig` has.
_NPD = ("nll", "ppl", "nll quantiles", "ppl quantiles")


def _family(label: str) -> str:
    if label.startswith(("nll:", "ppl:")):
        return label[:3] + " quantiles" * ("quantiles" in label)
    return re.sub(r"[\d.]+", "", label)


def _statistics(found: Record) -> list[str]:
    lines = head(
        "statistic", "noise found, %", *KINDS, "good ones cut, %", "clean but wrong cut, %", "AUC",
        *(f"AUC {kind}" for kind in KINDS),
    )  # fmt: skip
    for label, seeds in found["same_share"].items():
        areas = found["auc"].get(label, [])
        lines.append(
            row(
                label,
                _percent(seeds, "recall"),
                *(_percent(seeds, kind, bare=True) for kind in KINDS),
                _percent(seeds, "good_cut", bare=True),
                _percent(seeds, "wrong_cut", bare=True),
                *(_area(areas, kind) for kind in ("all", *KINDS)),
            )
        )
    return lines


def _share_cut(found: Record) -> str:
    shares = [seed["cut"] for seeds in found["same_share"].values() for seed in seeds]
    return f"{100 * mean(shares):.0f} %"


def _area(areas: Sequence[Record], kind: str) -> str:
    return f"{mean(seed[kind] for seed in areas):.3f}" if areas else "0.5"


# -- Training ----------------------------------------------------------------------------------


def _effects(cells: Sequence[Cell]) -> list[str]:
    rows = by_rung(cells)
    lines: list[str] = []
    noisy = {name: found for name, found in rows.items() if not name.startswith("clean ")}
    clean = {name[6:]: found for name, found in rows.items() if name.startswith("clean ")}
    if noisy:
        lines += ["## Training on the noisy texts", "", *_table(noisy, ("none", "random")), ""]
    if clean:
        lines += ["## Training on the clean texts", "", *_table(clean, ("none",)), ""]
    return lines


def _table(rows: Mapping[str, Mapping[int, Cell]], bases: Sequence[str]) -> list[str]:
    """Each filter's students; differences are paired by seed."""
    against = [base for base in bases if base in rows]
    heads = [f"minus {LABELS[base].split(',')[0]}, points" for base in against]
    heads += [f"KL minus {LABELS[base].split(',')[0]}" for base in against]
    lines = head("filter", "seeds", "trained on, samples", "accuracy, %", *heads, "held-out KL")
    for name in (*LABELS, *(name for name in rows if name not in LABELS)):
        if name not in rows:
            continue
        cells = rows[name]
        paired = [_pair(cells, rows, base, name, "accuracy", 100, 1) for base in against]
        paired += [_pair(cells, rows, base, name, "kl", 1, 4) for base in against]
        kept = mean(cell["asked"] - sum(cell["rejected"].values()) for cell in cells.values())
        lines.append(
            row(
                _label(name, cells),
                str(len(cells)),
                f"{kept:,.0f}",
                _spread([100 * cell["accuracy"] for cell in cells.values()], 1),
                *paired,
                _spread([cell["kl"] for cell in cells.values()], 4),
            )
        )
    return lines


def _label(name: str, cells: Mapping[int, Cell]) -> str:
    """What the page calls an arm; of one behind a rule that was chosen, which rule that is."""
    rules = sorted({cell["rule"] for cell in cells.values() if cell.get("rule")})
    return LABELS.get(name, name) + f" ({'; '.join(rules)})" * bool(rules)


def _pair(
    cells: Mapping[int, Cell],
    rows: Mapping[str, Mapping[int, Cell]],
    base: str,
    name: str,
    what: str,
    scale: float,
    digits: int,
) -> str:
    if name == base:
        return ""
    values = [scale * value for value in differences(cells, rows[base], what)]
    return _spread(values, digits, sign="+") if values else ""


# -- Cells of a table --------------------------------------------------------------------------


def _percent(seeds: Sequence[Record], what: str, *, bare: bool = False) -> str:
    values = [100 * seed[what] for seed in seeds if seed[what] is not None]
    if not values:
        return "–"
    return f"{mean(values):.1f}" if bare else _spread(values, 1)


def _spread(values: Sequence[float], digits: int, *, sign: str = "") -> str:
    middle, half = interval(values)
    shown = f"{middle:{sign}.{digits}f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"


def _listed(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])

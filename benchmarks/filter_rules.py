"""What a filter's statistic tells of planted noise: rules, who is cut, recall, precision, AUC.

Pure: labelled scalars of samples in, figures out. A statistic here is high where a sample looks
like noise. Rules of npd are judged by npd, shard by shard with its history, as in a run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noise import KINDS
from npd.config import FilterConfig
from npd.filters import build_filter, delta_ifd, ifd
from npd.types import SampleStats

SHARD = 256
"""Samples judged together, as `generate.shard_size` of the runs."""
MOST_CUT = 0.02
"""Of the clean and right samples, the share that a rule may cut to be chosen."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A scored sample with what only the study knows of it. `kind`: of its noise, empty for a clean
    one; `is_right`: its answer, None where nobody can tell; `worst`: the largest NLL of one of its
    tokens for the teacher, nats."""

    stats: SampleStats
    kind: str
    is_right: bool | None
    worst: float = math.nan

    @property
    def is_good(self) -> bool:
        """Whether a filter should keep it: clean, and not known to be wrong."""
        return not self.kind and self.is_right is not False


@dataclass(frozen=True, eq=False)
class Rule:
    """Who is cut: whom a filter of npd's cuts (`config`), or whose `statistic` is above `limit`,
    or more than `spread` median deviations above the median (and above `least`), or among the
    share `top` of all."""

    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    statistic: str = ""
    limit: float | None = None
    spread: float | None = None
    least: float = 0.0
    top: float | None = None

    def cut(self, samples: Sequence[Labelled], seed: int = 0) -> list[bool]:
        """Whether each sample is cut."""
        if not self.statistic:
            return judged(FilterConfig(**self.config), samples, seed)
        values = STATISTICS[self.statistic](samples)
        if self.limit is not None:
            return [value > self.limit for value in values]
        if self.spread is not None:
            middle = statistics.median(values)
            most = middle + self.spread * statistics.median(abs(v - middle) for v in values)
            return [value > max(most, self.least) for value in values]
        assert self.top is not None
        return highest(values, round(self.top * len(samples)))


def judged(config: FilterConfig, samples: Sequence[Labelled], seed: int) -> list[bool]:
    """Who is cut by npd's filter: shard by shard, each with the samples before as its history."""
    rule = build_filter(config, seed)
    history: list[SampleStats] = []
    found: list[bool] = []
    for _, group in itertools.groupby(samples, lambda s: s.stats.sample_id // SHARD):
        batch = [sample.stats for sample in group]
        verdicts = rule.judge(batch, history[-config.history :])
        found += [not verdict.keep for verdict in verdicts]
        history += batch
    return found


def highest(values: Sequence[float], count: int) -> list[bool]:
    """Whether each is among the `count` highest; the earlier one of equals first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    chosen = set(order[:count])
    return [i in chosen for i in range(len(values))]


# -- Statistics: high is suspicious ------------------------------------------------------------


def _each(value: Callable[[SampleStats], float]) -> Callable[[Sequence[Labelled]], list[float]]:
    return lambda samples: [value(sample.stats) for sample in samples]


def nlls(stats: SampleStats) -> tuple[float, float]:
    """What the teacher and the student make of a response with its prompt, nats per token."""
    assert stats.nll_teacher is not None
    assert stats.nll_student is not None
    return stats.nll_teacher, stats.nll_student


def ifds(stats: SampleStats) -> tuple[float, float]:
    """The IFD of a response for the teacher and for the student."""
    teacher, student = nlls(stats)
    return ifd(teacher, stats.nll_teacher_alone), ifd(student, stats.nll_student_alone)


def _from_middle(samples: Sequence[Labelled], value: Callable[[SampleStats], float]) -> list[float]:
    values = [value(sample.stats) for sample in samples]
    middle = statistics.median(values)
    return [abs(found - middle) for found in values]


STATISTICS: dict[str, Callable[[Sequence[Labelled]], list[float]]] = {
    "Δ-IFD": _each(delta_ifd),
    "-Δ-IFD": _each(lambda stats: -delta_ifd(stats)),
    "abs Δ-IFD": _each(lambda stats: abs(delta_ifd(stats))),
    "Δ-IFD, ppl": _each(lambda stats: delta_ifd(stats, "ppl")),
    "abs Δ-IFD, ppl": _each(lambda stats: abs(delta_ifd(stats, "ppl"))),
    "teacher's IFD": _each(lambda stats: ifds(stats)[0]),
    "student's IFD": _each(lambda stats: ifds(stats)[1]),
    "larger IFD": _each(lambda stats: max(ifds(stats))),
    "NLL gap": _each(lambda stats: nlls(stats)[0] - nlls(stats)[1]),
    "-NLL gap": _each(lambda stats: nlls(stats)[1] - nlls(stats)[0]),
    "abs NLL gap": _each(lambda stats: abs(nlls(stats)[0] - nlls(stats)[1])),
    "teacher NLL": _each(lambda stats: nlls(stats)[0]),
    "student NLL": _each(lambda stats: nlls(stats)[1]),
    "larger NLL": _each(lambda stats: max(nlls(stats))),
    "overlap": _each(lambda stats: -(stats.overlap or 0.0)),
    "length": lambda samples: _from_middle(samples, lambda stats: stats.response_tokens),
    "teacher's worst token": lambda samples: [sample.worst for sample in samples],
}


RANKED = tuple(name for name in STATISTICS if name not in ("overlap", "length"))
"""Those that a limit is tried on."""

# -- Rules -------------------------------------------------------------------------------------

LETTER = {"tolerance": 0.0, "min_nll": 0.0}
NAMED = (
    Rule("Δ-IFD to the letter", LETTER),
    Rule("Δ-IFD, default"),
    Rule("Δ-IFD, quantiles 0.05 to 0.95", {"bounds": "quantile"}),
    Rule("ppl ratio to the letter", {**LETTER, "ratio": "ppl"}),
    Rule("ppl ratio, default", {"ratio": "ppl"}),
    Rule("ppl ratio, quantiles", {"ratio": "ppl", "bounds": "quantile"}),
    Rule("outlier", {"name": "outlier"}),
)
"""The filters as npd has them."""


def controls(share: float) -> list[Rule]:
    """Every statistic, and chance, at the same share of samples cut."""
    by_chance = Rule("random", {"name": "random", "keep": 1.0 - share})
    return [by_chance, *(Rule(name, statistic=name, top=share) for name in STATISTICS)]


def grid() -> Iterator[Rule]:
    """The bounds that `FilterConfig` can have: fixed ones, and quantiles."""
    fixed = itertools.product(
        ("nll", "ppl"),
        (0.0, 0.02, 0.05, 0.1, 0.2, 0.5),
        (0.0, 0.05, 0.2),
        (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
    )
    for ratio, tolerance, min_nll, high in fixed:
        values = {"ratio": ratio, "tolerance": tolerance, "min_nll": min_nll, "high": high}
        yield Rule(f"{ratio}: tolerance {tolerance:g}, min_nll {min_nll:g}, high {high:g}", values)
    quantiles = itertools.product(
        ("nll", "ppl"), (0.0, 0.02, 0.05, 0.1, 0.15), (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    )
    for ratio, low, high in quantiles:
        values = {"ratio": ratio, "low_quantile": low, "high_quantile": high, "min_nll": 0.0}
        label = f"{ratio}: quantiles {low:g} to {high:g}"
        yield Rule(label, {**values, "bounds": "quantile"})


def others() -> Iterator[Rule]:
    """Rules that npd does not have: one statistic, and one limit, share or distance."""
    limits = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
    shares = (0.05, 0.1, 0.2)
    for name in RANKED:
        yield from (Rule(f"{name} > {x:g}", statistic=name, limit=x) for x in limits)
        yield from (Rule(f"{name}, top {x:g}", statistic=name, top=x) for x in shares)
    for name, x, least in itertools.product(RANKED, range(2, 9), (0.0, 0.2)):
        label = f"{name}, {x} deviations" + f" and above {least:g}" * bool(least)
        yield Rule(label, statistic=name, spread=x, least=least)


# -- Measures ----------------------------------------------------------------------------------


def measure(samples: Sequence[Labelled], cut: Sequence[bool]) -> dict[str, float | None]:
    """Shares: `recall` of noise (and of each kind), `precision` of the cut,
    `good_cut` of the clean and right ones, `wrong_cut` of the clean and wrong ones, `cut` of all;
    None is a share of nothing.
    """
    pairs = list(zip(samples, cut, strict=True))
    kinds = {kind: [is_cut for s, is_cut in pairs if s.kind == kind] for kind in KINDS}
    return {
        "cut": _share([is_cut for _, is_cut in pairs]),
        "recall": _share([is_cut for s, is_cut in pairs if s.kind]),
        **{kind: _share(values) for kind, values in kinds.items()},
        "precision": _share([bool(s.kind) for s, is_cut in pairs if is_cut]),
        "good_cut": _share([is_cut for s, is_cut in pairs if s.is_good]),
        "wrong_cut": _share([is_cut for s, is_cut in pairs if not s.kind and not s.is_good]),
    }


def auc(samples: Sequence[Labelled], values: Sequence[float], kind: str = "") -> float:
    """The chance that a noisy sample (of that kind) has a higher value than a good one; ties count
    half.
    """
    noisy = [v for s, v in zip(samples, values, strict=True) if s.kind and kind in ("", s.kind)]
    good = [v for s, v in zip(samples, values, strict=True) if s.is_good]
    if not noisy or not good:
        return math.nan
    ranks = _ranks([*noisy, *good])
    most = len(noisy) * (len(noisy) + 1) / 2
    return (sum(ranks[: len(noisy)]) - most) / (len(noisy) * len(good))


def choose(figures: Sequence[tuple[Rule, tuple[float, float]]]) -> Rule:
    """The rule with the highest recall among those that cut at most 2 % of the good samples, the
    first of equals; `figures` has the `summary` of each."""
    allowed = [(rule, recall) for rule, (recall, good_cut) in figures if good_cut <= MOST_CUT]
    return max(allowed, key=lambda pair: pair[1])[0]


def summary(rule: Rule, seeds: Mapping[int, Sequence[Labelled]]) -> tuple[float, float]:
    """Recall of noise, and the share of the good samples cut: with the noise beside them or without
    it, whichever is more. Means over the seeds."""
    found = [measure(samples, rule.cut(samples, seed)) for seed, samples in seeds.items()]
    clean = [unplanted(samples) for samples in seeds.values()]
    alone = [
        measure(samples, rule.cut(samples, seed))
        for seed, samples in zip(seeds, clean, strict=True)
    ]
    recall = statistics.mean(each["recall"] or 0.0 for each in found)
    return recall, max(
        statistics.mean(each["good_cut"] or 0.0 for each in half) for half in (found, alone)
    )


def unplanted(samples: Sequence[Labelled]) -> list[Labelled]:
    """The clean ones alone."""
    return [sample for sample in samples if not sample.kind]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equals share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for _, group in itertools.groupby(enumerate(order, 1), key=lambda pair: values[pair[1]]):
        found = list(group)
        middle = (found[0][0] + found[-1][0]) / 2
        for _, index in found:
            ranks[index] = middle
    return ranks

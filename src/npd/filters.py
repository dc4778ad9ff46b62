"""Filters: pure functions from a sample's scalars to a Verdict.

`prefilter` judges a sample before scoring, a `Filter` after it. Δ-IFD is the method's filter;
`outlier` rejects text that the student would hardly write; the controls drop equally many samples
by a simpler rule, to separate the effect of Δ-IFD from that of dropping samples. Nothing here reads
tensors, keeps state, or depends on the order of a batch.

IFD, instruction-following difficulty: Li et al. 2308.12032 (ratio of mean NLLs), 2402.00530 (ratio
of perplexities). Δ-IFD and its bounds: 2605.05940.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

import numpy as np

from npd.config import FilterConfig
from npd.types import FinishReason, IntArray, SampleStats, Verdict

Ratio: TypeAlias = Literal["nll", "ppl"]
# A control's sort keys for a batch, from the batch and its pool. Lowest first; NaN: unranked.
Rank: TypeAlias = Callable[[Sequence[SampleStats], Sequence[SampleStats]], list[float]]

KEEP = Verdict(keep=True)
UNSCORED = Verdict(keep=False, reason="unscored")
# Nats per token. Below it the denominator is rounding noise and the ratio explodes. Ordinary text
# is far above; a larger floor would bias short templated answers.
_NLL_FLOOR = 1e-3
# math.exp overflows beyond this; such a perplexity ratio is out of any bounds.
_MAX_EXPONENT = 700.0
_GRAM = 4


class Filter(Protocol):
    """Judges scored samples."""

    def judge(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> list[Verdict]:
        """One verdict for each sample of `batch`, in its order.

        `history`: earlier samples, oldest first, none of them in `batch`. They stabilise quantiles
        and medians, and are not judged again.
        """
        ...


def prefilter(stats: SampleStats, config: FilterConfig) -> Verdict:
    """Judge a sample before it is scored: `truncated`, then `short`, then `repeating`."""
    if config.drop_truncated and stats.finish is FinishReason.LENGTH:
        return Verdict(keep=False, reason="truncated")
    if stats.response_tokens < config.min_response_tokens:
        return Verdict(keep=False, reason="short")
    if stats.repeat > config.max_repeat:
        return Verdict(keep=False, reason="repeating")
    return KEEP


def repeat_share(response_ids: IntArray | Sequence[int]) -> float:
    """Share of a response's 4-grams that occurred before in it, in [0, 1); 0 for L < 5.

    >>> repeat_share([7, 7, 7, 7, 7])
    0.5
    """
    ids = np.asarray(response_ids).tolist()
    grams = list(zip(*(ids[start:] for start in range(_GRAM)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def ifd(nll: float | None, nll_alone: float | None, ratio: Ratio = "nll") -> float:
    """Instruction-following difficulty: the response's NLL with its prompt over that without it.

    Both are means over the response in nats per token. `nll` divides them (denominator at least
    1e-3 nats), `ppl` divides their exponentials. NaN if either is missing or not finite.
    """
    if nll is None or nll_alone is None or not (math.isfinite(nll) and math.isfinite(nll_alone)):
        return math.nan
    if ratio == "ppl":
        return math.exp(min(nll - nll_alone, _MAX_EXPONENT))
    return nll / max(nll_alone, _NLL_FLOOR)


def delta_ifd(stats: SampleStats, ratio: Ratio = "nll") -> float:
    """IFD of the teacher minus IFD of the student on the same tokens; NaN if one is unknown.

    Below 0 the student finds its own sample harder than the teacher does. Far above 0 the student
    is sure of text that the teacher finds almost impossible.
    """
    teacher = ifd(stats.nll_teacher, stats.nll_teacher_alone, ratio)
    return teacher - ifd(stats.nll_student, stats.nll_student_alone, ratio)


def bounds(config: FilterConfig, pool: Sequence[SampleStats]) -> tuple[float, float]:
    """The inclusive bounds of Δ-IFD for `pool` (recent history, then the batch).

    `fixed`: `low - tolerance` and `high`. `quantile`: linearly interpolated quantiles of the pool's
    Δ-IFD, without unscored samples and those with an NLL too small for the ratio to be meaningful.
    An empty pool gives infinite bounds.
    """
    if config.bounds == "fixed":
        return config.low - config.tolerance, config.high
    deltas = [delta_ifd(stats, config.ratio) for stats in pool if not _is_mastered(stats, config)]
    known = [delta for delta in deltas if math.isfinite(delta)]
    if not known:
        return -math.inf, math.inf
    low, high = np.quantile(known, [config.low_quantile, config.high_quantile])
    return float(low), float(high)


def _is_mastered(stats: SampleStats, config: FilterConfig) -> bool:
    """Whether both models' NLL is below `min_nll`, where the ratio is noise."""
    nlls = (stats.nll_teacher, stats.nll_student)
    return all(nll is not None and nll < config.min_nll for nll in nlls)


@dataclass(frozen=True, slots=True)
class KeepAll:
    """No filter: every sample is kept."""

    def judge(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> list[Verdict]:
        """Keep all."""
        return [KEEP for _ in batch]


@dataclass(frozen=True, slots=True)
class DeltaIfd:
    """Keep `low <= Δ-IFD <= high`, and samples whose NLL is too small for Δ-IFD to be meaningful.

    Reasons: `degenerate` below, `disconnect` above, `unscored` where a needed NLL is missing.
    """

    config: FilterConfig

    def judge(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> list[Verdict]:
        """Judge a batch by bounds from the recent history and itself."""
        low, high = bounds(self.config, _pool(batch, history, self.config))
        return [self._judge_one(stats, low, high) for stats in batch]

    def _judge_one(self, stats: SampleStats, low: float, high: float) -> Verdict:
        delta = delta_ifd(stats, self.config.ratio)
        if math.isnan(delta):
            return UNSCORED
        if low <= delta <= high or _is_mastered(stats, self.config):
            return KEEP
        return Verdict(keep=False, reason="degenerate" if delta < low else "disconnect")


@dataclass(frozen=True, slots=True)
class Outlier:
    """Keep samples whose NLL under the student is in the usual range.

    Reasons: `outlier` above `highest_nll`, `unscored` if the student's NLL is missing.
    """

    config: FilterConfig

    def judge(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> list[Verdict]:
        """Judge a batch by the usual NLL in the recent history and itself."""
        highest = highest_nll(self.config, _pool(batch, history, self.config))
        return [self._judge_one(stats.nll_student, highest) for stats in batch]

    def _judge_one(self, nll: float | None, highest: float) -> Verdict:
        if nll is None or math.isnan(nll):
            return UNSCORED
        return KEEP if nll <= highest else Verdict(keep=False, reason="outlier")


def highest_nll(config: FilterConfig, pool: Sequence[SampleStats]) -> float:
    """The upper end of the student's usual NLL in `pool`, in nats per token.

    It is `deviations` median absolute deviations above the median of the scored samples, but at
    least `usual_nll`.
    """
    nlls = [stats.nll_student for stats in pool if stats.nll_student is not None]
    known = [nll for nll in nlls if math.isfinite(nll)]
    if not known:
        return math.inf
    middle = statistics.median(known)
    deviation = statistics.median(abs(nll - middle) for nll in known)
    return max(middle + config.deviations * deviation, config.usual_nll)


@dataclass(frozen=True, slots=True)
class Control:
    """Keep the lowest-ranked samples: a share `keep`, or as many as Δ-IFD keeps of the batch.

    A share of a batch is rounded up or down at random, so that it is right in expectation (0.4 of
    one sample keeps it 4 times in 10); seed and batch determine the rounding. Ties go to the lower
    sample id. Reasons: the control's name, or `unscored` if the sample has no value to rank by.
    """

    config: FilterConfig
    rank: Rank
    seed: int

    def judge(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> list[Verdict]:
        """Judge a batch; keeps exactly the required number, or fewer if too few are ranked."""
        pool = _pool(batch, history, self.config)
        ranks = self.rank(batch, pool)
        ranked = [i for i, rank in enumerate(ranks) if not math.isnan(rank)]
        ranked.sort(key=lambda i: (ranks[i], batch[i].sample_id))
        kept = set(ranked[: self._num_kept(batch, history)])
        dropped = Verdict(keep=False, reason=self.config.name)
        return [
            KEEP if i in kept else UNSCORED if math.isnan(rank) else dropped
            for i, rank in enumerate(ranks)
        ]

    def _num_kept(self, batch: Sequence[SampleStats], history: Sequence[SampleStats]) -> int:
        if self.config.keep is not None:
            ids = ",".join(map(str, sorted(stats.sample_id for stats in batch)))
            return math.floor(self.config.keep * len(batch) + _chance(f"{self.seed}:share:{ids}"))
        return sum(verdict.keep for verdict in DeltaIfd(self.config).judge(batch, history))


def _pool(
    batch: Sequence[SampleStats], history: Sequence[SampleStats], config: FilterConfig
) -> list[SampleStats]:
    return [*history[-config.history :], *batch]


def _by_teacher_nll(batch: Sequence[SampleStats], pool: Sequence[SampleStats]) -> list[float]:
    return [math.nan if stats.nll_teacher is None else stats.nll_teacher for stats in batch]


def _by_overlap(batch: Sequence[SampleStats], pool: Sequence[SampleStats]) -> list[float]:
    return [math.nan if stats.overlap is None else -stats.overlap for stats in batch]


def _by_length(batch: Sequence[SampleStats], pool: Sequence[SampleStats]) -> list[float]:
    """Distance to the pool's median response length: the shortest and longest go first."""
    if not batch:
        return []
    middle = statistics.median(stats.response_tokens for stats in pool)
    return [abs(stats.response_tokens - middle) for stats in batch]


def _by_chance(seed: int) -> Rank:
    """A uniform number in [0, 1), a hash of the seed and the sample id."""

    def rank(batch: Sequence[SampleStats], pool: Sequence[SampleStats]) -> list[float]:
        return [_chance(f"{seed}:{stats.sample_id}") for stats in batch]

    return rank


def _chance(key: str) -> float:
    """A uniform number in [0, 1), a hash of `key`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


FILTERS: Mapping[str, Callable[[FilterConfig, int], Filter]] = MappingProxyType(
    {
        "none": lambda config, seed: KeepAll(),
        "delta_ifd": lambda config, seed: DeltaIfd(config),
        "outlier": lambda config, seed: Outlier(config),
        "random": lambda config, seed: Control(config, _by_chance(seed), seed),
        "teacher_nll": lambda config, seed: Control(config, _by_teacher_nll, seed),
        "overlap": lambda config, seed: Control(config, _by_overlap, seed),
        "length": lambda config, seed: Control(config, _by_length, seed),
    }
)


def build_filter(config: FilterConfig, seed: int) -> Filter:
    """The configured filter; `seed` decides the choices of `random` and the rounding of `keep`."""
    return FILTERS[config.name](config, seed)

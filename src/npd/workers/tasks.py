"""The tasks of workers, and their scalar results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npd.filters import repeat_share
from npd.types import Failed, IntArray, Rollout, SampleRequest, SampleStats, Scored


@dataclass(frozen=True, slots=True, eq=False)
class GenerateTask:
    """Generate these samples with snapshot `version`, as `shard`."""

    shard: int
    version: int
    requests: tuple[SampleRequest, ...]


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Score these samples of `shard`; `version` is the oldest snapshot that generated any."""

    shard: int
    version: int
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The succeeded and the failed samples of a task.

    `notes` are lines for the user, e.g. the verification of a server's weights.
    """

    stats: tuple[SampleStats, ...]
    failed: tuple[Failed, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HeldoutResult:
    """Tokens of the held-out responses; `notes` as in `ShardResult`."""

    num_tokens: int
    notes: tuple[str, ...] = ()


def generated_stats(rollout: Rollout) -> SampleStats:
    """The statistics of a sample that are known before it is scored."""
    return SampleStats(
        sample_id=rollout.sample_id,
        prompt_index=rollout.prompt_index,
        version=rollout.version,
        prompt_tokens=len(rollout.prompt_ids),
        response_tokens=len(rollout.response_ids),
        finish=rollout.finish,
        repeat=repeat_share(rollout.response_ids),
    )


def scored_stats(scored: Scored) -> SampleStats:
    """The statistics of a scored sample, for the filters."""
    distinct = _first_of_each(scored.topk_ids)  # a sampled support may repeat ids
    mass = (np.exp(scored.topk_logprobs.astype(np.float64)) * distinct).sum(axis=1).mean()
    return generated_stats(scored.rollout)._replace(
        nll_teacher=scored.nll_teacher,
        nll_teacher_alone=scored.nll_teacher_alone,
        nll_student=scored.nll_student,
        nll_student_alone=scored.nll_student_alone,
        overlap=scored.overlap,
        teacher_mass=float(mass),
    )


def _first_of_each(ids_LK: IntArray) -> NDArray[np.bool_]:
    """Whether each id [L, k] is the first occurrence in its row."""
    order = np.argsort(ids_LK, axis=1, kind="stable")
    ordered = np.take_along_axis(ids_LK, order, axis=1)
    is_new = np.ones_like(ordered, dtype=bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(is_new)
    np.put_along_axis(first, order, is_new, axis=1)
    return first

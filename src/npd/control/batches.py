"""From sample ids to asks, from samples to a step, from a segment to whether it drifted: pure."""

from __future__ import annotations

from collections.abc import Sequence

from npd.config import RunConfig, TrainConfig
from npd.control.events import AskRef
from npd.control.order import learning_rate, mix_each, prompt_of
from npd.pack import balance, pack
from npd.reports import SegmentReport
from npd.types import Row, SampleRef, Step


def make_asks(
    sample_ids: Sequence[int], config: RunConfig, asks_per_round: int
) -> tuple[AskRef, ...]:
    """What is asked for under these ids: each one's prompt and seed follow from the run's seed.

    `asks_per_round` is prompts x samples_per_prompt.
    """
    seed, per_prompt = config.seed, config.generate.samples_per_prompt
    num_prompts = asks_per_round // per_prompt
    prompts = (
        prompt_of(sample_id, seed=seed, num_prompts=num_prompts, samples_per_prompt=per_prompt)
        for sample_id in sample_ids
    )
    return tuple(map(AskRef, sample_ids, prompts, mix_each((seed, 1), sample_ids)))


def make_step(
    index: int,
    refs: Sequence[SampleRef],
    train: TrainConfig,
    *,
    progress: tuple[float, float],
    ranks: int = 1,
) -> Step:
    """Pack a batch into rows, deal them out to the ranks, and set the learning rate.

    `progress` is how much of the run is behind at the start and at the end of the step, 0 to 1.
    """
    packed = pack([ref.num_tokens for ref in refs], train.row_tokens)
    rows = [Row(tuple([refs[i] for i in row])) for row in packed]
    lr = learning_rate(*progress, lr=train.lr, min_lr=train.min_lr, warmup=train.warmup)
    return Step(index, lr, _deal(rows, ranks))


def _deal(rows: Sequence[Row], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of each rank, by what attention costs them."""
    if ranks == 1:
        return (tuple(rows),)
    costs = [float(sum(ref.num_tokens**2 for ref in row.samples)) for row in rows]
    return tuple(tuple(rows[place] for place in places) for places in balance(costs, ranks))


def has_drifted(report: SegmentReport, threshold: float | None) -> bool:
    """Whether the segment's mean KL(theta || gen) per token is above `threshold` (None: never)."""
    measured = [(s.drift, s.response_tokens) for s in report.steps if s.drift is not None]
    tokens = sum(count for _, count in measured)
    if threshold is None or tokens == 0:
        return False
    return sum(drift * count for drift, count in measured) / tokens > threshold

"""What the training benchmarks share: samples of log-normal length, and the loops npd is held to.

Promises: every loop trains the same samples with the same optimiser, clipping and compute type,
and counts no padding. `bare_loop` does what no trainer can leave out; `padded_loop` is npd's own
loss on batches as most frameworks build them, with a teacher in the step where it is given one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from common import VOCAB, timed
from npd.config import LossConfig, TrainConfig
from npd.models.lm_head import head_of
from npd.models.loading import hidden_states
from npd.pack import pack
from npd.score.in_process import top_k
from npd.store.shards import ShardReader, write_scored
from npd.train.batch import TrainRow, build_row
from npd.train.loss import near_policy_loss
from npd.train.trainer import build_optimizer
from npd.types import FinishReason, Rollout, Row, SampleRef, Scored, Segment, Step

TOP_K = 10
SHARD_SIZE = 32  # as many samples as npd writes into one
# Log-normal lengths: this median and spread give a mean of 1.6 medians, and 2 % reach 8 medians.
MEDIAN_SHARE, SIGMA = 1 / 8, 1.0


def log_normal_lengths(count: int, longest: int) -> list[int]:
    """`count` lengths up to `longest`: a log-normal's quantiles, evenly spaced, shuffled.

    Quantiles and not draws: so few draws would make another workload with each seed.
    """
    normal, median = NormalDist(), MEDIAN_SHARE * longest
    places = [(i + 0.5) / count for i in range(count)]
    lengths = [round(median * math.exp(SIGMA * normal.inv_cdf(place))) for place in places]
    shuffled = np.random.default_rng(0).permutation(np.clip(lengths, 1, longest))
    return [int(length) for length in shuffled]


def random_samples(count: int, prompt: int, longest: int) -> list[Scored]:
    """Random text, prompts of half to full `prompt`, a random top-10 of mass 0.9 a token."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(3, VOCAB, shape).astype(np.int32)

    samples = []
    for i, length in enumerate(log_normal_lengths(count, longest)):
        before = rng.integers(prompt // 2, prompt + 1)
        shares = np.sort(rng.dirichlet(np.ones(TOP_K), length), axis=-1)[:, ::-1]
        logprobs = np.log(0.9 * shares + 1e-9).astype(np.float32)
        own = np.full(length, -np.log(VOCAB), np.float32)
        # Spread over the vocabulary and distinct, as a teacher's ids are.
        support = (ids(length, 1) + 4_801 * np.arange(TOP_K, dtype=np.int32)) % VOCAB
        rollout = Rollout(i, i, 0, ids(before), ids(1), ids(length), own, FinishReason.STOP, i)
        samples.append(Scored(rollout, support, logprobs, own, 1.0))
    return samples


class Shards:
    """The samples in Arrow files, read through npd's reader."""

    def __init__(self, directory: Path, samples: Sequence[Scored]) -> None:
        self._directory = directory
        for shard, start in enumerate(range(0, len(samples), SHARD_SIZE)):
            write_scored(self._path(shard), samples[start : start + SHARD_SIZE])
        self.open_anew()

    def open_anew(self) -> None:
        """Forget what is open, so that files are opened and verified again."""
        self._reader = ShardReader(self._path, "scored")

    def read(self, ref: SampleRef) -> Scored:
        """One sample."""
        return self._reader.scored(ref)

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:06d}.arrow"


def make_segment(samples: Sequence[Scored], capacity: int) -> Segment:
    """One step over all samples, packed."""
    refs = [
        SampleRef(i, i // SHARD_SIZE, 0, sample.rollout.num_tokens)
        for i, sample in enumerate(samples)
    ]
    rows = pack([ref.num_tokens for ref in refs], capacity)
    packed = tuple(Row(tuple(refs[i] for i in row)) for row in rows)
    return Segment(0, 0, (Step(0, 1e-5, (packed,)),))


def build_rows(
    segment: Segment, read: Callable[[SampleRef], Scored], device: str
) -> list[TrainRow]:
    """The rows as the Trainer builds them."""
    rows = segment.steps[0].ranks[0]
    return [build_row([read(ref) for ref in row.samples], version=0, device=device) for row in rows]


# -- Loops ---------------------------------------------------------------------------------------


def make_step(
    model: Any, config: TrainConfig, losses: Callable[[], Iterator[torch.Tensor]]
) -> Callable[[], None]:
    """A step over micro-batches: backward for each, clip, AdamW, one look at the loss."""
    optimizer = build_optimizer(model, config)

    def step() -> None:
        total = torch.zeros((), device=model.device)
        for loss in losses():
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def autocast(model: Any, config: TrainConfig) -> torch.autocast:
    """The compute type of `config`."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def bare_loop(
    model: Any, rows: Sequence[TrainRow], config: TrainConfig, *, full: bool
) -> Callable[[], None]:
    """A step of plain packed SFT: forward, cross-entropy on full logits, backward, clip, AdamW."""
    tokens = sum(len(row.labels_N) for row in rows)

    def loss_of(row: TrainRow) -> torch.Tensor:
        hidden, labels = hidden_states(model, row.packed), row.labels_N
        if full:
            labels = torch.full((len(hidden),), -100, device=model.device)
            labels[row.positions_N] = row.labels_N
        else:
            hidden = hidden[row.positions_N]
        logits = F.linear(hidden, head_of(model).weight).float()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / tokens

    def losses() -> Iterator[torch.Tensor]:
        for row in rows:
            with autocast(model, config):
                loss = loss_of(row)
            yield loss

    return make_step(model, config, losses)


@dataclass(frozen=True)
class PaddedBatch:
    """B samples padded on the right to the longest, and what their N response tokens are to learn.

    `ids_BL`, `mask_BL` (1 where there is a token), `places_N` into the flattened [B * L].
    """

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    places_N: torch.Tensor
    labels_N: torch.Tensor
    topk_ids_NK: torch.Tensor
    topk_logprobs_NK: torch.Tensor


def pad_batch(samples: Sequence[Scored], device: str) -> PaddedBatch:
    """The samples as one padded batch."""
    rollouts = [sample.rollout for sample in samples]
    # A response's last token predicts nothing, so it is not fed: the same in npd's rows.
    texts = [np.concatenate([r.prompt_ids, r.response_ids[:-1]]) for r in rollouts]
    width = max(map(len, texts))
    ids, mask = np.zeros((2, len(texts), width), np.int64)
    places = []
    for i, (text, rollout) in enumerate(zip(texts, rollouts, strict=True)):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
        places.append(i * width + np.arange(len(rollout.prompt_ids) - 1, len(text)))

    def joined(parts: Sequence[np.ndarray], dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)

    return PaddedBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        joined(places, np.int64),
        joined([r.response_ids for r in rollouts], np.int64),
        joined([sample.topk_ids for sample in samples], np.int64),
        joined([sample.topk_logprobs for sample in samples], np.float32),
    )


def padded(samples: Sequence[Scored], size: int, device: str) -> list[PaddedBatch]:
    """Batches of `size`, in the order given: as they come, not sorted by length."""
    return [pad_batch(samples[i : i + size], device) for i in range(0, len(samples), size)]


def padded_loop(
    model: Any,
    batches: Sequence[PaddedBatch],
    config: TrainConfig,
    loss: LossConfig,
    teacher: Any = None,
) -> Callable[[], None]:
    """npd's loss and step on padded batches, logits at responses only.

    With a `teacher` its top-10 is found in the step, padded like the student, and not read.
    """
    tokens = float(sum(len(batch.labels_N) for batch in batches))

    def hidden(of: Any, batch: PaddedBatch) -> torch.Tensor:
        out = of.base_model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL, use_cache=False)
        states: torch.Tensor = out.last_hidden_state
        return states.flatten(0, 1)[batch.places_N]

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches:
            support = (batch.topk_ids_NK, batch.topk_logprobs_NK)
            if teacher is not None:
                with torch.inference_mode():
                    support = teacher_support(teacher, hidden(teacher, batch))
            with autocast(model, config):
                out = near_policy_loss(
                    hidden(model, batch),
                    head_of(model),
                    batch.labels_N,
                    *support,
                    normalizer=tokens,
                    **loss.of_tokens,
                )
            yield out.loss

    return make_step(model, config, losses)


def teacher_support(teacher: Any, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities [N, 10] of the teacher's likeliest tokens, as npd's scorer does."""
    head, ids, logprobs = head_of(teacher), [], []
    for part in head.slices(len(hidden_ND), 512):
        logits = head.logits(hidden_ND[part])
        ids.append(top_k(logits, TOP_K))
        logprobs.append(logits.gather(-1, ids[-1]) - logits.logsumexp(dim=-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)


def padded_fill(samples: Sequence[Scored], size: int, shuffles: int = 0) -> float:
    """Share of real tokens in padded batches of `size`: as they come, or the mean of shuffles."""
    lengths = np.array([sample.rollout.num_tokens - 1 for sample in samples])
    orders = [np.arange(len(lengths))]
    if shuffles:
        rng = np.random.default_rng(1)
        orders = [rng.permutation(len(lengths)) for _ in range(shuffles)]

    def room(order: np.ndarray) -> int:
        parts = [lengths[order[i : i + size]] for i in range(0, len(order), size)]
        return int(sum(len(part) * part.max() for part in parts))

    return mean(float(lengths.sum()) / room(order) for order in orders)


# -- What is the most that could be had ------------------------------------------------------------


def step_flops(config: Any, samples: Sequence[Scored]) -> float:
    """Floating-point operations that a training step on `samples` cannot do without.

    Matrix products of layers and causal attention for every token, the head at responses only;
    backward costs twice the forward. Padding, recomputation and the teacher are not in it.
    """
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * width * (heads + config.num_attention_heads)
    weights = attention + 3 * config.hidden_size * config.intermediate_size
    fed = [sample.rollout.num_tokens - 1 for sample in samples]
    responses = sum(len(sample.rollout.response_ids) for sample in samples)
    # Scores and their use: 2 products of n * n / 2 places for each channel of each query head.
    inside = sum(2 * n * n for n in fed) * config.num_attention_heads * width
    layers = config.num_hidden_layers * (2 * weights * sum(fed) + inside)
    return 3.0 * (layers + 2 * config.hidden_size * config.vocab_size * responses)


def matmul_rate(device: str, dtype: str, clock: str) -> float:
    """Operations a second of the best of some matrix products, square and of a layer's shape."""
    size = 2048 if device == "cpu" else 8192
    best = 0.0
    for m, k, n in ((size, size, size), (size, size // 4, size)):
        a = torch.randn(m, k, device=device).to(getattr(torch, dtype))
        b = torch.randn(n, k, device=device).to(getattr(torch, dtype))
        repeats = 3 if device == "cpu" else 100

        def run(a: torch.Tensor = a, b: torch.Tensor = b, repeats: int = repeats) -> None:
            for _ in range(repeats):
                F.linear(a, b)

        run()
        taken = min(timed(run, clock) for _ in range(3))
        best = max(best, 2.0 * m * k * n * repeats / taken)
    return best

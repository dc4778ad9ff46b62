"""Reading documents with one model: packed prefill, and its LM head on response positions only.

Promises: log-probabilities are the model's own (float32 softmax over its whole vocabulary), a
reading does not depend on what it was packed with (to float noise), and no more than a chunk of
positions ever has logits. Knows nothing of rollouts, teachers or students.

Dimensions: N response positions of a group, C of a chunk, L of a response; V vocabulary, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npd.config import ScoreConfig
from npd.errors import ModelError, RunError
from npd.head import Head, head_of
from npd.modeling import load_model, resolve_device, response_hidden
from npd.score.base import Document, Key, Reading

# Block of the two-stage top-k: 64 is 3.4 times torch.topk's speed at V = 49,152, k = 10.
_BLOCK = 64


class PrefillReader:
    """One model of this process, read through packed rows and its head in chunks."""

    def __init__(self, model: Any, name: str, vocab_size: int, config: ScoreConfig) -> None:
        self._model, self._name = model, name
        self._head: Head = head_of(model)
        self._num_ids = len(self._head.weight)
        self._vocab_size = min(vocab_size, self._num_ids)
        self._row_tokens = config.row_tokens
        self._chunk = config.head_chunk

    @torch.inference_mode()
    def read(self, documents: Mapping[Key, Document]) -> dict[Key, Reading]:
        """A reading of each document, under its key."""
        self._check_ids(documents.values())
        keys = list(documents)
        pairs = [(document.context, document.response) for document in documents.values()]
        readings: dict[Key, Reading] = {}
        for row, hidden in response_hidden(self._model, pairs, self._row_tokens):
            states = torch.split(hidden, [len(pairs[i][1]) for i in row])
            by_wish: dict[tuple[int, bool], list[tuple[Key, Tensor]]] = {}
            for i, state in zip(row, states, strict=True):
                by_wish.setdefault(documents[keys[i]].wants, []).append((keys[i], state))
            for group in by_wish.values():
                members = [documents[key] for key, _ in group]
                found = self._read_head(members, torch.cat([state for _, state in group]))
                readings.update(zip((key for key, _ in group), found, strict=True))
        return readings

    def _read_head(self, documents: Sequence[Document], hidden: Tensor) -> list[Reading]:
        """Readings of documents that want the same, from their response states [N, d]."""
        targets = self._tensor([document.response.astype(np.int64) for document in documents])
        drawn = [document.uniforms for document in documents if document.uniforms is not None]
        uniforms = self._tensor(drawn) if drawn else None
        chunks = [
            _read_logits(
                self._head.logits(hidden[part]),
                targets[part],
                min(documents[0].k, self._vocab_size),
                None if uniforms is None else uniforms[part],
                self._vocab_size,
            )
            for part in self._head.slices(len(hidden), self._chunk)
        ]
        ids = torch.cat([ids for ids, _ in chunks]).int().cpu().numpy()
        logprobs = torch.cat([logprobs for _, logprobs in chunks]).cpu().numpy()
        if not np.isfinite(logprobs[:, 0]).all():
            raise RunError(
                f"{self._name} gives log-probabilities that are not finite: its weights are "
                "damaged, or score.dtype is too narrow for it (try score.dtype: float32)"
            )
        bounds = list(accumulate(len(document.response) for document in documents))[:-1]
        parts = zip(np.split(ids, bounds), np.split(logprobs, bounds), strict=True)
        return [
            Reading(*map(np.ascontiguousarray, (lp[:, 0], i[:, 1:], lp[:, 1:]))) for i, lp in parts
        ]

    def _tensor(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self._model.device)

    def _check_ids(self, documents: Iterable[Document]) -> None:
        for document in documents:
            highest = max(int(document.context.max()), int(document.response.max()))
            if highest >= self._num_ids:
                raise ModelError(
                    f"a sample holds token id {highest}, but {self._name} has only "
                    f"{self._num_ids}: teacher and student must share one tokenizer"
                )


def load_reader(
    config: ScoreConfig,
    model: Path | str,
    vocab_size: int,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PrefillReader:
    """The reader of a model directory or name; raises ModelError where it cannot be loaded."""
    loaded = load_model(
        model,
        dtype=config.dtype,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    return PrefillReader(loaded, str(model), vocab_size, config)


def _read_logits(
    logits: Tensor, targets: Tensor, k: int, uniforms: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Ids [C, 1 + k + draws] (target, top, drawn) and their log-probabilities, from logits [C, V].

    The softmax is over all of V; ids at and beyond `vocab_size` are padding and never chosen.
    """
    shared = logits[:, :vocab_size]
    columns = [targets[:, None]]
    if k:
        columns.append(top_k(shared, k))
    if uniforms is not None:
        columns.append(_draw(shared, uniforms))
    ids = torch.cat(columns, dim=1)
    return ids, logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids [C, k] of the k highest of `logits` [C, V], highest first: torch.topk, in two stages.

    The k highest lie in the k blocks with the highest maxima (or in the rest after the last block).
    """
    num_blocks = logits.shape[1] // _BLOCK
    if num_blocks <= k:
        return logits.topk(k, dim=1).indices
    body = logits[:, : num_blocks * _BLOCK].view(-1, num_blocks, _BLOCK)
    best = body.amax(dim=2).topk(k, dim=1).indices
    candidates = body.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    rest = logits[:, num_blocks * _BLOCK :]
    places = torch.cat([candidates, rest], dim=1).topk(k, dim=1).indices
    in_body = best.gather(1, (places // _BLOCK).clamp_(max=k - 1)) * _BLOCK + places % _BLOCK
    in_rest = places + (num_blocks - k) * _BLOCK
    return torch.where(places < k * _BLOCK, in_body, in_rest)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [C, draws] by inverting the distribution function of softmax(logits) at `uniforms`."""
    # In float64: a float32 sum over a large vocabulary loses the tail it is meant to sample.
    cdf = logits.softmax(dim=1).double().cumsum(dim=1)
    places = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return places.clamp_(max=logits.shape[1] - 1)

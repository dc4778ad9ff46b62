"""Reading documents with one model: packed prefill, and its LM head on response positions only.

Promises: log-probabilities are the model's own (float32 softmax over its whole vocabulary), a
reading does not depend on what it was packed with (to float noise), and no more than a chunk of
positions ever has logits. Knows nothing of rollouts, teachers or students.

Dimensions: N response positions of a group, C of a block, L of a response; V vocabulary, d hidden.
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
from npd.head import Head, head_of, read_hidden, top_k
from npd.modeling import load_model, on_device, resolve_device
from npd.reading import response_hidden
from npd.score.base import Document, Key, Reading
from npd.types import FloatArray, IntArray


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
        """A reading of each document, under its key; the host waits for a GPU once, at the end."""
        self._check_ids(documents.values())
        keys = list(documents)
        pairs = [(document.context, document.response) for document in documents.values()]
        found: list[tuple[list[Key], Tensor, Tensor]] = []
        is_cuda = self._model.device.type == "cuda"
        for row, hidden in response_hidden(self._model, pairs, self._row_tokens, share=True):
            states = torch.split(hidden, [len(pairs[i][1]) for i in row])
            by_wish: dict[tuple[int, bool], list[tuple[Key, Tensor]]] = {}
            for i, state in zip(row, states, strict=True):
                by_wish.setdefault(documents[keys[i]].wants, []).append((keys[i], state))
            for group in by_wish.values():
                members = [documents[key] for key, _ in group]
                given = self._read_head(members, torch.cat([state for _, state in group]))
                ids, logprobs = (x.to("cpu", non_blocking=is_cuda) for x in given)
                found.append(([key for key, _ in group], ids, logprobs))
        if is_cuda:
            torch.cuda.synchronize(self._model.device)
        readings: dict[Key, Reading] = {}
        for group_keys, ids, logprobs in found:
            lengths = [len(documents[key].response) for key in group_keys]
            parts = self._cut(ids.numpy(), logprobs.numpy(), lengths)
            readings.update(zip(group_keys, parts, strict=True))
        return readings

    def _read_head(self, documents: Sequence[Document], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, 1 + k + draws] (int32) and their log-probabilities, of documents that want the
        same, from their response states [N, d]."""
        targets = self._tensor([document.response.astype(np.int64) for document in documents])
        drawn = [document.uniforms for document in documents if document.uniforms is not None]
        uniforms = self._tensor(drawn) if drawn else None
        k, shared = min(documents[0].k, self._vocab_size), self._vocab_size

        def choose(part: slice, logits: Tensor) -> Tensor:
            """The token itself, then the top, then the drawn; none of them padding."""
            columns = [targets[part, None]]
            if k:
                columns.append(top_k(logits[:, :shared], k))
            if uniforms is not None:
                columns.append(_draw(logits[:, :shared], uniforms[part]))
            return torch.cat(columns, dim=1)

        ids, logprobs = read_hidden(hidden, self._head, choose, self._chunk)
        return ids.int(), logprobs

    def _cut(self, ids: IntArray, logprobs: FloatArray, lengths: Sequence[int]) -> list[Reading]:
        """The readings of documents of these lengths, which lie one behind the other."""
        if not np.isfinite(logprobs[:, 0]).all():
            raise RunError(
                f"{self._name} gives log-probabilities that are not finite: its weights are "
                "damaged, or score.dtype is too narrow for it (try score.dtype: float32)"
            )
        bounds = list(accumulate(lengths))[:-1]
        parts = zip(np.split(ids, bounds), np.split(logprobs, bounds), strict=True)
        whole = np.ascontiguousarray
        return [Reading(whole(lp[:, 0]), whole(i[:, 1:]), whole(lp[:, 1:])) for i, lp in parts]

    def _tensor(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        return on_device(torch.from_numpy(np.concatenate(arrays)), self._model.device)

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


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [C, draws] by inverting the distribution function of softmax(logits) at `uniforms`."""
    # In float64: a float32 sum over a large vocabulary loses the tail it is meant to sample.
    cdf = logits.softmax(dim=1).double().cumsum(dim=1)
    places = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return places.clamp_(max=logits.shape[1] - 1)

"""A teacher or snapshot in this process: top-k and log-probs of given tokens by packed prefill.

Promises: log-probabilities are from a float32 softmax over the model's full vocabulary. They do not
depend on other documents in the row (to float noise). At most one chunk of positions has logits at
a time: the LM head runs on response positions only. Independent of rollouts.

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
from npd.config.sections import SIZES_ON_CPU, SIZES_ON_GPU
from npd.errors import ModelError, RunError
from npd.models.device import is_pinnable, on_device, resolve_device, synchronize
from npd.models.kernels.compile import builds_kernels, compile_layers, layers_of
from npd.models.lm_head import Head, Impl, head_of, read_hidden, top_k
from npd.models.loading import load_model
from npd.models.out_of_memory import Fitting
from npd.models.response_states import response_hidden
from npd.score.base import Key, LogprobRequest, Logprobs
from npd.types import FloatArray, IntArray

_IF_NOTHING_FITS = (
    "give scorers a device of their own, a smaller teacher, or a lower score.head_chunk"
)


class PrefillModel:
    """A model in this process, run on packed rows, with its LM head applied in chunks.

    `impl` is how logits are read (`npd.models.lm_head.read_hidden`).
    """

    def __init__(
        self, model: Any, name: str, vocab_size: int, config: ScoreConfig, impl: Impl = "auto"
    ) -> None:
        self._model, self._name, self._impl = model, name, impl
        self._head: Head = head_of(model)
        self._num_ids = len(self._head.weight)
        self._vocab_size = min(vocab_size, self._num_ids)
        is_gpu = model.device.type != "cpu"
        sizes = config.with_sizes(SIZES_ON_GPU if is_gpu else SIZES_ON_CPU).sizes
        self._row_tokens, self._chunk = sizes
        self._fitting = Fitting("score.row_tokens", sizes.row_tokens, _IF_NOTHING_FITS)

    def read(self, documents: Mapping[Key, LogprobRequest]) -> dict[Key, Logprobs]:
        """The log-probs of each document, by key; synchronises with a GPU once, at the end.

        If the device runs out of memory, again with smaller rows and head chunks.
        """
        self._check_ids(documents.values())
        return self._fitting.run(lambda: self._read(documents))

    @torch.inference_mode()
    def _read(self, documents: Mapping[Key, LogprobRequest]) -> dict[Key, Logprobs]:
        keys = list(documents)
        pairs = [(document.context, document.response) for document in documents.values()]
        found: list[tuple[list[Key], Tensor, Tensor]] = []
        device = self._model.device
        row_tokens = self._fitting.of(self._row_tokens)
        for row, hidden in response_hidden(self._model, pairs, row_tokens, share=True):
            states = torch.split(hidden, [len(pairs[i][1]) for i in row])
            by_outputs: dict[tuple[int, bool], list[tuple[Key, Tensor]]] = {}
            for i, state in zip(row, states, strict=True):
                by_outputs.setdefault(documents[keys[i]].outputs, []).append((keys[i], state))
            for group in by_outputs.values():
                members = [documents[key] for key, _ in group]
                given = self._read_head(members, torch.cat([state for _, state in group]))
                ids, logprobs = (x.to("cpu", non_blocking=is_pinnable(device)) for x in given)
                found.append(([key for key, _ in group], ids, logprobs))
        synchronize(device)
        readings: dict[Key, Logprobs] = {}
        for group_keys, ids, logprobs in found:
            lengths = [len(documents[key].response) for key in group_keys]
            parts = self._cut(ids.numpy(), logprobs.numpy(), lengths)
            readings.update(zip(group_keys, parts, strict=True))
        return readings

    def _read_head(
        self, documents: Sequence[LogprobRequest], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids [N, 1 + k + draws] (int32) and their log-probabilities, from response states [N, d].

        The documents agree in `LogprobRequest.outputs`.
        """
        targets = self._tensor([document.response.astype(np.int64) for document in documents])
        drawn = [document.uniforms for document in documents if document.uniforms is not None]
        uniforms = self._tensor(drawn) if drawn else None
        k, shared = min(documents[0].k, self._vocab_size), self._vocab_size

        def choose(part: slice, logits: Tensor, maxima: Tensor | None) -> Tensor:
            """The token itself, then the top-k, then the sampled ids; never padding."""
            columns = [targets[part, None]]
            if k:
                columns.append(top_k(logits[:, :shared], k, maxima))
            if uniforms is not None:
                columns.append(_draw(logits[:, :shared], uniforms[part]))
            return torch.cat(columns, dim=1)

        chunk = self._fitting.of(self._chunk)
        ids, logprobs = read_hidden(hidden, self._head, choose, chunk, self._impl)
        return ids.int(), logprobs

    def _cut(self, ids: IntArray, logprobs: FloatArray, lengths: Sequence[int]) -> list[Logprobs]:
        """Split the results of concatenated documents of these lengths."""
        if not np.isfinite(logprobs[:, 0]).all():
            raise RunError(
                f"{self._name} gives log-probabilities that are not finite: its weights are "
                "damaged, or score.dtype is too narrow for it (try score.dtype: float32)"
            )
        bounds = list(accumulate(lengths))[:-1]
        parts = zip(np.split(ids, bounds), np.split(logprobs, bounds), strict=True)
        whole = np.ascontiguousarray
        return [Logprobs(whole(lp[:, 0]), whole(i[:, 1:]), whole(lp[:, 1:])) for i, lp in parts]

    def _tensor(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        return on_device(torch.from_numpy(np.concatenate(arrays)), self._model.device)

    def _check_ids(self, documents: Iterable[LogprobRequest]) -> None:
        for document in documents:
            highest = max(int(document.context.max()), int(document.response.max()))
            if highest >= self._num_ids:
                raise ModelError(
                    f"a sample has token id {highest}, but {self._name} has only "
                    f"{self._num_ids}: teacher and student must share one tokenizer"
                )


def load_prefill_model(
    config: ScoreConfig,
    model: Path | str,
    vocab_size: int,
    *,
    role: str = "model",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PrefillModel:
    """A PrefillModel from a model directory or name, its layers compiled if `config` says so.

    Raises:
        ModelError: it cannot be loaded, or names no layers to compile.
        ConfigError: there is no compiler.
    """
    device = resolve_device(device)
    loaded = load_model(
        model,
        role=role,
        dtype=config.dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if _is_compiled(loaded, config, device):
        compile_layers(loaded, device, "score.compile")
    return PrefillModel(loaded, str(model), vocab_size, config)


def _is_compiled(model: Any, config: ScoreConfig, device: str) -> bool:
    """Whether to compile: by `auto` plain weights on a GPU for which kernels can be built."""
    if config.compile != "auto":
        return config.compile
    is_plain = getattr(model, "hf_quantizer", None) is None and any(layers_of(model))
    return is_plain and builds_kernels(torch.device(device).type)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [C, draws] sampled from softmax(logits) by inverse CDF at `uniforms`."""
    # float64, because a float32 sum over a large vocabulary loses the tail.
    cdf = logits.softmax(dim=1).double().cumsum(dim=1)
    ids = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return ids.clamp_(max=logits.shape[1] - 1)

"""In-process generation with a transformers model: an own decode loop over length-sorted batches.

Promises: a sample depends on its seed and prompt, not on the batch it is decoded in (one uniform a
token from its own stream, up to float noise); recorded log-probs are the model's own, untempered
float32 ones over its whole vocabulary; rows that finish early stop costing. Does not score,
tokenise, or keep anything between calls but the model.

Dimensions: B live rows, P padded prompt length, V model vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npd.config import GenerateConfig
from npd.errors import ModelError, RunError, StoreError
from npd.generate.attention import decode_attention
from npd.generate.sampling import Sampling, choose
from npd.generate.weights import Snapshot, copy_weights
from npd.modeling import load_model, resolve_device
from npd.types import Ask, FinishReason, Rollout

# Dropping finished rows copies the whole cache once, about what one more step costs: wait until an
# eighth of the rows is done, and a batch of 8 or fewer drops each at once.
_COMPACT_SHARE = 0.125


class TransformersGenerator:
    """Decodes with the snapshot loaded last; `version` and `snapshot` say which that is.

    With `config.source` teacher the rollouts carry no log-probs: they are not the student's.
    """

    def __init__(
        self,
        config: GenerateConfig,
        *,
        stop_ids: Iterable[int],
        pad_id: int,
        vocab_size: int | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.version: int | None = None
        self.snapshot: Path | None = None
        self._model: Any = None
        self._loaded: Snapshot | None = None
        self._dtype = config.dtype
        self._device = resolve_device(device)
        self._trust_remote_code = trust_remote_code
        self._is_student = config.source == "student"
        self._sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            stop_ids=frozenset(stop_ids),
            pad_id=pad_id,
            temperature=config.temperature,
            top_p=config.top_p,
            batch_size=config.batch_size,
            vocab_size=vocab_size,
        )

    def load(self, snapshot: Path, version: int) -> None:
        """Hold the weights of `snapshot`, in place where the architecture is the one held already.

        Raises:
            ModelError: `snapshot` is not a model directory.
            StoreError: its weights are truncated or unreadable.
        """
        from safetensors import SafetensorError

        model, loaded = self._model, self._loaded
        # A load that fails half way must not leave mixed weights that could still generate.
        self.close()
        new = Snapshot.read(snapshot)
        try:
            if model is None or loaded is None or not copy_weights(model, loaded, new):
                model = None
                model = self._build(snapshot)
        except SafetensorError as error:
            raise StoreError(
                f"the weights in {str(snapshot)!r} cannot be read ({error}): the snapshot is "
                "damaged; remove it and resume the run from its last checkpoint"
            ) from error
        self._model, self._loaded = model, new
        self.snapshot, self.version = snapshot, version

    def generate(self, asks: Sequence[Ask]) -> list[Rollout]:
        """One rollout per ask, in the order of the asks, all of the version loaded last.

        Raises:
            RunError: the model gives non-finite logits.
            ModelError: a sample would not fit the model's context.
        """
        assert self._model is not None, "generate() needs a snapshot: call load() first"
        assert self.version is not None
        return generate_with(
            self._model,
            asks,
            self._sampling,
            version=self.version,
            with_logprobs=self._is_student,
        )

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._loaded = self.snapshot = self.version = None

    def _build(self, snapshot: Path) -> Any:
        return load_model(
            snapshot,
            dtype=self._dtype,
            device=self._device,
            packed=False,
            trust_remote_code=self._trust_remote_code,
        )


def generate_with(
    model: Any,
    asks: Sequence[Ask],
    sampling: Sampling,
    *,
    version: int = 0,
    with_logprobs: bool = True,
) -> list[Rollout]:
    """Decode `asks` with a loaded causal LM (eval mode, packed or not), in the order of the asks.

    Log-probs are recorded unless `with_logprobs` is off: log p(y_t) in nats at temperature 1 over
    the model's whole vocabulary, whatever the sampling.

    Raises:
        RunError: the model gives non-finite logits.
        ModelError: a sample would not fit the model's context.
    """
    if not asks:
        return []
    _check_context(model, max(len(ask.prompt.prompt_ids) for ask in asks), sampling)
    # Longest first: if memory does not suffice, it shows in the first batch.
    order = sorted(range(len(asks)), key=lambda i: -len(asks[i].prompt.prompt_ids))
    rollouts: dict[int, Rollout] = {}
    for start in range(0, len(order), sampling.batch_size):
        chosen = order[start : start + sampling.batch_size]
        with decode_attention(model):
            responses = _decode(model, [asks[i] for i in chosen], sampling)
        for i, response in zip(chosen, responses, strict=True):
            rollouts[i] = response.rollout(asks[i], version, with_logprobs)
    return [rollouts[i] for i in range(len(asks))]


@dataclass(slots=True)
class _Response:
    """The response of one ask while it grows."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = FinishReason.LENGTH

    def rollout(self, ask: Ask, version: int, with_logprobs: bool) -> Rollout:
        return Rollout(
            sample_id=ask.sample_id,
            prompt_index=ask.prompt.index,
            version=version,
            prompt_ids=ask.prompt.prompt_ids,
            header_ids=ask.prompt.header_ids,
            response_ids=np.array(self.ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32) if with_logprobs else None,
            finish=self.finish,
            seed=ask.seed,
            teacher=ask.prompt.teacher,
        )


class _Rows:
    """The rows decoded together and their cache; `index` [B] says whose response each row writes.

    `mask` [B, P + max_new_tokens] is 0 on left padding, None when there is none: attention without
    a mask is the faster path.
    """

    def __init__(self, model: Any, asks: Sequence[Ask], sampling: Sampling) -> None:
        from transformers import DynamicCache

        prompts = [ask.prompt.prompt_ids for ask in asks]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.width = int(lengths.max())
        padded = np.full((len(prompts), self.width), sampling.pad_id, dtype=np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[self.width - len(prompt) :] = prompt
        pads = self.width - lengths
        mask = torch.arange(self.width + sampling.max_new_tokens) >= pads[:, None]
        device = model.device
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.index = list(range(len(asks)))
        self.pads = pads[:, None].to(device)
        self.mask = mask.long().to(device) if bool(pads.any()) else None
        self.inputs = torch.from_numpy(padded).to(device)
        self.uniforms = _uniforms(asks, sampling.max_new_tokens).to(device)

    def logits(self) -> Tensor:
        """Feed the inputs at hand; float32 logits [B, V] of the next token of every row."""
        start = self.cache.get_seq_length()
        end = start + self.inputs.shape[1]
        places = torch.arange(start, end, device=self.inputs.device)
        out = self.model(
            input_ids=self.inputs,
            attention_mask=None if self.mask is None else self.mask[:, :end],
            position_ids=(places - self.pads).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        assert isinstance(logits, Tensor)
        return logits

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (positions in the batch, ascending)."""
        picked = torch.tensor(rows, device=self.inputs.device)
        self.cache.batch_select_indices(picked)
        self.index = [self.index[row] for row in rows]
        self.inputs, self.pads = self.inputs[picked], self.pads[picked]
        self.uniforms = self.uniforms[picked]
        self.mask = None if self.mask is None else self.mask[picked]


@torch.inference_mode()
def _decode(model: Any, asks: Sequence[Ask], sampling: Sampling) -> list[_Response]:
    rows = _Rows(model, asks, sampling)
    responses = [_Response() for _ in asks]
    live = set(range(len(asks)))
    for step in range(sampling.max_new_tokens):
        ids, logprobs = choose(rows.logits(), rows.uniforms[:, step], sampling)
        for i, token, logprob in zip(rows.index, ids.tolist(), logprobs.tolist(), strict=True):
            if i not in live:
                continue
            if not math.isfinite(logprob):
                raise _not_finite(asks[i], step)
            responses[i].ids.append(token)
            responses[i].logprobs.append(logprob)
            if token in sampling.stop_ids:
                responses[i].finish = FinishReason.STOP
                live.remove(i)
        if not live:
            break
        rows.inputs = ids[:, None]
        if len(rows.index) - len(live) >= _COMPACT_SHARE * len(rows.index):
            rows.keep([row for row, i in enumerate(rows.index) if i in live])
    return responses


def _uniforms(asks: Sequence[Ask], count: int) -> Tensor:
    """One uniform per sample and token [B, count], float64, each row from its sample's own seed."""
    streams = (np.random.Generator(np.random.Philox(key=ask.seed % 2**64)) for ask in asks)
    return torch.from_numpy(np.stack([stream.random(count) for stream in streams]))


def _check_context(model: Any, longest_prompt: int, sampling: Sampling) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = longest_prompt + sampling.max_new_tokens
    if limit is not None and needed > limit:
        raise ModelError(
            f"a prompt of {longest_prompt} tokens and {sampling.max_new_tokens} new ones do not "
            f"fit the model's {limit} positions: lower data.max_prompt_tokens, or "
            "generate.max_new_tokens and eval.max_new_tokens"
        )


def _not_finite(ask: Ask, step: int) -> RunError:
    return RunError(
        f"the model gives non-finite logits at response token {step} of sample {ask.sample_id} "
        f"(prompt {ask.prompt.index}): its weights are damaged; go back to an earlier checkpoint "
        "and lower train.lr, or set generate.dtype float32"
    )

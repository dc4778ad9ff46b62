"""The decode loop: a batch of rows, in which the next request takes over each finished row.

Promises: a sample depends on its seed and prompt only, not on other rows or on when it joined the
batch (to float noise), because each token uses one uniform from the sample's own stream. A prompt
that several samples share is prefilled once. Does not load snapshots or tokenise.

Dimensions: B rows, V model vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npd.errors import RunError
from npd.generate.kv_cache import build_cache
from npd.generate.sampling import Sampling, choose
from npd.models.packed_attention import check_plain, check_rotation
from npd.models.packed_mixers import unpacked_mixers
from npd.types import FinishReason, Rollout, SampleRequest

# A prefill for new rows, or a removal of finished ones, costs about a decode step, so both wait
# until an eighth of the rows is finished. A batch of 8 or fewer does not wait.
_DONE_SHARE = 0.125


class Draft:
    """The growing response to one request, of at most `limit` tokens."""

    def __init__(self, request: SampleRequest, limit: int) -> None:
        self.request, self.limit = request, limit
        self.key = request.prompt.prompt_ids.astype(np.int32).tobytes()
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish = FinishReason.LENGTH
        self._stream = np.random.Generator(np.random.Philox(key=request.seed % 2**64))

    @property
    def is_done(self) -> bool:
        """Whether the response has ended."""
        return self.finish is FinishReason.STOP or len(self.ids) >= self.limit

    def uniform(self) -> float:
        """The random number in [0, 1) for the next token."""
        return self._stream.random()

    def add(self, token: int, logprob: float, *, is_end: bool) -> None:
        """Append a token, which may end the response. RunError if its log-prob is not finite."""
        if not math.isfinite(logprob):
            raise RunError(
                f"the model gives non-finite logits at response token {len(self.ids)} of sample "
                f"{self.request.sample_id} (prompt {self.request.prompt.index}): its weights are "
                "damaged; go back to an earlier checkpoint and lower train.lr, or set "
                "generate.dtype: float32"
            )
        self.ids.append(token)
        self.logprobs.append(logprob)
        if is_end:
            self.finish = FinishReason.STOP

    def rollout(self, version: int, with_logprobs: bool) -> Rollout:
        """The finished response as a rollout."""
        request = self.request
        return Rollout(
            sample_id=request.sample_id,
            prompt_index=request.prompt.index,
            version=version,
            prompt_ids=request.prompt.prompt_ids,
            header_ids=request.prompt.header_ids,
            response_ids=np.array(self.ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32) if with_logprobs else None,
            finish=self.finish,
            seed=request.seed,
            teacher=request.prompt.teacher,
        )


def cache_name(model: Any) -> str:
    """The name of the cache argument of `forward`, of models with attention and without."""
    known = inspect.signature(model.forward).parameters
    # Newer releases of transformers use `cache`.
    names = (name for name in ("past_key_values", "cache_params", "cache") if name in known)
    return next(names, "past_key_values")


@torch.inference_mode()
def decode(model: Any, drafts: Sequence[Draft], sampling: Sampling) -> None:
    """Complete every draft, starting with the longest prompts."""
    longest = max(len(draft.request.prompt.prompt_ids) + draft.limit for draft in drafts)
    check_rotation(model.config.get_text_config(), longest)
    # With this order a later prompt always fits the columns in use, and equal prompts are adjacent.
    order = sorted(drafts, key=lambda draft: (-len(draft.key), draft.key))
    rows = _Rows(model, order, sampling)
    while rows.fill():
        rows.step()


@dataclass(slots=True)
class _Prompts:
    """Prefilled prompts: their cache, and the logits [n, V] of each response's first token.

    `drafts` are waiting for a row, each with the index of its prompt among the n.
    """

    cache: Any
    logits: Tensor
    drafts: deque[tuple[Draft, int]]


class _Rows:
    """The batch of rows. `pads` [B] are the columns at which the rows' prompts begin."""

    def __init__(self, model: Any, drafts: Sequence[Draft], sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._cache_name = cache_name(model)
        self._waiting = deque(drafts)
        self._ready: _Prompts | None = None
        self._width = max(len(draft.request.prompt.prompt_ids) for draft in drafts)
        num_rows = min(sampling.batch_size, len(drafts))
        self._cache, num_rows = build_cache(model.config, num_rows, self._width)
        self._drafts: list[Draft | None] = [None] * num_rows
        self._pads = torch.zeros(num_rows, dtype=torch.long)
        self._inputs = torch.zeros(num_rows, 1, dtype=torch.long, device=model.device)

    def fill(self) -> bool:
        """Assign finished rows to waiting drafts, or drop them; False if all drafts are done."""
        while True:
            live = self._live()
            num_done = len(self._drafts) - len(live)
            if live and num_done < _DONE_SHARE * len(self._drafts):
                return True
            if not self._ready and not self._waiting:
                if live and num_done:
                    self._drop(live)
                return bool(live)
            self._admit(sorted(set(range(len(self._drafts))) - set(live)))

    def step(self) -> None:
        """Decode one token in every row."""
        cache, live = self._cache, self._live()
        cache.start = int(self._pads[live].min())
        if cache.is_full:
            self._compact(None)
        # A finished row attends only to its current column, because it may exceed the context.
        pads = torch.full_like(self._pads, cache.end)
        pads[live] = self._pads[live]
        seen = torch.arange(cache.start, cache.end + 1) >= pads[:, None]
        logits = self._forward(self._inputs, seen, (cache.end - pads)[:, None], cache.model_cache)
        cache.advance()
        self._append(range(len(self._drafts)), logits)

    def _live(self) -> list[int]:
        return [row for row, draft in enumerate(self._drafts) if draft and not draft.is_done]

    def _admit(self, rows: list[int]) -> None:
        """Start waiting drafts in `rows`, as long as there are any."""
        while rows and (self._ready or self._waiting):
            ready = self._ready or self._prefill(len(rows))
            started = [ready.drafts.popleft() for _ in range(min(len(rows), len(ready.drafts)))]
            which = [index for _, index in started]
            taken, rows = rows[: len(started)], rows[len(started) :]
            self._cache.put(ready.cache, which, taken, is_last=not ready.drafts)
            for row, (draft, _) in zip(taken, started, strict=True):
                self._drafts[row] = draft
                self._pads[row] = self._cache.end - len(draft.request.prompt.prompt_ids)
            self._append(taken, ready.logits[which])
            self._ready = ready if ready.drafts else None

    def _prefill(self, count: int) -> _Prompts:
        """Prefill the prompts of the next `count` drafts and of later drafts with the same ones.

        If padding would change a state, the prompts are of one length.
        """
        indices: dict[bytes, int] = {}
        drafts: deque[tuple[Draft, int]] = deque()
        length = len(self._waiting[0].key)
        while self._waiting and (len(drafts) < count or self._waiting[0].key in indices):
            if self._cache.has_states and len(self._waiting[0].key) != length:
                break
            draft = self._waiting.popleft()
            drafts.append((draft, indices.setdefault(draft.key, len(indices))))
        prompts = [np.frombuffer(key, np.int32) for key in indices]
        width = len(prompts[0])
        ids = np.full((len(prompts), width), self._sampling.pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        pads = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        cache = self._cache.new_prompts()
        inputs = torch.from_numpy(ids).to(self._model.device)
        positions = torch.arange(width)
        logits = self._forward(inputs, positions >= pads, (positions - pads).clamp(min=0), cache)
        return _Prompts(cache, logits, drafts)

    def _forward(self, inputs: Tensor, seen: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Float32 logits [B, V] of the next token; `seen` [B, columns] is false on padding."""
        device = inputs.device
        is_masked = self._cache.has_columns and not bool(seen.all())
        out = self._model(
            input_ids=inputs,
            # Attention is faster without a mask.
            attention_mask=seen.long().to(device) if is_masked else None,
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
        )
        logits = out.logits[:, -1].float()
        assert isinstance(logits, Tensor)
        return logits

    def _append(self, rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of `rows` from their logits; ignores tokens of finished rows."""
        drafts = [draft for draft in (self._drafts[row] for row in rows) if draft]
        uniforms = torch.tensor([draft.uniform() for draft in drafts], dtype=torch.float64)
        ids, logprobs = choose(logits, uniforms.to(logits.device), self._sampling)
        for draft, token, logprob in zip(drafts, ids.tolist(), logprobs.tolist(), strict=True):
            if not draft.is_done:
                draft.add(token, logprob, is_end=self._sampling.is_end(token))
        self._inputs[torch.tensor(rows), 0] = ids

    def _drop(self, live: list[int]) -> None:
        """Keep only the `live` rows."""
        self._drafts = [self._drafts[row] for row in live]
        self._inputs, self._pads = self._inputs[live], self._pads[live]
        self._compact(live)

    def _compact(self, rows: list[int] | None) -> None:
        """Keep `rows` (None: all) and discard columns to the left of every live row."""
        end = self._cache.end
        start = int(self._pads[self._live()].min())
        length = max(end - start, self._width)
        self._cache.start = start
        self._cache.keep(rows, length)
        self._pads = (self._pads - (end - length)).clamp(min=0)


# Attention for decoding.

_ATTENTION = "npd_decode"


@contextmanager
def decode_attention(model: Any) -> Iterator[None]:
    """Use the decoding attention in `model` within the block, in place of its own attention.

    Models with eager attention keep it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    # Eager is the user's choice, or the only attention of the architecture.
    if before == "eager":
        with unpacked_mixers():
            yield
        return
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    try:
        with without_cudnn_attention(), unpacked_mixers():
            yield
    finally:
        model.set_attn_implementation(before)


class _Blocks:
    """The number of open blocks in all threads, and cuDNN's setting before the first of them."""

    lock, count, was_on = Lock(), 0, True


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN in SDPA, process-wide, until the last such block of any thread ends.

    On newer GPUs SDPA prefers cuDNN, which builds a plan for each shape. In decoding every token
    has a new shape. The other kernels need no plan.
    """
    cuda = torch.backends.cuda
    with _Blocks.lock:
        if _Blocks.count == 0:
            _Blocks.was_on = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            cuda.enable_cudnn_sdp(False)
        _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= 1
            if _Blocks.count == 0:
                cuda.enable_cudnn_sdp(_Blocks.was_on)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, Q, Hq, D] of query [B, Hq, Q, D], key and value [B, Hkv, T, D].

    The mask is [B, 1, Q, T] or None. Results equal transformers' SDPA path (to float noise). In the
    one-token step of grouped-query models, the query heads that share a key become one longer
    query, so that no key is copied; that halves a decode step on CPU. All other steps use
    transformers' own path.

    Raises:
        UnsupportedAttentionError: the layer has features that SDPA lacks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    check_plain({name: kwargs.get(name) for name in ("softcap", "s_aux")})
    num_rows, num_heads, num_queries, size = query.shape
    num_shared = key.shape[1]
    if num_queries > 1 or num_shared == num_heads or kwargs.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    grouped = query.reshape(num_rows, num_shared, num_heads // num_shared, size)
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(num_rows, 1, num_heads, value.shape[-1]), None

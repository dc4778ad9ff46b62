"""The decode loop: rows of tokens that grow together, each given to the next ask when it is done.

Promises: a sample depends on its seed and prompt, not on the rows beside it or on when it joined
them (one uniform a token from its own stream, up to float noise); a prompt that several samples
share is read once. Knows nothing of snapshots or of text.

Dimensions: B rows, V model vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npd.attention import check_rotation
from npd.errors import RunError
from npd.generate.cache import build_cache
from npd.generate.sampling import Sampling, choose
from npd.types import Ask, FinishReason, Rollout

# Reading the prompts of new rows, and dropping rows when no ask is left, cost about a step each:
# wait until an eighth of the rows is done. A batch of 8 or fewer does it at once.
_DONE_SHARE = 0.125


class Draft:
    """The response to one ask while it grows, to at most `limit` tokens."""

    def __init__(self, ask: Ask, limit: int) -> None:
        self.ask, self.limit = ask, limit
        self.key = ask.prompt.prompt_ids.astype(np.int32).tobytes()
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish = FinishReason.LENGTH
        self._stream = np.random.Generator(np.random.Philox(key=ask.seed % 2**64))

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.finish is FinishReason.STOP or len(self.ids) >= self.limit

    def uniform(self) -> float:
        """The random number, in [0, 1), that decides its next token."""
        return self._stream.random()

    def add(self, token: int, logprob: float, stop_ids: frozenset[int]) -> None:
        """Append a token. Raises RunError where its log-prob is not finite."""
        if not math.isfinite(logprob):
            raise RunError(
                f"the model gives non-finite logits at response token {len(self.ids)} of sample "
                f"{self.ask.sample_id} (prompt {self.ask.prompt.index}): its weights are damaged; "
                "go back to an earlier checkpoint and lower train.lr, or set generate.dtype float32"
            )
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in stop_ids:
            self.finish = FinishReason.STOP

    def rollout(self, version: int, with_logprobs: bool) -> Rollout:
        """The response as it leaves the room."""
        ask = self.ask
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


@torch.inference_mode()
def decode(model: Any, drafts: Sequence[Draft], sampling: Sampling) -> None:
    """Write every draft to its end; the first to start are those with the longest prompts."""
    longest = max(len(draft.ask.prompt.prompt_ids) + draft.limit for draft in drafts)
    check_rotation(model.config.get_text_config(), longest)
    # Later prompts are then never longer than the places in use. Equal prompts are neighbours.
    order = sorted(drafts, key=lambda draft: (-len(draft.key), draft.key))
    rows = _Rows(model, order, sampling)
    while rows.fill():
        rows.step()


@dataclass(slots=True)
class _Prompts:
    """Prompts that were read: their cache, and logits [n, V] of the first token of a response.

    `drafts` begin with them and wait for a row, each with the place of its prompt among the n.
    """

    cache: Any
    logits: Tensor
    drafts: deque[tuple[Draft, int]]


class _Rows:
    """The rows decoded together. `pads` [B]: the place where each row's prompt begins."""

    def __init__(self, model: Any, drafts: Sequence[Draft], sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._waiting = deque(drafts)
        self._ready: _Prompts | None = None
        self._width = max(len(draft.ask.prompt.prompt_ids) for draft in drafts)
        num_rows = min(sampling.batch_size, len(drafts))
        self._cache, num_rows = build_cache(model.config, num_rows, self._width)
        self._drafts: list[Draft | None] = [None] * num_rows
        self._pads = torch.zeros(num_rows, dtype=torch.long)
        self._inputs = torch.zeros(num_rows, 1, dtype=torch.long, device=model.device)

    def fill(self) -> bool:
        """Give rows that are done to drafts that wait, or drop them; False when all is written."""
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
        """Write one more token of every row."""
        cache, live = self._cache, self._live()
        cache.start = int(self._pads[live].min())
        if cache.is_full:
            self._move(None)
        # Rows that are done see themselves only: they may be past the places that the model has.
        pads = torch.full_like(self._pads, cache.end)
        pads[live] = self._pads[live]
        seen = torch.arange(cache.start, cache.end + 1) >= pads[:, None]
        logits = self._forward(self._inputs, seen, (cache.end - pads)[:, None], cache.model_cache)
        cache.advance()
        self._take(range(len(self._drafts)), logits)

    def _live(self) -> list[int]:
        return [row for row, draft in enumerate(self._drafts) if draft and not draft.is_done]

    def _admit(self, rows: list[int]) -> None:
        """Start drafts that wait in `rows`, as far as there are any."""
        while rows and (self._ready or self._waiting):
            ready = self._ready or self._read(len(rows))
            started = [ready.drafts.popleft() for _ in range(min(len(rows), len(ready.drafts)))]
            which = [place for _, place in started]
            taken, rows = rows[: len(started)], rows[len(started) :]
            self._cache.put(ready.cache, which, taken, is_last=not ready.drafts)
            for row, (draft, _) in zip(taken, started, strict=True):
                self._drafts[row] = draft
                self._pads[row] = self._cache.end - len(draft.ask.prompt.prompt_ids)
            self._take(taken, ready.logits[which])
            self._ready = ready if ready.drafts else None

    def _read(self, count: int) -> _Prompts:
        """Feed the prompts of the next `count` drafts; all that share them are ready then."""
        places: dict[bytes, int] = {}
        drafts: deque[tuple[Draft, int]] = deque()
        while self._waiting and (len(drafts) < count or self._waiting[0].key in places):
            draft = self._waiting.popleft()
            drafts.append((draft, places.setdefault(draft.key, len(places))))
        prompts = [np.frombuffer(key, np.int32) for key in places]
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
        """Float32 logits [B, V] of the next token; `seen` [B, places] is false on padding."""
        device = inputs.device
        out = self._model(
            input_ids=inputs,
            # Attention without a mask is the faster path.
            attention_mask=None if bool(seen.all()) else seen.long().to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        assert isinstance(logits, Tensor)
        return logits

    def _take(self, rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of `rows` from their logits; rows that are done go on unread."""
        drafts = [draft for draft in (self._drafts[row] for row in rows) if draft]
        uniforms = torch.tensor([draft.uniform() for draft in drafts], dtype=torch.float64)
        ids, logprobs = choose(logits, uniforms.to(logits.device), self._sampling)
        for draft, token, logprob in zip(drafts, ids.tolist(), logprobs.tolist(), strict=True):
            if not draft.is_done:
                draft.add(token, logprob, self._sampling.stop_ids)
        self._inputs[torch.tensor(rows), 0] = ids

    def _drop(self, live: list[int]) -> None:
        """Go on with `live` rows only."""
        self._drafts = [self._drafts[row] for row in live]
        self._inputs, self._pads = self._inputs[live], self._pads[live]
        self._move(live)

    def _move(self, rows: list[int] | None) -> None:
        """Move the cache to the left, to where the oldest live row begins."""
        end = self._cache.end
        start = int(self._pads[self._live()].min())
        length = max(end - start, self._width)
        self._cache.start = start
        self._cache.move(rows, length)
        self._pads = (self._pads - (end - length)).clamp(min=0)

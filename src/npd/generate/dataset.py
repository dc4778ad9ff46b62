"""The data as the writer: each prompt's own completion comes back as its rollout.

Promises: no model, no randomness, version 0 always (the text is nobody's policy, so it never goes
stale and has no behaviour log-probs). Does not tokenise; completions arrive as ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npd.errors import DataError
from npd.types import Ask, FinishReason, Rollout


class DatasetGenerator:
    """Completions as rollouts, cut to `max_new_tokens` (then they count as truncated)."""

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens

    @property
    def version(self) -> int:
        """0: the text is nobody's policy."""
        return 0

    def load(self, snapshot: Path, version: int) -> None:
        """Nothing to load: the text does not depend on a model."""

    def generate(self, asks: Sequence[Ask]) -> list[Rollout]:
        """One rollout per ask, in the order of the asks.

        Raises:
            DataError: a prompt has no completion.
        """
        return [self._rollout(ask) for ask in asks]

    def close(self) -> None:
        """Nothing to let go of."""

    def _rollout(self, ask: Ask) -> Rollout:
        prompt = ask.prompt
        if prompt.completion_ids is None or len(prompt.completion_ids) == 0:
            raise DataError(
                f"prompt {prompt.index} has no completion, but generate.source dataset trains on "
                "completions: add a `completion` column (or name yours in data.columns), or set "
                "generate.source to student or teacher"
            )
        is_cut = len(prompt.completion_ids) > self._max_new_tokens
        return Rollout(
            sample_id=ask.sample_id,
            prompt_index=prompt.index,
            version=0,
            prompt_ids=prompt.prompt_ids,
            header_ids=prompt.header_ids,
            response_ids=prompt.completion_ids[: self._max_new_tokens],
            logprobs=None,
            finish=FinishReason.LENGTH if is_cut else FinishReason.STOP,
            seed=ask.seed,
            teacher=prompt.teacher,
        )

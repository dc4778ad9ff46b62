"""In-process generation with a transformers model: snapshots in, the rollouts of `decoding` out.

Promises: a sample depends on its seed and prompt, not on what is decoded beside it (up to float
noise); recorded log-probs are the model's own, untempered float32 ones over its whole vocabulary.
Does not score, tokenise, or keep anything between calls but the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from npd.config import GenerateConfig
from npd.errors import ModelError, StoreError
from npd.generate.attention import decode_attention
from npd.generate.decoding import Draft, decode
from npd.generate.sampling import Sampling
from npd.generate.weights import Snapshot, copy_weights
from npd.modeling import load_model, resolve_device
from npd.types import Ask, Rollout


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
    limits: Sequence[int] | None = None,
) -> list[Rollout]:
    """Decode `asks` with a loaded causal LM (eval mode, packed or not), in the order of the asks.

    Log-probs are recorded unless `with_logprobs` is off: log p(y_t) in nats at temperature 1 over
    the model's whole vocabulary, whatever the sampling. `limits` are the most tokens of each
    response, from 1 to `sampling.max_new_tokens`, which it is where they are not given.

    Raises:
        RunError: the model gives non-finite logits.
        ModelError: a sample would not fit the model's context.
    """
    if not asks:
        return []
    _check_context(model, max(len(ask.prompt.prompt_ids) for ask in asks), sampling)
    if limits is None:
        limits = [sampling.max_new_tokens] * len(asks)
    drafts = [Draft(ask, limit) for ask, limit in zip(asks, limits, strict=True)]
    with decode_attention(model):
        decode(model, drafts, sampling)
    return [draft.rollout(version, with_logprobs) for draft in drafts]


def _check_context(model: Any, longest_prompt: int, sampling: Sampling) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = longest_prompt + sampling.max_new_tokens
    if limit is not None and needed > limit:
        raise ModelError(
            f"a prompt of {longest_prompt} tokens and {sampling.max_new_tokens} new ones do not "
            f"fit the model's {limit} positions: lower data.max_prompt_tokens, or "
            "generate.max_new_tokens and eval.max_new_tokens"
        )

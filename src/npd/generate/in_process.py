"""In-process generation with a transformers model: loads snapshots, and decodes requests.

Promises: a sample depends on its seed and prompt only, not on other samples of the batch (to float
noise). Recorded log-probs are untempered, in float32, over the model's full vocabulary. Does not
score or tokenise, and keeps no state between calls except the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd.config import GenerateConfig
from npd.errors import InputError, ModelError, RunError, StoreError
from npd.generate.decoding import Draft, decode, decode_attention
from npd.generate.sampling import Sampling
from npd.models.device import resolve_device
from npd.models.loading import check_finite, load_model, own_code
from npd.models.metadata import context_of
from npd.models.out_of_memory import Fitting
from npd.models.packed_attention import UnsupportedAttentionError
from npd.models.tensors import about
from npd.types import EncodedPrompt, Rollout, SampleRequest

# The largest difference, in nats per token, between log-probs with and without a cache that
# rounding explains. Measured: a missing softcap on scores, 1.3 in every text; rounding in bfloat16,
# 1.2 in one of six texts (a pruned model on rare tokens) and 0.1 in the others, hence the median.
_DECODING_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.5}
_DECODED_LENGTHS = (6, 3, 5, 4, 6, 3)


_IF_NOTHING_FITS = (
    "give generators a device of their own, or set generate.max_new_tokens lower in a new run"
)


class TransformersGenerator:
    """A Generator in this process; `snapshot` and `version` are those loaded last.

    With `config.source` teacher the rollouts have no log-probs, because the student did not write
    them.
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
        self._fitting = Fitting("generate.batch_size", config.at_once, _IF_NOTHING_FITS)
        self._sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            stop_ids=frozenset(stop_ids),
            pad_id=pad_id,
            temperature=config.temperature,
            top_p=config.top_p,
            batch_size=config.at_once,
            vocab_size=vocab_size,
        )

    def load(self, snapshot: Path, version: int) -> None:
        """Load `snapshot`, in place if the loaded model has the same architecture.

        Raises:
            ModelError: `snapshot` is not a model directory.
            StoreError: its weights are truncated or unreadable.
        """
        from safetensors import SafetensorError

        model, loaded = self._model, self._loaded
        # Unload first: a load that fails halfway must not leave a model with mixed weights.
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

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        Raises:
            RunError: the model gives non-finite logits.
            ModelError: a sample does not fit the model's context.
        """
        assert self._model is not None, "generate() needs a snapshot: call load() first"
        assert self.version is not None
        return generate_with(
            self._model,
            requests,
            self._sampling,
            version=self.version,
            with_logprobs=self._is_student,
            fitting=self._fitting,
        )

    def release(self) -> None:
        """Free the model; `load` loads another."""
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model = self._loaded = self.snapshot = self.version = None

    def _build(self, snapshot: Path) -> Any:
        role = "student's snapshot" if self._is_student else "teacher"
        model = load_model(
            snapshot,
            role=role,
            dtype=self._dtype,
            device=self._device,
            packed=False,
            trust_remote_code=self._trust_remote_code,
        )
        with about(role, snapshot):
            check_decoding(model)
        return model


def generate_with(
    model: Any,
    requests: Sequence[SampleRequest],
    sampling: Sampling,
    *,
    version: int = 0,
    with_logprobs: bool = True,
    limits: Sequence[int] | None = None,
    fitting: Fitting | None = None,
) -> list[Rollout]:
    """Decode `requests` with a loaded causal LM (eval mode, packed or not); rollouts in order.

    `with_logprobs` records log p(y_t) in nats at temperature 1 over the full vocabulary, for any
    sampling. `limits` are the token limits of the responses, each from 1 to
    `sampling.max_new_tokens` (the default). If the device runs out of memory, smaller batches are
    decoded, from now on by whoever gives the same `fitting`.

    Raises:
        RunError: the model gives non-finite logits, or one response does not fit the device.
        ModelError: a sample does not fit the model's context.
    """
    if not requests:
        return []
    _check_context(model, max(len(request.prompt.prompt_ids) for request in requests), sampling)
    if limits is None:
        limits = [sampling.max_new_tokens] * len(requests)
    given = list(zip(requests, limits, strict=True))
    if fitting is None:
        fitting = Fitting("a batch of", sampling.batch_size, _IF_NOTHING_FITS)

    def attempt() -> list[Rollout]:
        drafts = [Draft(request, limit) for request, limit in given]
        fits = replace(sampling, batch_size=fitting.of(sampling.batch_size))
        with decode_attention(model):
            decode(model, drafts, fits)
        return [draft.rollout(version, with_logprobs) for draft in drafts]

    return fitting.run(attempt)


def check_decoding(model: Any) -> None:
    """Check on a few tokens that cached decoding has the log-probs of the architecture's own code.

    Decodes a batch of prompts of different lengths, then scores each text without a cache.

    Raises:
        ModelError: the log-probs differ, or the weights are not finite.
        RunError: the logits are not finite.
    """
    random, vocabulary = np.random.default_rng(0), model.config.get_text_config().vocab_size
    ids = [random.integers(vocabulary, size=n, dtype=np.int32) for n in _DECODED_LENGTHS]
    requests = [
        SampleRequest(i, i, EncodedPrompt(i, prompt, prompt)) for i, prompt in enumerate(ids)
    ]
    sampling = Sampling(3, frozenset(), pad_id=0, temperature=0.0, top_p=1.0, batch_size=len(ids))
    try:
        rollouts = generate_with(model, requests, sampling)
        apart = [_apart(model, rollout) for rollout in rollouts]
    except UnsupportedAttentionError as error:
        raise _refusal(model, str(error)) from error
    except RunError:
        check_finite(model)
        raise
    except (InputError, torch.OutOfMemoryError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise _refusal(model, f"cannot generate in process ({e!r:.200})") from e
    if (nats := too_far(apart, model.dtype)) is not None:
        raise _refusal(model, f"is {nats:.2g} nats per token off when it decodes with a cache")


def too_far(apart: Sequence[float], dtype: torch.dtype) -> float | None:
    """The error of decoding in nats per token if it is too large for rounding, else None.

    `apart` has one difference per text. In float32 the maximum must be small. In a narrower type
    the median must be: rounding affects single texts, a decoding error affects all of them.
    """
    is_exact = dtype == torch.float32
    nats = float(np.max(apart) if is_exact else np.median(apart))
    tolerance = _DECODING_TOLERANCE[torch.float32 if is_exact else torch.bfloat16]
    return None if nats <= tolerance else nats  # NaN is refused as well


def _apart(model: Any, rollout: Rollout) -> float:
    """The mean difference, in nats per token, between log-probs with and without a cache."""
    assert rollout.logprobs is not None
    ids = np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
    inputs = torch.from_numpy(ids)[None].to(model.device)
    with torch.inference_mode(), own_code(model):
        logits = model(input_ids=inputs, use_cache=False).logits[0].float()
    first = len(rollout.prompt_ids)
    found = logits[first - 1 : -1].log_softmax(dim=1).gather(1, inputs[0, first:, None])
    return float(np.abs(found[:, 0].cpu().numpy() - rollout.logprobs).mean())


def _refusal(model: Any, what: str) -> ModelError:
    return ModelError(
        f"this architecture ({type(model).__name__}) {what}: set generate.engine: vllm, or choose "
        "another model"
    )


def _check_context(model: Any, longest_prompt: int, sampling: Sampling) -> None:
    limit = context_of(model.config)
    needed = longest_prompt + sampling.max_new_tokens
    if limit is not None and needed > limit:
        raise ModelError(
            f"a prompt of {longest_prompt} tokens and a response of {sampling.max_new_tokens} do "
            f"not fit the model's context of {limit}: lower data.max_prompt_tokens, or "
            "generate.max_new_tokens and eval.max_new_tokens"
        )


# Loading a snapshot in place.

# Fields of config.json that do not describe the architecture.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The architecture and weight files of a model directory; no files for a hub name."""

    architecture: dict[str, Any]
    files: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """The snapshot at `path`; empty if there is no such folder."""
        config = path / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        architecture = {key: value for key, value in fields.items() if key not in _VOLATILE}
        return cls(architecture, tuple(sorted(path.glob("*.safetensors"))))


def copy_weights(model: Any, old: Snapshot, new: Snapshot) -> bool:
    """Copy the weights of `new` into `model`, loaded from `old`; whether they fit.

    Either every parameter is overwritten, or none. Does not verify checksums (the store does).

    Raises:
        safetensors.SafetensorError: a weight file cannot be read.
    """
    from safetensors import safe_open

    if not new.files or new.architecture != old.architecture:
        return False
    state: dict[str, torch.Tensor] = model.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in new.files:
        with safe_open(file, framework="pt") as tensors:
            names: list[str] = list(tensors.keys())
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    if not _fits(state, shapes):
        return False
    for file in new.files:
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            names = list(tensors.keys())
            for name in names:
                state[name].copy_(tensors.get_tensor(name))
    return True


def _fits(state: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the files have exactly the model's tensors; tied tensors may be stored once."""
    if any(
        name not in state or tuple(state[name].shape) != shape for name, shape in shapes.items()
    ):
        return False
    written = {state[name].data_ptr() for name in shapes}
    return all(name in shapes or tensor.data_ptr() in written for name, tensor in state.items())

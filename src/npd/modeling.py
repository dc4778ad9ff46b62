"""Causal language models as npd uses them: packed, without a cache, and without their LM head.

Promises: documents of a packed row never reach each other (the attention function takes their
boundaries and raises when they are missing; what else mixes tokens is refused at load), and
`head(hidden)` equals the model's own logits (checked at load too). Does not score, sample or train;
those rooms call this one.

Dimensions: T tokens of a packed row, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from npd import lora
from npd.attention import ATTENTION, Boundaries, Shared, registered_attention
from npd.errors import ModelError
from npd.head import head_of
from npd.types import IntArray
from npd.world import World

_LOADING = Lock()  # one thread at a time: transformers makes models on a device set for all
# What a document may differ by, relative, at another place of a row of the same shape: measured 0
# for attention-only models (24 layers, mixture of experts), 0.3 to 1.3 for those that mix. The room
# is for rounding in another order; an untrained mixer (3e-4) is still told apart in float32.
_PLACE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
_ALONE = World()


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed row: `input_ids`, `position_ids` [1, T]; `cu_seqlens` (0, ..., T) its documents.

    Example: documents [5, 6] and [7] give input_ids [[5, 6, 7]], position_ids [[0, 1, 0]] and
    cu_seqlens (0, 2, 3). Where documents share tokens, `shared` says which, and `cu_seqlens` are
    the documents' with each token as often as it is shared.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]
    shared: Shared | None = None


def pack_documents(documents: Sequence[IntArray], device: str | torch.device) -> PackedBatch:
    """Lay `documents` end to end in one row, positions restarting at each."""
    lengths = [len(document) for document in documents]
    assert lengths, "a row needs at least one document"
    assert min(lengths) > 0, "an empty document cannot be packed"
    ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = (0, *accumulate(lengths))
    return PackedBatch(on_device(ids[None], device), on_device(positions[None], device), bounds)


def on_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for what a GPU was asked to do before."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # From pageable memory the copy would wait.
    return tensor.pin_memory().to(device, non_blocking=True)


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    packed: bool = True,
    trust_remote_code: bool = False,
    world: World = _ALONE,
) -> Any:
    """A causal LM from a Hugging Face directory or name, in eval mode.

    The directory of a LoRA adapter gives the model it was trained on with the adapter merged in.
    `packed=True` gives the packed attention (no cache) and probes the architecture; False keeps
    SDPA, for decoding, where a model need not be packable. Threads that load take turns. In a
    `world` of several ranks each gets its part of every layer, or none gets any.

    Raises:
        ModelError: the directory cannot be loaded (on some rank), the documents of a packed row mix
            (recurrent, convolutional or ALiBi models), or the model's logits are not what its head
            gives.
    """
    if world.size > 1:
        # Ranks meet as weights begin to load: one whose model is missing would never come.
        world.agreed(lambda: read_config(path, trust_remote_code=trust_remote_code))

    def load() -> Any:
        return _loaded(path, dtype, packed, trust_remote_code, world.size).to(device).eval()

    model = world.agreed(load)
    if packed:
        _check_packable(model, str(path))
    return model


def _loaded(path: str | Path, dtype: str, packed: bool, trust: bool, ranks: int) -> Any:
    from transformers import AttentionInterface, AutoModelForCausalLM

    if packed:
        AttentionInterface.register(ATTENTION, registered_attention())
    base = lora.base_of(path)
    # Known to newer releases only, so it is left out where it says nothing.
    spread: dict[str, Any] = {} if ranks == 1 else {"distributed_config": {"tp_size": ranks}}
    # Of a whole model that may be a snapshot, the caller says what is damaged.
    damaged = () if ranks == 1 else (SafetensorError,)
    try:
        with quiet(), _LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                str(base or path),
                dtype=getattr(torch, "float32" if base else dtype),
                attn_implementation=ATTENTION if packed else "sdpa",
                trust_remote_code=trust,
                use_safetensors=True,
                **spread,
            )
    except (OSError, ValueError, KeyError, *damaged) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"cannot load a causal language model from {str(base or path)!r}: {reason}. "
            "Give a Hugging Face model directory with safetensors weights"
        ) from error
    return model if base is None else lora.merge(model, Path(path), dtype)


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Final hidden states [T, d] of a packed row: what the LM head is applied to."""
    backbone = getattr(model, model.base_model_prefix)
    out = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seqlens=Boundaries(batch.cu_seqlens, batch.shared),
    )
    hidden = out.last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers for the time of the block: they tear a live view."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def decoding(model: Any) -> Iterator[Any]:
    """A packed model as one that can decode with a cache, for the time of the block."""
    was_training = model.training
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(ATTENTION)
        model.train(was_training)


def read_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A model's config; of an adapter, its base's. Reads no weights.

    Raises:
        ModelError: there is none that can be used.
    """
    from transformers import AutoConfig

    model = str(lora.base_of(path) or path)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{str(path)!r} is not a model npd can read (no usable config.json): give a Hugging "
            "Face model directory or the name of one that is on this machine"
        ) from error


def can_share_out() -> bool:
    """Whether this transformers can load a part of a model in each of several ranks: 5.17 can."""
    import transformers

    return getattr(transformers, "DistributedConfig", None) is not None


def check_context(path: str | Path, longest: int, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError when the model's context is shorter than `longest` tokens.

    Reads the model's config only, no weights.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < longest:
        raise ModelError(
            f"{path}: a sample may have {longest} tokens (data.max_prompt_tokens + "
            f"generate.max_new_tokens) but the model's context is {context}: lower one of them"
        )


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one, cpu otherwise."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_packable(model: Any, path: str) -> None:
    try:
        with torch.no_grad():
            _check_documents_apart(model, path)
            _check_head(model, path)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise _refusal(model, path, f"cannot take a packed row ({e!r:.200})") from e


def _check_documents_apart(model: Any, path: str) -> None:
    """Each document must be the same behind the other as before it, where it sees itself alone.

    Swapping two of equal length keeps every shape, so that even bfloat16 hardly rounds otherwise.
    """
    a, b = _probe(model)
    forth = hidden_states(model, pack_documents([a, b], model.device))
    back = hidden_states(model, pack_documents([b, a], model.device)).roll(len(a), dims=0)
    apart = (forth - back).float().norm(dim=-1).max() / back.float().norm(dim=-1).mean()
    if not apart.item() <= _PLACE_TOLERANCE[back.dtype]:  # NaN is refused as well
        raise _refusal(model, path, "mixes the documents of a packed row")


def _check_head(model: Any, path: str) -> None:
    row = pack_documents(_probe(model), model.device)
    expected = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        use_cache=False,
        cu_seqlens=Boundaries(row.cu_seqlens),
    ).logits[0]
    got = head_of(model).logits(hidden_states(model, row))
    # bf16 keeps 8 bits: logits of size x agree to about x / 100 whatever the order of operations.
    scale = expected.float().abs().max().item()
    if not torch.allclose(got, expected.float(), atol=0.02 * scale + 1e-5, rtol=0.0):
        raise ModelError(
            f"{path}: this architecture ({type(model).__name__}) computes its logits in a way npd "
            "does not know (not head(hidden) with scale and softcap); please open an issue"
        )


def _probe(model: Any) -> tuple[IntArray, IntArray]:
    ids = np.arange(10, dtype=np.int32) % model.config.get_text_config().vocab_size
    return ids[:5], ids[5:]


def _refusal(model: Any, path: str, what: str) -> ModelError:
    return ModelError(
        f"{path}: this architecture ({type(model).__name__}) {what}: npd trains attention-only "
        "models with rotary or learned positions today; choose such a model"
    )

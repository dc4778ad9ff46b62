"""Causal language models as npd uses them: packed, without a cache, and without their LM head.

Promises: documents of a packed row never attend to each other (the attention function takes their
boundaries and raises when they are missing), and `head(hidden)` equals the model's own logits
(checked once at load). Does not score, sample or train; those rooms call this one.

Dimensions: T tokens of a packed row, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npd.errors import ModelError
from npd.types import IntArray

_ATTENTION = "npd_packed"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed row. `input_ids`, `position_ids` [1, T]; `cu_seqlens` (0, ..., T) bounds documents.

    Example: documents [5, 6] and [7] give input_ids [[5, 6, 7]], position_ids [[0, 1, 0]] and
    cu_seqlens (0, 2, 3).
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as plain numbers: logits = softcap(scale * (hidden @ weight.T + bias)).

    `weight` [V, d] is the model's own parameter (tied or not), not a copy.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of `hidden` [..., d]."""
        out = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def pack_documents(documents: Sequence[IntArray], device: str | torch.device) -> PackedBatch:
    """Lay `documents` end to end in one row, positions restarting at each."""
    lengths = [len(document) for document in documents]
    assert lengths, "a row needs at least one document"
    assert min(lengths) > 0, "an empty document cannot be packed"
    ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = (0, *accumulate(lengths))
    return PackedBatch(ids[None].to(device), positions[None].to(device), bounds)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: query [1, Hq, T, D], key and value [1, Hkv, T, D].

    Variable-length kernels on CUDA, one SDPA call a document elsewhere. Raises when the boundaries
    are missing, so that documents cannot mix silently.
    """
    cu_seqlens: tuple[int, ...] | None = kwargs.get("cu_seqlens")
    window = kwargs.get("sliding_window")
    assert cu_seqlens is not None, "packed attention was called without document boundaries"
    assert attention_mask is None, "packed attention builds no mask and takes none"
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    if window is not None and longest > window:
        raise ModelError(
            f"a document of {longest} tokens is longer than the model's sliding window ({window}), "
            "which packed attention does not apply: lower data.max_prompt_tokens or "
            "generate.max_new_tokens"
        )
    if query.device.type == "cuda":
        return _varlen(query, key, value, cu_seqlens, longest, scaling), None
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(cu_seqlens)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    scaling: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor(cu_seqlens, dtype=torch.int32, device=query.device)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    # window_size is (left, right); the default (-1, -1) is not causal.
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0)
    )
    assert isinstance(out, Tensor)
    return out[None]


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    packed: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM from a Hugging Face directory or name, in eval mode.

    `packed=True` gives the packed attention (no cache); False keeps SDPA, for decoding.

    Raises:
        ModelError: the directory cannot be loaded, or the model's logits are not what its head
            gives (an architecture npd does not understand).
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    if packed:
        AttentionInterface.register(_ATTENTION, packed_attention)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=_DTYPES[dtype],
            attn_implementation=_ATTENTION if packed else "sdpa",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"cannot load a causal language model from {str(path)!r}: {reason}. "
            "Give a Hugging Face model directory with safetensors weights"
        ) from error
    model = model.to(device).eval()
    if packed:
        _check_head(model, str(path))
    return model


def head_of(model: Any) -> Head:
    """The model's LM head; its weight stays the model's own parameter."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Final hidden states [T, d] of a packed row: what the LM head is applied to."""
    backbone = getattr(model, model.base_model_prefix)
    out = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
    )
    hidden = out.last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden[0]


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one, cpu otherwise."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_head(model: Any, path: str) -> None:
    probe = pack_documents(
        [np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)], model.device
    )
    with torch.no_grad():
        expected = model(
            input_ids=probe.input_ids,
            position_ids=probe.position_ids,
            use_cache=False,
            cu_seqlens=probe.cu_seqlens,
        ).logits[0]
        got = head_of(model).logits(hidden_states(model, probe))
    # bf16 keeps 8 bits: logits of size x agree to about x / 100 whatever the order of operations.
    scale = expected.float().abs().max().item()
    if not torch.allclose(got, expected.float(), atol=0.02 * scale + 1e-5, rtol=0.0):
        raise ModelError(
            f"{path}: this architecture ({type(model).__name__}) computes its logits in a way npd "
            "does not know (not head(hidden) with scale and softcap); please open an issue"
        )

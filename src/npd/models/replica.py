"""Checks an architecture on a small random replica, before the model itself is loaded.

A failure is a property of the architecture, because only replicas that run with the architecture's
own code are used. Does not read weights, and does not replace the checks at load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from npd.models.loading import (
    check_packable,
    loading,
    own_attention,
    own_code,
    register_attention,
    unreplaceable,
)
from npd.models.packed_mixers import pack_mixers

# Sizes of a replica, by their names in all model families. They only replace larger sizes.
_SIZES = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64)
_SIZES |= dict.fromkeys(("lru_width", "attention_hidden_size"), 64)
_SIZES |= dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "intermediate_size_mlp"), 64)
_SIZES |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
_SIZES |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4)
_SIZES |= dict.fromkeys(("head_dim", "kv_channels", "q_lora_rank", "kv_lora_rank"), 16)
_SIZES |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8)
_SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
_SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_k"), 2)
_SIZES |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64}
_SIZES |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES |= dict.fromkeys(("sliding_window", "attention_chunk_size"), 3)
# Shorter than the texts of a check, so that a mixer carries its state from chunk to chunk.
_SIZES |= dict.fromkeys(("chunk_size", "mamba_chunk_size"), 3)
# The number and size of a Mamba mixer's heads, whose product is the mixer's width.
_MIXER_HEADS = [("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")]
_MIXER_HEADS += [("num_heads", "head_dim")]
_NUM_LAYERS, _MOST_PARAMETERS = 2, 20_000_000
_PASSED: set[str] = set()


def check_packing(config: Any) -> None:
    """Check packed rows on a replica of the text model of `config`, if one can be built.

    Raises:
        ModelError: documents in a row influence each other, or the head differs.
    """
    _once(_check_packing, shrunk(config))


def check_writing(config: Any, check: Callable[[Any], None]) -> None:
    """Check decoding with `check`, which is called with a replica and may raise."""

    def look(small: Any) -> None:
        model = make(small, own_attention(small))
        if model is not None:
            check(model)

    _once(look, shrunk(config))


def _once(check: Callable[[Any], None], small: Any) -> None:
    """Run a check that may raise; a config that passed in this process is not checked again."""
    seen = f"{check.__qualname__} {small.to_json_string()}"
    if seen not in _PASSED:
        check(small)
        _PASSED.add(seen)


def _check_packing(small: Any) -> None:
    if make(small, "eager") is None:
        return
    attention = register_attention(small)
    try:
        model = _built(small, attention)
    except (KeyError, ValueError) as error:
        if attention in str(error):
            raise unreplaceable(small) from error
        return
    pack_mixers(model)
    check_packable(model)


def make(config: Any, attention: str | None) -> Any | None:
    """A replica that runs with the architecture's own code; None if it cannot be built."""
    try:
        model = _built(config, attention)
        with torch.no_grad(), own_code(model):
            logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    except Exception:  # noqa: BLE001 - shapes that do not fit fail in any line of any architecture
        return None
    return model if logits.isfinite().all() else None


def _built(config: Any, attention: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    def build() -> Any:
        given = copy.deepcopy(config)
        return AutoModelForCausalLM.from_config(given, attn_implementation=attention)

    with loading(), torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError("too large for a replica")
    with loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval().float()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.2)
    return model


def shrunk(config: Any) -> Any:
    """The config of a replica: the same architecture with layers of every type, all small."""
    small = copy.deepcopy(config.get_text_config())
    depth = getattr(small, "num_hidden_layers", None) or _NUM_LAYERS
    kept = _layers(small, depth)
    small.num_hidden_layers = len(kept)
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            setattr(small, name, [value[i] for i in kept])
    heads, shared = (
        getattr(small, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    for name, size in _SIZES.items():
        value = getattr(small, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            with suppress(AttributeError):  # it follows from others
                setattr(small, name, size)
    _match_mixer(small)
    if isinstance(shared, int):
        small.num_key_value_heads = 4 if shared == heads else min(shared, 2)
    if isinstance(getattr(small, "rope_parameters", None), Mapping):
        small.rope_parameters = _plain(small.rope_parameters)
    return small


def _match_mixer(small: Any) -> None:
    """Give a Mamba mixer the heads that its width needs, a multiple of the hidden size."""
    multiple = getattr(small, "mamba_expand", getattr(small, "expand", None))
    if multiple is None:
        return
    width = int(multiple * small.hidden_size)
    for count, size in _MIXER_HEADS:
        if hasattr(small, count) and hasattr(small, size):
            setattr(small, count, 4)
            setattr(small, size, width // 4)
            for groups in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
                if hasattr(small, groups):
                    setattr(small, groups, min(getattr(small, groups), 2))
    if hasattr(small, "mamba_d_ssm"):
        small.mamba_d_ssm = width


def _layers(config: Any, depth: int) -> list[int]:
    """Layers of every type, and at least two if the model has two."""
    kinds = list(getattr(config, "layer_types", None) or [])
    firsts = {kinds.index(kind) for kind in kinds}
    more = [i for i in range(depth) if i not in firsts][: max(0, _NUM_LAYERS - len(firsts))]
    return sorted([*firsts, *more])


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without scaling, which depends on the size of heads."""
    if "rope_type" in rope:
        kept = ("rope_theta", "partial_rotary_factor")
        return {"rope_type": "default", **{name: rope[name] for name in kept if name in rope}}
    return {
        name: _plain(part) if isinstance(part, Mapping) else part for name, part in rope.items()
    }

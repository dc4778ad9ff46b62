"""Whether several ranks can hold a model together, from its config alone: no weights are read."""

from __future__ import annotations

from npd.errors import ModelError
from npd.modeling import can_share_out, read_config

# What is shared out: heads, the width of MLPs (of experts), and the LM head by vocabulary.
_SHARED_OUT = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
)


def check_divisible(model: str, ranks: int, *, trust_remote_code: bool = False) -> None:
    """Check that each of `ranks` can have an equal part of every layer of `model`.

    Raises:
        ModelError: transformers is too old or has no plan for its architecture, or some size cannot
            be divided.
    """
    if ranks == 1:
        return
    remedy = "set score.ranks: 1, or score with vLLM (score.engine, docs/servers.md)"
    if not can_share_out():
        raise ModelError(
            f"score.ranks {ranks} needs transformers 5.17 or newer: pip install -U transformers, "
            f"{remedy}"
        )
    config = read_config(model, trust_remote_code=trust_remote_code).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise ModelError(
            f"{model}: transformers has no tensor-parallel plan for {config.model_type}, so "
            f"score.ranks {ranks} cannot share it out: {remedy}"
        )
    for name in _SHARED_OUT:
        size = getattr(config, name, None)
        if isinstance(size, int) and size % ranks:
            fits = [n for n in range(2, ranks) if _divides(config, n)]
            other = f"set score.ranks to {' or '.join(map(str, fits))}, or " if fits else ""
            raise ModelError(
                f"{model}: score.ranks {ranks} does not divide its {name} ({size}): {other}{remedy}"
            )


def _divides(config: object, ranks: int) -> bool:
    sizes = (getattr(config, name, None) for name in _SHARED_OUT)
    return all(not isinstance(size, int) or size % ranks == 0 for size in sizes)

"""AdamW as npd uses it: which parameters decay, and the clipping of their gradient.

Works on sharded parameters as on whole ones. Does not decide the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npd.config import TrainConfig
from npd.train.parallel import full


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices only, not on norms, biases, embeddings or LM head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(table.weight) for table in tables if table is not None}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p.dim() >= 2 and id(p) not in embeddings for p in parameters]
    groups = [
        {
            "params": [p for p, is_decayed in zip(parameters, decayed, strict=True) if is_decayed],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [
                p for p, is_decayed in zip(parameters, decayed, strict=True) if not is_decayed
            ],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to the global norm `largest`; gives the norm they had."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = full(nn.utils.get_total_norm(grads))
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm

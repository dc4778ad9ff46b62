"""The student and its loss as one module, and the optimiser.

`Objective` takes a packed row and returns the row's share of the step's loss. `build_optimizer` and
`clip` work on sharded parameters too. `move` takes both off a device and back. Does not decide the
learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npd.config import LossConfig, TrainConfig
from npd.models.lm_head import head_of
from npd.models.loading import autocast, hidden_states
from npd.train.batch import TrainRow
from npd.train.fsdp import gather
from npd.train.loss import near_policy_loss


class Objective(nn.Module):
    """Runs `model` on a row and computes the loss from its hidden states.

    It is one module so that FSDP keeps the LM head gathered for the loss, and reduces its gradient
    together with that of a tied embedding. `is_sharded` disables autocast's cache, which would keep
    a copy of every weight in the compute dtype during a row. `chunk`, if set, is how many tokens
    have logits at once, whatever the settings say.
    """

    def __init__(
        self, model: Any, config: TrainConfig, loss: LossConfig, *, is_sharded: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk: int | None = None
        self._is_bf16, self._settings = config.dtype == "bfloat16", loss.of_tokens
        self._keeps_casts = not is_sharded

    def forward(self, row: TrainRow, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The row's loss in a step of `tokens` response tokens, and the row's metric sums."""
        device = row.labels_N.device
        settings = self._settings if self.chunk is None else self._settings | {"chunk": self.chunk}
        with autocast(device, is_on=self._is_bf16, keeps_casts=self._keeps_casts):
            out = near_policy_loss(
                hidden_states(self.model, row.packed)[row.positions_N],
                head_of(self.model),
                row.labels_N,
                row.topk_ids_NK,
                row.topk_logprobs_NK,
                behavior_N=row.behavior_N,
                normalizer=float(tokens),
                **settings,
            )
        return out.loss, dict(out.metrics)


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on norms, biases, embeddings or LM head."""
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
    """Clip the gradients to the global norm `largest`; returns the norm before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = gather(nn.utils.get_total_norm(grads))
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def move(
    model: nn.Module, optimizer: torch.optim.Optimizer, to: Callable[[Tensor], Tensor]
) -> None:
    """Replace the data of every parameter, buffer and optimiser tensor by `to` of it.

    Parameters stay the same objects, so the optimiser, hooks and compiled layers that refer to them
    stay valid. Only between steps, since gradients are not moved, and not for sharded parameters.
    """
    assert all(parameter.grad is None for parameter in model.parameters()), "between steps only"
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = to(tensor.data)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = to(value)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory, not page-locked: torch would keep locked memory for good."""
    return tensor.to("cpu", copy=True)

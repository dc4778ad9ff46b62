"""A student and its loss as one module: a packed row in, the row's share of the step's loss out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from npd.config import LossConfig, TrainConfig
from npd.head import head_of
from npd.modeling import hidden_states
from npd.train.batch import TrainRow
from npd.train.device import autocast
from npd.train.loss import near_policy_loss


class Objective(nn.Module):
    """Runs `model` on a row and puts the loss on its hidden states.

    One module, so that what shards it has the LM head whole while the loss uses it, and its
    gradient in one piece with an embedding it is tied to. `is_sharded` keeps autocast from holding
    on to a copy of every weight in the compute type until the row is done.
    """

    def __init__(
        self, model: Any, config: TrainConfig, loss: LossConfig, *, is_sharded: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._is_bf16, self._settings = config.dtype == "bfloat16", loss.of_tokens
        self._keeps_casts = not is_sharded

    def forward(self, row: TrainRow, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the row, the step having `tokens` response tokens, and the row's metric sums."""
        device = row.labels_N.device
        with autocast(device, is_on=self._is_bf16, keeps_casts=self._keeps_casts):
            out = near_policy_loss(
                hidden_states(self.model, row.packed)[row.positions_N],
                head_of(self.model),
                row.labels_N,
                row.topk_ids_NK,
                row.topk_logprobs_NK,
                behavior_N=row.behavior_N,
                normalizer=float(tokens),
                **self._settings,
            )
        return out.loss, dict(out.metrics)

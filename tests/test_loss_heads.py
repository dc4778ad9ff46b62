"""The loss on heads that are not one plain weight: sharded over ranks, and with a LoRA adapter."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npd.errors import ModelError
from npd.models.lm_head import Head, head_of
from npd.runtime.local import LocalRuntime
from npd.runtime.rank_group import RankGroup
from npd.train.loss import near_policy_loss
from test_loss import make_case
from tiny_model import make_model

# Two ranks hold 12 and 11 rows of it.
NUM, VOCAB, K = 10, 23, 4


def gradients(impl: str, hidden: Any, weight: Any, bias: Any, rest: Any, count: float) -> Any:
    """Loss and gradients of hidden states, weight and bias."""
    hidden = hidden.detach().requires_grad_()
    options: dict[str, Any] = {"target": "tail", "impl": impl, "chunk": 3}
    out = near_policy_loss(hidden, Head(weight, bias), *rest, normalizer=count, **options)
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad, bias.grad


class HalfOfTheTokens:
    """A rank: a part of the head by FSDP2, and every second token."""

    def join(self, rank: int, meeting: Path) -> None:
        from npd.models.distributed import connect

        warnings.simplefilter("error")
        self.world = connect(meeting, rank=rank, size=2, device="cpu", timeout=600.0)

    def run(self, impl: str) -> Any:
        """Each rank's loss and hidden gradient, and the head's gradients, whole."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        hidden, weight, *rest = make_case(NUM, VOCAB, K)
        layer = torch.nn.Linear(weight.shape[1], VOCAB, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.linspace(-1, 1, VOCAB))
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        assert layer.weight.to_local().numel() < weight.numel()
        mine = slice(self.world.rank, None, 2)
        part, case = hidden[mine], [tensor[mine] for tensor in rest]
        loss, own, *head = gradients(impl, part, layer.weight, layer.bias, case, NUM / 2)
        assert all(type(grad) is type(layer.weight.data) for grad in head)
        shared = [grad.full_tensor().numpy() for grad in head]
        return self.world.gather((loss.item(), own.numpy())), shared

    def close(self) -> None:
        self.world.close()


@dataclass(frozen=True)
class Half:
    """Makes a rank's object in its process."""

    def __call__(self) -> HalfOfTheTokens:
        return HalfOfTheTokens()


@pytest.mark.slow
def test_a_head_sharded_over_two_ranks_has_the_gradient_of_a_whole_one(tmp_path):
    async def story():
        runtime = LocalRuntime(tmp_path / "logs", call_timeout=600.0)
        try:
            ranks = [runtime.spawn(f"rank-{rank}", Half(), threads=1) for rank in range(2)]
            group = RankGroup("ranks", ranks, tmp_path / "meeting")
            return [(await group.call("run", impl)).value for impl in ("chunked", "reference")]
        finally:
            await runtime.close()

    hidden, weight, *rest = make_case(NUM, VOCAB, K)
    bias = torch.linspace(-1, 1, VOCAB).double().requires_grad_()
    loss, own, *head = gradients("chunked", hidden, weight.requires_grad_(), bias, rest, NUM)
    for parts, shared in asyncio.run(story()):
        # A rank's loss is over its own tokens; FSDP2 averages gradients over ranks.
        assert sum(part[0] for part in parts) / 2 == pytest.approx(loss.item())
        for rank, (_, grad) in enumerate(parts):
            np.testing.assert_allclose(grad / 2, own[rank::2], atol=1e-12)
        for found, expected in zip(shared, head, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)


def adapted(**options):
    """A tiny untied model with an adapter on its LM head, and that layer."""
    import peft

    model = make_model(0, tied=False)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], **options)
    peft.inject_adapter_in_model(config, model, "default")
    layer = model.get_output_embeddings()
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model.train(), layer


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_an_adapter_on_the_head_is_used_and_trained(impl):
    model, layer = adapted()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    hidden, _, labels, ids, logprobs = make_case(9, 304, 3, dim=32, dtype=torch.float32)
    out = near_policy_loss(hidden, head_of(model), labels, ids, logprobs, impl=impl)
    out.loss.backward()
    found = a.grad.clone(), b.grad.clone()
    assert layer.base_layer.weight.grad is None
    a.grad = b.grad = None
    # What peft's layer computes, by plain arithmetic.
    logq = layer(hidden).log_softmax(-1)
    kd = (logprobs.exp() * (logprobs - logq.gather(1, ids))).sum(1)
    loss = (0.9 * kd - 0.1 * logq.gather(1, labels[:, None])[:, 0]).mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(found, (a.grad, b.grad), atol=1e-6, rtol=1e-4)


def test_an_adapter_that_is_off_or_merged_is_not_added_again():
    model, layer = adapted()
    layer.enable_adapters(False)
    assert head_of(model).weight is layer.weight
    layer.enable_adapters(True)
    whole = head_of(model).weight.detach()
    layer.merge()
    torch.testing.assert_close(head_of(model).weight, whole)


@pytest.mark.parametrize("kind", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_is_no_sum_of_weights_is_refused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of a bias beside a layer that has none
        model, _ = adapted(**kind)
    with pytest.raises(ModelError, match="plain LoRA"):
        head_of(model)

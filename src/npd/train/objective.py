"""The student and its loss as one module, and the optimiser.

`Objective` takes a packed row and returns the row's share of the step's loss. `build_optimizer` and
`clip` work on sharded parameters too. `move` takes both off a device and back. Does not decide the
learning rate.

`AdamW8bit` keeps moments in 8 bits (block-wise dynamic quantisation, Dettmers et al.,
arXiv 2110.02861). Two changes make it exact to save and safe to use. Every code's value is found
again from the values alone, so a checkpoint of plain numbers resumes to the bit. A second moment
above 0 never becomes 0, which would divide a step by epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from npd.config import LossConfig, TrainConfig
from npd.models.lm_head import head_of
from npd.models.loading import autocast, hidden_states
from npd.train.batch import TrainRow
from npd.train.fsdp import gather
from npd.train.loss import near_policy_loss

# Moments that share a scale, and the fewest of a tensor that are quantised at all.
_BLOCK, _FEWEST = 256, 4096
# Moments that are float32 at once, whole blocks: 64 MiB of each.
_SLICE = 2**24
_EPSILON = 1e-8


class Objective(nn.Module):
    """Runs `model` on a row and computes the loss from its hidden states.

    It is one module so that FSDP keeps the LM head gathered for the loss, and reduces its gradient
    together with that of a tied embedding. `is_autocast`: computes in bfloat16 from the float32
    weights; without, in the dtype in which the weights come (as FSDP gathers them). `chunk`, if
    set, is how many tokens have logits at once, whatever the settings say.
    """

    def __init__(self, model: Any, loss: LossConfig, *, is_autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.chunk: int | None = None
        self._is_autocast, self._settings = is_autocast, loss.of_tokens

    def forward(self, row: TrainRow, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The row's loss in a step of `tokens` response tokens, and the row's metric sums."""
        device = row.labels_N.device
        settings = self._settings if self.chunk is None else self._settings | {"chunk": self.chunk}
        with autocast(device, is_on=self._is_autocast):
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


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
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
    if config.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Clip the gradients to the global norm `largest`; returns the norm before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = gather(nn.utils.get_total_norm(grads))
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


@cache
def _levels(is_signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sizes that codes stand for, ascending from 0 to 1, and the limits between them.

    Seven decades, each with twice as many levels as the one below: 128 if there is a sign besides,
    256 if not.
    """
    sizes = [0.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if is_signed else 1)) + 1)
        sizes += ((ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    sizes = [*sizes, 1.0] if not is_signed else [*sizes[:-1], 1.0]
    levels = torch.tensor(sizes, dtype=torch.float32, device=device)
    return levels, (levels[:-1] + levels[1:]) / 2


@dataclass(frozen=True, slots=True)
class Moments:
    """`num` float32 numbers as one byte each and a scale for each block.

    Example: a block (0.5, -2.0) has the scale 2.0 and codes of 0.25 and -1.0.
    """

    codes: Tensor
    scales: Tensor
    num: int

    @classmethod
    def zeros(cls, num: int, *, is_signed: bool, device: torch.device) -> Moments:
        """`num` zeros; with `is_signed` of numbers that may be negative."""
        blocks = -(-num // _BLOCK)
        kind = torch.int8 if is_signed else torch.uint8
        codes = torch.zeros(blocks * _BLOCK, dtype=kind, device=device)
        return cls(codes, torch.zeros(blocks, device=device), num)

    def read(self, first: int, last: int) -> Tensor:
        """The numbers from `first`, where a block begins, to before `last`."""
        end = -(-last // _BLOCK)
        codes = self.codes[first : end * _BLOCK]
        levels, _ = _levels(codes.dtype == torch.int8, codes.device)
        found = levels[codes.int().abs()]
        if codes.dtype == torch.int8:
            found *= codes.sign()
        found.view(-1, _BLOCK).mul_(self.scales[first // _BLOCK : end, None])
        return found[: last - first]

    def write(self, first: int, values: Tensor) -> None:
        """Store `values` from `first` on, where a block begins."""
        padded = nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
        scales = padded.abs().amax(dim=1)
        sizes = padded.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        is_signed = self.codes.dtype == torch.int8
        codes = torch.bucketize(sizes, _levels(is_signed, values.device)[1])
        if is_signed:
            codes *= padded.sign().long()
        else:
            codes = torch.maximum(codes, (padded > 0).long())
        begin, size = first // _BLOCK, codes.numel()
        self.codes[first : first + size] = codes.flatten().to(self.codes.dtype)
        self.scales[begin : begin + len(scales)] = scales


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 8 bits; those of small tensors (norms, biases) stay float32.

    Of a sharded parameter each rank quantises its shard, so the numbers of a run depend on the
    number of ranks, within the rounding. `moments_of` gives plain numbers, `load_state_dict` takes
    them.
    """

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not supported."""
        assert closure is None, "a step does not compute its loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None, "a step needs a gradient"
        weight, grad = _flat(parameter), _flat(parameter.grad.contiguous())
        if not state:
            state["step"] = torch.zeros(())
            for kind in _MOMENTS:
                state[kind] = _empty(weight, is_signed=kind == "exp_avg")
        state["step"] += 1
        beta1, beta2 = group["betas"]
        steps = float(state["step"])
        rate, root = group["lr"] / (1 - beta1**steps), math.sqrt(1 - beta2**steps)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        for part in _slices(len(weight)):
            first, second = (_read(state[kind], part) for kind in _MOMENTS)
            first.lerp_(grad[part], 1 - beta1)
            second.mul_(beta2).addcmul_(grad[part], grad[part], value=1 - beta2)
            weight[part].addcdiv_(first, (second.sqrt() / root).add_(_EPSILON), value=-rate)
            for kind, values in zip(_MOMENTS, (first, second), strict=True):
                _write(state[kind], part, values)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from the numbers of each moment, as a checkpoint has them."""
        for own, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({key: value for key, value in given.items() if key != "params"})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            given, weight = state_dict["state"][index], _flat(parameter)
            self.state[parameter] = {"step": given["step"].clone().cpu()}
            for kind in _MOMENTS:
                held, whole = (
                    _empty(weight, is_signed=kind == "exp_avg"),
                    _flat(given[kind].contiguous()),
                )
                for part in _slices(len(weight)):
                    _write(held, part, whole[part].to(weight.device))
                self.state[parameter][kind] = held


def move(
    model: nn.Module, optimizer: torch.optim.Optimizer, to: Callable[[Tensor], Tensor]
) -> None:
    """Replace every parameter, buffer and optimiser tensor by `to` of it; sharded ones too.

    Parameters stay the same objects, so the optimiser, hooks and compiled layers that refer to them
    stay valid. Only between steps, since gradients are not moved. A count of steps stays where it
    is, because an optimiser on a GPU may keep it on the CPU.
    """
    assert all(parameter.grad is None for parameter in model.parameters()), "between steps only"
    model._apply(to)  # type: ignore[no-untyped-call]
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = to(value)
            elif isinstance(value, Moments):
                state[name] = Moments(to(value.codes), to(value.scales), value.num)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory, not page-locked: torch would keep locked memory for good."""
    return tensor.to("cpu", copy=True)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter as plain numbers, sharded as it is; empty before a step.

    What one device has in 8 bits comes on the CPU, where there is room for it.
    """
    return {
        kind: _as_floats(held, parameter) if isinstance(held, Moments) else _like(held, parameter)
        for kind, held in optimizer.state.get(parameter, {}).items()
    }


def _as_floats(held: Moments, parameter: Any) -> Tensor:
    is_shared = hasattr(parameter, "full_tensor") and parameter.device_mesh.size() > 1
    if not is_shared:
        on_cpu = Moments(held.codes.cpu(), held.scales.cpu(), held.num)
        return on_cpu.read(0, held.num).view(parameter.shape)
    return _like(held.read(0, held.num), parameter)


def _like(values: Tensor, parameter: Any) -> Tensor:
    """`values` of this rank's shard in the form of `parameter`; a step count as it is."""
    from torch.distributed.tensor import DTensor

    if isinstance(values, DTensor) or not values.dim():
        return values
    if not isinstance(parameter, DTensor):
        return values.view(parameter.shape)
    return DTensor.from_local(
        values.view(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _flat(tensor: Any) -> Tensor:
    """This rank's numbers of a tensor, as a view."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.detach().view(-1)


def _empty(weight: Tensor, *, is_signed: bool) -> Tensor | Moments:
    if len(weight) < _FEWEST:
        return torch.zeros_like(weight)
    return Moments.zeros(len(weight), is_signed=is_signed, device=weight.device)


def _read(held: Tensor | Moments, part: slice) -> Tensor:
    return held[part] if isinstance(held, Tensor) else held.read(part.start, part.stop)


def _write(held: Tensor | Moments, part: slice, values: Tensor) -> None:
    if isinstance(held, Tensor):
        held[part] = values
    else:
        held.write(part.start, values)


def _slices(length: int) -> Iterator[slice]:
    return (slice(s, min(s + _SLICE, length)) for s in range(0, length, _SLICE))

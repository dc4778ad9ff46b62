"""What `test_triton_passes.py` runs under Triton's interpreter, in a process of its own.

With FUSED_DEVICE=cuda they run on a GPU, as `test_cuda.py` has it.

The interpreter must be asked for before triton is imported, and takes tens of milliseconds a row:
the grid is that of `test_loss.py`, over fewer rows.
"""

import math
import os

import pytest
import torch

from npd.models.lm_head import Head
from npd.train.loss import _passes, near_policy_loss
from npd.train.triton_passes import TritonPasses
from test_loss import KINDS, run
from test_loss import make_case as make_cpu_case

DEVICE = os.environ.get("FUSED_DEVICE", "cpu")
assert os.environ["TRITON_INTERPRET"] == ("1" if DEVICE == "cpu" else "0")

TOLERANCES = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 2e-4},
    # Both round logits and their gradient to bfloat16, not always to the same side.
    torch.bfloat16: {"atol": 4e-3, "rtol": 2e-2},
}


def make_case(*args, **kwargs):
    """One of `test_loss.py`, on this device."""
    return tuple(tensor.to(DEVICE) for tensor in make_cpu_case(*args, **kwargs))


def both(case, head=None, other="chunked", **options):
    """Results of the kernels and of the other implementation, the bias's gradient included."""
    hidden, weight, *rest = case
    out = []
    for impl in ("triton", other):
        bias = None if head is None else head[0].detach().clone().requires_grad_()
        full = weight if head is None else Head(weight, bias, *head[1:])
        found = run(hidden, full, *rest, impl=impl, **options)
        out.append((*found, None if bias is None else bias.grad))
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_it_is_the_chunked_loss(target, kind, dtype):
    for k, temperature in ((1, 1.0), (3, 2.0), (11, 1.0)):
        if temperature != 1.0 and target == "sampled":
            temperature = 1.0
        behavior = torch.tensor([-1.0, math.nan, -0.5, -2.0, math.nan], device=DEVICE)
        options = {
            "target": target,
            "divergence": kind,
            "temperature": temperature,
            "behavior_N": behavior,
            "weights_N": torch.arange(5, device=DEVICE) % 4 * 0.5,
        }
        got, want = both(make_case(5, 11, k, seed=k, dtype=dtype), chunk=3, **options)
        torch.testing.assert_close(got, want, **TOLERANCES[dtype])


@pytest.mark.parametrize(("num", "vocab", "k"), [(1, 1003, 1), (1, 1003, 1003), (33, 4099, 5)])
def test_odd_shapes_and_several_blocks_of_a_row(num, vocab, k):
    got, want = both(make_case(num, vocab, k, dtype=torch.float32), target="tail", chunk=30)
    torch.testing.assert_close(got, want, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("k", [4, 23])
def test_heads_with_bias_scale_and_softcap(k, softcap, dtype):
    head = (torch.linspace(-1, 1, 23, dtype=dtype, device=DEVICE), 0.3, softcap)
    got, want = both(make_case(5, 23, k, dtype=dtype), head, target="tail")
    torch.testing.assert_close(got, want, **TOLERANCES[dtype])


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_logits_stay_finite(size):
    _, _, *rest = make_case(6, 11, 3, dtype=torch.float32)
    hidden = size * torch.randn(6, 11, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for head in (None, (torch.zeros(11, device=DEVICE), 1.0, 30.0)):
        got, want = both(
            (hidden, torch.eye(11, device=DEVICE), *rest), head, target="tail", divergence="jsd"
        )
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert all(tensor.isfinite().all() for tensor in got[:3])


def test_missing_entries_untaught_rows_and_labels_within_the_support():
    hidden, weight, labels, ids, logprobs = make_case(6, 11, 3)
    logprobs[1] = -math.inf  # nothing taught
    logprobs[2, 1:] = -math.inf
    labels[3], labels[4] = ids[3, 2], ids[4, 0]
    labels[2] = ids[2, 1]  # an id whose entry does not exist
    for target, kind in KINDS:
        case = (hidden, weight, labels, ids, logprobs)
        got, want = both(case, target=target, divergence=kind, other="reference")
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_nothing_to_train_on_gives_zero():
    hidden, weight, labels, ids, logprobs = make_case(4, 11, 3)
    for num, weights in ((0, None), (4, torch.zeros(4, device=DEVICE))):
        part = (tensor[:num] for tensor in (labels, ids, logprobs))
        loss, *grads, metrics = run(hidden[:num], weight, *part, weights_N=weights, impl="triton")
        assert loss.item() == 0.0
        assert not any(grad.any() for grad in grads)
        assert not any(metrics.values())


def test_a_broken_weight_is_seen():
    hidden, weight, labels, ids, logprobs = make_case(4, 11, 3)
    weight[10] = math.nan
    for teacher in ((), (ids, logprobs)):
        assert run(hidden, weight, labels, *teacher, impl="triton")[0].isnan()


@pytest.mark.parametrize(("target", "kind"), [("tail", "jsd"), ("renorm", "reverse")])
def test_gradcheck(target, kind):
    hidden, weight, labels, ids, logprobs = make_case(2, 5, 2, dim=2, sharp=1.0)
    bias = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64, device=DEVICE)

    def loss(hidden, weight, bias):
        head, options = Head(weight, bias, 0.8, 5.0), {"target": target, "divergence": kind}
        return near_policy_loss(hidden, head, labels, ids, logprobs, impl="triton", **options).loss

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_every_backward_pass_of_a_kept_graph_is_exact():
    hidden, weight, labels, ids, logprobs = make_case(5, 9, 2, dtype=torch.bfloat16)
    free = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = near_policy_loss(*free, labels, ids, logprobs, impl="triton").loss
    found = [torch.autograd.grad(f * loss, free, retain_graph=True) for f in (0.0, 1.0, 4.0)]
    for zero, one, four in zip(*found, strict=True):
        assert not zero.any()
        assert one.any()
        assert torch.equal(four, 4.0 * one)


def test_kernels_are_what_ran(caplog):
    assert isinstance(_passes("triton", torch.device(DEVICE)), TritonPasses)
    assert not caplog.messages

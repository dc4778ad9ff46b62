"""What `test_triton_passes.py` runs under Triton's interpreter, in a process of its own.

With FUSED_DEVICE=cuda they run on a GPU, as `test_cuda.py` has it.

The interpreter must be asked for before triton is imported, and takes tens of milliseconds a row:
the grid is that of `test_loss.py`, over fewer rows.
"""

import math
import os

import pytest
import torch

from npd.config import ScoreConfig
from npd.models.kernels.row_stats import row_stats
from npd.models.lm_head import Head, read_hidden, top_k
from npd.models.loading import load_model
from npd.score.in_process import PrefillModel
from npd.score.scorer import TeacherStudentScorer
from npd.train.loss import _passes, near_policy_loss
from npd.train.triton_passes import TritonPasses
from test_loss import KINDS, run
from test_loss import make_case as make_cpu_case
from test_score import SHAPES, VOCAB, random_rollouts

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


# The scorer's read.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 64, 1003, 4096, 9000])
def test_one_read_gives_sums_and_maxima(width, dtype):
    logits = 5 * torch.randn(7, width, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits[1, ::3] = -math.inf
    logits[2] *= 1e4
    logits[3] = logits[3, 0]
    stats = row_stats(logits, torch.float32, group=64)
    wide = logits.float()
    torch.testing.assert_close(stats.log_sum_C, wide.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    assert torch.equal(stats.top_C, wide.amax(dim=1))
    if stats.maxima_CG is None:
        assert width < 64
        return
    parts = [part.amax(dim=1) for part in wide.split(64, dim=1)]
    assert torch.equal(stats.maxima_CG, torch.stack(parts, dim=1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_broken_and_masked_rows_are_seen():
    logits = torch.zeros(3, 300, device=DEVICE)
    logits[0, 7], logits[1, 299], logits[2] = math.nan, math.inf, -math.inf
    sums = row_stats(logits, torch.float32, group=64).log_sum_C
    assert not sums.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "shared", "k"), [(1003, 1003, 10), (9000, 8500, 10),
                                                     (1003, 700, 1), (300, 290, 200)])  # fmt: skip
def test_the_scorers_read_is_that_of_torch(width, shared, k, dtype):
    """The same ids, and log-probabilities to float noise; padding ids are never among them."""
    maker = torch.Generator().manual_seed(1)
    weight = torch.randn(width, 32, generator=maker).to(DEVICE, dtype)
    hidden = torch.randn(50, 32, generator=maker).to(DEVICE, dtype)
    found = []
    with torch.no_grad():
        for impl in ("triton", "torch"):
            seen = []

            def choose(part, logits, maxima, seen=seen):
                seen.append(maxima is not None)
                return top_k(logits[:, :shared], k, maxima)

            found.append(read_hidden(hidden, Head(weight), choose, 16, impl))
            assert all(seen) is any(seen) is (impl == "triton")
    (ids, logprobs), (expected_ids, expected) = found
    assert torch.equal(ids, expected_ids)
    assert ids.max() < shared
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("support", ["topk", "sampled"])
def test_scores_are_those_of_torch(tiny_teacher_dir, support):
    config = ScoreConfig(top_k=6, row_tokens=64, head_chunk=5, dtype="float32")
    model = load_model(tiny_teacher_dir, dtype="float32", device=DEVICE)
    found = []
    for impl in ("triton", "torch"):
        teacher = PrefillModel(model, "teacher", VOCAB, config, impl)
        scorer = TeacherStudentScorer(
            teacher, lambda _, t=teacher: t, top_k=6, needs_ifd=True, needs_student_pass=True,
            support=support,
        )  # fmt: skip
        scorer.load_student(tiny_teacher_dir, 0)
        found.append(scorer.score(random_rollouts(SHAPES)))
    for kernel, torchs in zip(*found, strict=True):
        assert kernel.topk_ids.tolist() == torchs.topk_ids.tolist()
        for name in ("topk_logprobs", "teacher_logprobs"):
            want = torch.from_numpy(getattr(torchs, name))
            torch.testing.assert_close(torch.from_numpy(getattr(kernel, name)), want)
        assert kernel.nll_student_alone == pytest.approx(torchs.nll_student_alone, abs=1e-5)
        assert kernel.overlap == torchs.overlap == 1.0


def test_kernels_are_what_ran(caplog):
    assert isinstance(_passes("triton", torch.device(DEVICE)), TritonPasses)
    assert not caplog.messages

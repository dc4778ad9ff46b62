"""The near-policy loss: against hand-worked numbers, dense float64 formulas, and itself."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from npd.config.sections import chunk_for
from npd.errors import ConfigError
from npd.models.lm_head import Head
from npd.train.loss import NearPolicyLoss, near_policy_loss

IMPLS = ("reference", "chunked")
KINDS = [
    *itertools.product(("topk", "renorm", "tail"), ("forward", "reverse", "jsd")),
    ("sampled", "forward"),
]


def make_case(num, vocab, k, *, dim=8, seed=0, dtype=torch.float64, sharp=2.0):
    """Hidden states, weight, labels, and a teacher's sorted top-k of a random distribution."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, dim, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=rng, dtype=torch.float64) * sharp / dim**0.5
    labels = torch.randint(vocab, (num,), generator=rng)
    teacher = torch.randn(num, vocab, generator=rng, dtype=torch.float64) * sharp
    logprobs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return hidden.to(dtype), weight.to(dtype), labels, ids, logprobs.to(dtype)


def run(hidden, head, *args, **kwargs):
    """Loss, gradients (hidden, weight) and metrics."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = head.weight if isinstance(head, Head) else head
    weight = weight.detach().clone().requires_grad_()
    if isinstance(head, Head):
        head = Head(weight, head.bias, head.scale, head.softcap)
    out = near_policy_loss(hidden, head if isinstance(head, Head) else weight, *args, **kwargs)
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad, out.metrics


def dense_kd(logits, ids, logprobs, target, kind, beta=0.5):
    """KD of one token by dense arithmetic on probabilities: slow, and nothing shared with npd."""
    q, p = logits.softmax(-1), torch.zeros_like(logits)
    p[ids] = logprobs.exp()
    on = torch.zeros_like(logits, dtype=torch.bool)
    on[ids] = True
    if target == "sampled":
        return -sum(q[i].log() for i in ids) / len(ids)
    if target == "tail" and not on.all():
        p = torch.cat([p[on], (1 - p[on].sum())[None]])
        q = torch.cat([q[on], q[~on].sum()[None]])
    else:
        p, q = p[on], q[on]
    if target == "renorm":
        p = p / p.sum()
        q = q if kind == "forward" else q / q.sum()
    m = beta * p + (1 - beta) * q
    return {
        "forward": (p * (p / q).log()).sum(),
        "reverse": (q * (q / p).log()).sum(),
        "jsd": beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum(),
    }[kind]


def dense_loss(logits, labels, ids, logprobs, target, kind, kd_weight):
    """Mean loss over tokens by `dense_kd`."""
    tokens = [
        -(1 - kd_weight) * z.log_softmax(-1)[y] + kd_weight * dense_kd(z, i, lp, target, kind)
        for z, y, i, lp in zip(logits, labels, ids, logprobs, strict=True)
    ]
    return torch.stack(tokens).mean()


def kd_slope(logits, ids, logprobs, **options):
    """d KD / d logits of each token [N, V], through the public function with an identity head."""
    num, vocab = logits.shape
    logits = logits.detach().clone().requires_grad_()
    out = near_policy_loss(
        logits,
        torch.eye(vocab, dtype=logits.dtype),
        torch.zeros(num, dtype=torch.long),
        ids,
        logprobs,
        kd_weight=1.0,
        normalizer=1.0,
        **options,
    )
    out.loss.backward()
    return out.loss.detach(), logits.grad


# ---------------------------------------------------------------- by hand


# Student (1/2, 1/4, 1/8, 1/8); the teacher's top 2 are words 0 and 2 with 1/2 and 1/4.
HAND = {
    ("topk", "forward"): 0.25 * math.log(2),
    ("renorm", "forward"): 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(8 / 3),
    ("tail", "forward"): 0.25 * math.log(2) + 0.25 * math.log(2 / 3),
    ("sampled", "forward"): 0.5 * math.log(2) + 0.5 * math.log(8),
    ("topk", "reverse"): 1 / 8 * math.log(1 / 2),
    ("renorm", "reverse"): 4 / 5 * math.log(6 / 5) + 1 / 5 * math.log(3 / 5),
    ("tail", "reverse"): 1 / 8 * math.log(1 / 2) + 3 / 8 * math.log(3 / 2),
    ("tail", "jsd"): 0.5 * (1 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4 / 5))
    + 0.5 * (1 / 8 * math.log(2 / 3) + 3 / 8 * math.log(6 / 5)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kind", "expected"), HAND.items(), ids=["-".join(k) for k in HAND])
def test_value_worked_by_hand(impl, kind, expected):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log() + 3.0
    ids, logprobs = torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    out = near_policy_loss(
        logits,
        torch.eye(4, dtype=torch.float64),
        torch.tensor([1]),
        ids,
        logprobs,
        kd_weight=0.75,
        target=kind[0],
        divergence=kind[1],
        impl=impl,
    )
    assert out.loss.item() == pytest.approx(0.25 * math.log(4) + 0.75 * expected, abs=1e-12)
    assert out.metrics["kd"].item() == pytest.approx(expected, abs=1e-12)
    assert out.metrics["ce"].item() == pytest.approx(math.log(4), abs=1e-12)
    assert out.metrics["student_mass"].item() == pytest.approx(5 / 8)
    assert out.metrics["teacher_mass"].item() == pytest.approx(3 / 4)
    assert out.metrics["agreement"].item() == 1.0
    assert out.metrics["entropy"].item() == pytest.approx(1.75 * math.log(2))
    assert out.metrics["tokens"].item() == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_printed_form_is_negative_where_the_student_knows_more(impl):
    student = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.4, 0.2]], dtype=torch.float64).log()
    loss, _ = kd_slope(student, torch.tensor([[0, 1]]), teacher, impl=impl)
    assert loss.item() == pytest.approx(0.6 * math.log(2 / 3))


# ---------------------------------------------------------------- formulas of the gradient


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("target", ["topk", "renorm", "tail", "sampled"])
def test_forward_gradient_is_the_documented_formula(impl, target):
    num, vocab, k = 5, 13, 4
    _, _, _, ids, logprobs = make_case(num, vocab, k)
    logits = torch.randn(
        num, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    q, p = logits.softmax(-1), torch.zeros(num, vocab, dtype=torch.float64)
    p.scatter_(1, ids, logprobs.exp())
    on, mass = p > 0, p.sum(-1, keepdim=True)
    tail = 1 - (1 - mass) / q.masked_fill(on, 0).sum(-1, keepdim=True)
    expected = {
        "topk": mass * q - p,
        "renorm": q - p / mass,
        "tail": torch.where(on, q - p, q * tail),
        "sampled": q - on.double() / k,
    }[target]
    _, slope = kd_slope(logits, ids, logprobs, target=target, impl=impl)
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("target", "kind"), KINDS)
@pytest.mark.parametrize("k", [1, 3, 11])
def test_reference_equals_dense_arithmetic(target, kind, k):
    hidden, weight, labels, ids, logprobs = make_case(6, 11, k, seed=k)
    got = run(
        hidden,
        weight,
        labels,
        ids,
        logprobs,
        kd_weight=0.7,
        target=target,
        divergence=kind,
        impl="reference",
    )
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = dense_loss(h @ w.T, labels, ids, logprobs, target, kind, 0.7)
    expected.backward()
    torch.testing.assert_close(got[:3], (expected.detach(), h.grad, w.grad), atol=1e-11, rtol=1e-9)


# ---------------------------------------------------------------- the two implementations


@pytest.mark.parametrize(("target", "kind"), KINDS)
@pytest.mark.parametrize("vocab", [11, 1003])
@pytest.mark.parametrize("num", [1, 7, 257])
def test_chunked_equals_reference(target, kind, vocab, num):
    for k, temperature in itertools.product((1, 3, vocab), (1.0, 2.0)):
        if temperature != 1.0 and target == "sampled":
            continue
        case = make_case(num, vocab, k, seed=num, dtype=torch.float32)
        behavior = -3.0 * torch.rand(num, generator=torch.Generator().manual_seed(1))
        behavior[::3] = math.nan
        options = {
            "target": target,
            "divergence": kind,
            "temperature": temperature,
            "behavior_N": behavior,
            "weights_N": torch.arange(num) % 4 * 0.5 + 0.5,
        }
        want = run(*case, impl="reference", **options)
        got = run(*case, impl="chunked", chunk=100, **options)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


# Of bfloat16 and float16 each side rounds logits and their gradients once, in its own order.
TOLERANCES = {
    torch.float64: {"atol": 1e-11, "rtol": 1e-9},
    torch.float32: {"atol": 2e-5, "rtol": 2e-4},
    torch.float16: {"atol": 2e-3, "rtol": 5e-3},
    torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2},
}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("num", "vocab", "k"), [(1, 1003, 1), (257, 1003, 5), (31, 47, 47)])
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_every_type_keeps_its_tolerance(target, kind, num, vocab, k, dtype):
    case = make_case(num, vocab, k, dtype=dtype)
    options = {"target": target, "divergence": kind, "weights_N": torch.arange(num) % 3}
    got, want = (run(*case, impl=impl, chunk=100, **options) for impl in ("chunked", "reference"))
    torch.testing.assert_close(got[:3], want[:3], **TOLERANCES[dtype])
    means = ({name: value / num for name, value in found[3].items()} for found in (got, want))
    torch.testing.assert_close(*means, **TOLERANCES[dtype])


def test_rows_that_do_not_fit_one_block():
    case = make_case(90, 20_000, 3, dim=4, dtype=torch.float32)
    want = run(*case, impl="reference", target="tail")
    torch.testing.assert_close(run(*case, target="tail"), want, **TOLERANCES[torch.float32])


def test_chunks_are_chosen_by_vocabulary_and_device():
    assert [chunk_for(v, is_cpu=True) for v in (304, 49_152, 151_936)] == [55_168, 320, 256]
    sizes = [chunk_for(v, is_cpu=False) for v in (300, 49_152, 151_936, 262_144, 10**7)]
    assert sizes == [4096, 4096, 4096, 2432, 256]


@pytest.mark.parametrize("head", ["scale", "softcap", "bias", "all"])
def test_chunked_equals_reference_for_every_kind_of_head(head):
    case = make_case(9, 23, 4)
    hidden, weight, *rest = case
    bias = (
        torch.randn(23, dtype=torch.float64).requires_grad_() if head in ("bias", "all") else None
    )
    scale = 0.5 if head in ("scale", "all") else 1.0
    softcap = 2.0 if head in ("softcap", "all") else None
    results = []
    for impl in IMPLS:
        out = run(hidden, Head(weight, bias, scale, softcap), *rest, impl=impl, chunk=4)
        results.append((*out, None if bias is None else bias.grad))
        bias = None if bias is None else bias.detach().clone().requires_grad_()
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_head_is_the_one_the_model_uses(impl):
    hidden, weight, labels, *_ = make_case(5, 9, 1, dtype=torch.float32)
    head = Head(weight, torch.linspace(-1, 1, 9), 0.5, 3.0)
    out = near_policy_loss(hidden, head, labels, impl=impl)
    expected = torch.nn.functional.cross_entropy(head.logits(hidden), labels)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_gradcheck(target, kind):
    hidden, weight, labels, ids, logprobs = make_case(4, 7, 3, dim=3, sharp=1.0)
    bias = torch.linspace(-0.5, 0.5, 7, dtype=torch.float64)
    temperature = 1.0 if target == "sampled" else 1.7

    def loss(hidden, weight, bias):
        return near_policy_loss(
            hidden,
            Head(weight, bias, 0.8, 5.0),
            labels,
            ids,
            logprobs,
            target=target,
            divergence=kind,
            beta=0.3,
            temperature=temperature,
            chunk=3,
        ).loss

    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(loss, inputs)


# ---------------------------------------------------------------- truths


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tail_vanishes_for_equal_distributions(impl, kind, temperature):
    logits = (
        torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    )
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        student = logits.to(dtype)
        logprobs, ids = student.log_softmax(-1).topk(8, dim=-1)
        options = {"target": "tail", "divergence": kind, "temperature": temperature, "impl": impl}
        loss, slope = kd_slope(student, ids, logprobs, **options)
        assert abs(loss.item()) < 20 * atol
        assert slope.abs().max().item() < atol


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), sharp=st.floats(0.1, 20.0))
def test_tail_is_never_negative(kind, seed, k, sharp):
    hidden, weight, labels, ids, logprobs = make_case(6, 12, k, seed=seed, sharp=sharp)
    options = {"target": "tail", "divergence": kind, "kd_weight": 1.0}
    loss, *grads, _ = run(hidden, weight, labels, ids, logprobs, **options)
    assert loss.item() >= -1e-7
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("target", ["topk", "renorm", "tail"])
def test_full_support_is_the_tempered_full_divergence(target):
    hidden, weight, labels, ids, logprobs = make_case(6, 9, 9)
    teacher = torch.empty_like(logprobs).scatter_(1, ids, logprobs)
    p = (teacher / 2.5).log_softmax(-1)
    q = (hidden @ weight.T / 2.5).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    options = {"kd_weight": 1.0, "target": target, "temperature": 2.5}
    loss, *_ = run(hidden, weight, labels, ids, logprobs, **options)
    torch.testing.assert_close(loss, expected)


def test_jsd_ends_are_forward_and_reverse():
    case = make_case(6, 11, 4)
    for beta, kind in ((0.0, "forward"), (1.0, "reverse")):
        got = run(*case, target="tail", divergence="jsd", beta=beta)
        torch.testing.assert_close(got, run(*case, target="tail", divergence=kind))
    for beta, kind in ((1e-6, "forward"), (1 - 1e-6, "reverse")):
        got, *_ = run(*case, target="tail", divergence="jsd", beta=beta, kd_weight=1.0)
        want, *_ = run(*case, target="tail", divergence=kind, kd_weight=1.0)
        assert got.item() / min(beta, 1 - beta) == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["topk", "tail", "sampled"])
def test_order_of_tokens_and_chunks_do_not_matter(target):
    hidden, weight, labels, ids, logprobs = make_case(40, 17, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    want = run(hidden, weight, labels, ids, logprobs, target=target)
    for chunk in (1, 7, 39, 40, 1000):
        got = run(hidden, weight, labels, ids, logprobs, target=target, chunk=chunk)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    moved = (tensor[order] for tensor in (labels, ids, logprobs))
    got = run(hidden[order], weight, *moved, target=target, chunk=7)
    want = (want[0], want[1][order], *want[2:])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_micro_batches_with_one_normalizer_add_up(impl):
    case = make_case(30, 17, 3)
    hidden, weight, *rest = case
    want = run(*case, impl=impl)
    parts = [
        run(hidden[part], weight, *(tensor[part] for tensor in rest), impl=impl, normalizer=30.0)
        for part in (slice(0, 2), slice(2, 19), slice(19, 30))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), want[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), want[1])
    torch.testing.assert_close(sum(part[2] for part in parts), want[2])
    for name, total in want[3].items():
        torch.testing.assert_close(sum(part[3][name] for part in parts), total)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_of_weight_zero_changes_nothing(impl):
    hidden, weight, labels, ids, logprobs = make_case(10, 17, 3)
    keep = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 1])
    some = keep.bool()
    got = run(hidden, weight, labels, ids, logprobs, weights_N=keep, impl=impl)
    kept = (tensor[some] for tensor in (labels, ids, logprobs))
    want = run(hidden[some], weight, *kept, impl=impl)
    assert not got[1][~some].any()
    torch.testing.assert_close((got[0], got[1][some], *got[2:]), want)


def test_it_is_told_without_gradients_in_inference_too():
    case = make_case(7, 30, 4)
    expected = near_policy_loss(*case)
    with torch.inference_mode():
        found = near_policy_loss(*case)
    torch.testing.assert_close(found.loss, expected.loss.detach())
    assert found.metrics.keys() == expected.metrics.keys()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_gradient_in_float16_does_not_vanish(impl):
    """It is made before a loss scale could lift it: of a quarter of a million tokens, say."""
    hidden, weight, *rest = make_case(64, 500, 4, dtype=torch.float32)
    grads = []
    for dtype in (torch.float32, torch.float16):
        leaf = hidden.to(dtype).detach().requires_grad_()
        loss = near_policy_loss(leaf, weight, *rest, impl=impl, normalizer=262_144.0).loss
        (loss * 65_536.0).backward()
        grads.append(leaf.grad.float() / 65_536.0)
    torch.testing.assert_close(
        grads[1], grads[0], rtol=0.01, atol=float(grads[0].abs().max()) / 500
    )


def test_sampled_gradient_is_unbiased():
    num_draws, k, vocab = 4000, 12, 10
    rng = torch.Generator().manual_seed(5)
    logits, teacher = torch.randn(2, 1, vocab, generator=rng, dtype=torch.float64) * 1.5
    p = teacher.softmax(-1)
    draws = torch.multinomial(p.expand(num_draws, -1), k, replacement=True, generator=rng)
    logprobs = p.log().expand(num_draws, -1).gather(1, draws)
    _, slopes = kd_slope(logits.expand(num_draws, -1), draws, logprobs, target="sampled")
    error = slopes.std(0) / num_draws**0.5
    assert ((slopes.mean(0) - (logits.softmax(-1) - p)[0]).abs() < 4 * error).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_repeated_draws_count_as_often_as_they_fell(impl):
    hidden, weight, labels, *_ = make_case(1, 6, 1)
    draws = torch.tensor([[4, 1, 4, 4]])
    logprobs = torch.tensor([[-0.5, -2.0, -0.5, -0.5]], dtype=torch.float64)
    options = {"target": "sampled", "kd_weight": 1.0, "impl": impl}
    loss, *_, metrics = run(hidden, weight, labels, draws, logprobs, **options)
    q = (hidden @ weight.T).log_softmax(-1)[0]
    assert loss.item() == pytest.approx(-(0.75 * q[4] + 0.25 * q[1]).item())
    assert metrics["teacher_mass"].item() == pytest.approx(math.exp(-0.5) + math.exp(-2.0))


# ---------------------------------------------------------------- with and without the parts


@pytest.mark.parametrize("impl", IMPLS)
def test_without_teacher_or_kd_weight_it_is_cross_entropy(impl):
    hidden, weight, labels, ids, logprobs = make_case(10, 17, 3)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    for loss, *_, metrics in (
        run(hidden, weight, labels, impl=impl),
        run(hidden, weight, labels, kd_weight=0.0, impl=impl),
        run(hidden, weight, labels, ids, logprobs, kd_weight=0.0, impl=impl),
    ):
        torch.testing.assert_close(loss, expected)
        assert set(metrics) == {"tokens", "ce", "entropy"}


@pytest.mark.parametrize("impl", IMPLS)
def test_kd_only_ignores_the_labels(impl):
    hidden, weight, labels, ids, logprobs = make_case(10, 17, 3)
    one = run(hidden, weight, labels, ids, logprobs, kd_weight=1.0, impl=impl)
    two = run(hidden, weight, (labels + 1) % 17, ids, logprobs, kd_weight=1.0, impl=impl)
    torch.testing.assert_close(one[:3], two[:3], atol=0, rtol=0)
    torch.testing.assert_close(one[0], one[3]["kd"] / 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_drift_of_the_policy_from_the_writer(impl):
    hidden, weight, labels, ids, logprobs = make_case(6, 9, 3)
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    behavior = logp - torch.tensor([0.0, 0.3, -0.2, math.nan, 1.0, math.nan])
    *_, metrics = run(hidden, weight, labels, ids, logprobs, behavior_N=behavior, impl=impl)
    log_rho = torch.tensor([0.0, 0.3, -0.2, 1.0], dtype=torch.float64)
    rho = log_rho.exp()
    expected = {
        "drift": (rho * log_rho - rho + 1).sum(),
        "drift_k3": (rho - 1 - log_rho).sum(),
        "rho": rho.sum(),
        "rho_sq": rho.square().sum(),
        "n_behavior": torch.tensor(4.0, dtype=torch.float64),
    }
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_overlap_is_how_far_the_students_ranking_stays_within_the_support(impl):
    hidden, weight, labels, ids, logprobs = make_case(200, 7, 3, sharp=0.7)
    logprobs[:40, 2] = -math.inf
    expected = []
    for token, z in enumerate(hidden @ weight.T):
        support = set(ids[token, : 2 if token < 40 else 3].tolist())
        ranking = z.argsort(descending=True).tolist()
        first = [word in support for word in ranking].index(False)
        shared = len(support & set(ranking[: len(support)])) / len(support)
        assert first / len(support) <= shared
        assert (first == len(support)) == (shared == 1.0)
        expected.append(first / len(support))
    assert len(set(expected)) > 4
    weights = torch.arange(200) % 3
    *_, metrics = run(hidden, weight, labels, ids, logprobs, impl=impl, weights_N=weights, chunk=64)
    found = metrics["overlap"].item()
    assert found == pytest.approx((torch.tensor(expected) * weights).sum().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_effective_sample_size_from_the_sums(impl):
    hidden, weight, labels, *_ = make_case(6, 9, 3)
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    rho = torch.tensor([1.0, 0.5, 2.0, 1.0, 4.0, 1.0], dtype=torch.float64)
    *_, sums = run(hidden, weight, labels, behavior_N=logp - rho.log(), impl=impl)
    share = sums["rho"] ** 2 / (sums["n_behavior"] * sums["rho_sq"])
    torch.testing.assert_close(share, rho.sum() ** 2 / (6 * rho.square().sum()))


def test_the_module_is_the_function():
    hidden, weight, labels, ids, logprobs = make_case(7, 9, 2)
    options = {"kd_weight": 0.5, "target": "tail", "divergence": "jsd", "beta": 0.3, "chunk": 3}
    more = {"weights_N": torch.arange(7), "normalizer": 5.0, "behavior_N": -torch.ones(7)}
    loss = NearPolicyLoss(**options)
    got = loss(hidden, Head(weight), labels, ids, logprobs, **more)
    want = near_policy_loss(hidden, weight, labels, ids, logprobs, **options, **more)
    torch.testing.assert_close((got.loss, got.metrics), (want.loss, want.metrics))
    assert not list(loss.parameters())
    assert "target='tail'" in repr(loss)
    with pytest.raises(ConfigError, match="sampled"):
        NearPolicyLoss(target="sampled", temperature=2.0)


def test_a_kept_graph_gives_the_same_gradient_again():
    hidden, weight, labels, ids, logprobs = make_case(5, 9, 2)
    free = hidden.clone().requires_grad_()
    loss = near_policy_loss(free, weight, labels, ids, logprobs).loss
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(free.grad, times * run(hidden, weight, labels, ids, logprobs)[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_backward_pass_of_a_kept_graph_is_exact(impl, dtype):
    """Whatever the factors of the passes before it, 0 included; and theirs stay as they are."""
    hidden, weight, labels, ids, logprobs = make_case(5, 9, 2, dtype=dtype)
    want = run(hidden, weight, labels, ids, logprobs, impl=impl)[1:3]
    free = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = near_policy_loss(*free, labels, ids, logprobs, impl=impl).loss
    factors = (0.0, 1.0, -2.0, 0.0, 1.0, 4.0)  # powers of two are exact in every type
    found = [torch.autograd.grad(factor * loss, free, retain_graph=True) for factor in factors]
    for factor, got in zip(factors, found, strict=True):
        for gradient, whole in zip(got, want, strict=True):
            torch.testing.assert_close(gradient, factor * whole, atol=0, rtol=0)


def test_the_usual_backward_pass_copies_no_gradient():
    """On a CPU the head's gradient is handed on as it is."""
    case = make_case(3, 1003, 2, dim=64, dtype=torch.float32)
    free = [tensor.requires_grad_() for tensor in case[:2]]
    for factor, most in ((1.0, 1), (2.0, free[1].numel())):
        loss = near_policy_loss(*free, *case[2:]).loss
        with _Largest() as largest:
            torch.autograd.grad(loss, free, torch.tensor(factor))
        assert largest.numel == most


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, labels, ids, logprobs = make_case(5, 9, 2)
    free = hidden.clone().requires_grad_()
    near_policy_loss(free, weight, labels, ids, logprobs).loss.backward()
    torch.testing.assert_close(free.grad, run(hidden, weight, labels, ids, logprobs)[1])
    assert not near_policy_loss(hidden, weight, labels, ids, logprobs).loss.requires_grad
    with torch.no_grad():
        assert not near_policy_loss(free, weight, labels, ids, logprobs).loss.requires_grad


def test_gradient_scales_with_what_comes_from_above():
    hidden, weight, labels, ids, logprobs = make_case(5, 9, 2)
    free = hidden.clone().requires_grad_()
    (-2.5 * near_policy_loss(free, weight, labels, ids, logprobs).loss).backward()
    torch.testing.assert_close(free.grad, -2.5 * run(hidden, weight, labels, ids, logprobs)[1])


# ---------------------------------------------------------------- guards


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_missing_teacher_entries_are_as_if_absent(impl, target, kind):
    hidden, weight, labels, ids, logprobs = make_case(6, 11, 3)
    holes = torch.full((6, 2), -math.inf, dtype=torch.float64)
    junk = torch.tensor([[0, -7], [10, 99]] * 3)
    options = {"target": target, "divergence": kind, "impl": impl}
    want = run(hidden, weight, labels, ids, logprobs, **options)
    wider = torch.cat([junk, ids], 1), torch.cat([holes, logprobs], 1)
    got = run(hidden, weight, labels, *wider, **options)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_a_row_without_any_teacher_entry_has_no_kd(impl, target, kind):
    hidden, weight, labels, ids, logprobs = make_case(3, 11, 2)
    logprobs[1] = -math.inf
    options = {"target": target, "divergence": kind, "impl": impl, "normalizer": 1.0}
    got = run(hidden, weight, labels, ids, logprobs, **options)
    rows = torch.tensor([0, 2])
    taught = run(hidden[rows], weight, labels[rows], ids[rows], logprobs[rows], **options)
    untaught = run(hidden[1:2], weight, labels[1:2], impl=impl, normalizer=10.0)
    torch.testing.assert_close(got[0], taught[0] + untaught[0])
    torch.testing.assert_close(got[2], taught[2] + untaught[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("target", "kind"), KINDS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_logits_stay_finite(impl, target, kind, size):
    _, _, labels, ids, logprobs = make_case(6, 11, 3, dtype=torch.float32)
    hidden = size * torch.randn(6, 11, generator=torch.Generator().manual_seed(2))
    behavior = torch.tensor([0.0, -1.0, -1e3, -1e6, -1e38, math.nan])
    options = {"target": target, "divergence": kind, "impl": impl, "behavior_N": behavior}
    loss, *grads, metrics = run(hidden, torch.eye(11), labels, ids, logprobs, **options)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_train_on_gives_zero(impl):
    hidden, weight, labels, ids, logprobs = make_case(4, 11, 3)
    for num, weights in ((0, None), (4, torch.zeros(4))):
        part = (tensor[:num] for tensor in (labels, ids, logprobs))
        out = run(hidden[:num], weight, *part, weights_N=weights, impl=impl)
        assert out[0].item() == 0.0
        assert not out[1].any()
        assert not out[2].any()
        assert all(value.item() == 0.0 for value in out[3].values())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_broken_weight_is_seen(impl):
    hidden, weight, labels, ids, logprobs = make_case(4, 11, 3)
    weight[10] = math.nan
    for teacher in ((), (ids, logprobs)):
        assert run(hidden, weight, labels, *teacher, impl=impl)[0].isnan()


@pytest.mark.parametrize("label", [-1, 11, -100])
def test_a_label_outside_the_vocabulary_is_refused(label):
    hidden, weight, labels, *_ = make_case(4, 11, 3)
    labels[2] = label
    with pytest.raises(AssertionError, match="label"):
        near_policy_loss(hidden, weight, labels)


def test_bad_teacher_ids_are_refused():
    hidden, weight, labels, ids, logprobs = make_case(4, 11, 3)
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        near_policy_loss(hidden, weight, labels, ids + 11, logprobs)
    with pytest.raises(AssertionError, match="twice"):
        near_policy_loss(hidden, weight, labels, ids * 0, logprobs)


@pytest.mark.parametrize("option", [{"divergence": "reverse"}, {"temperature": 2.0}])
def test_sampled_takes_no_other_divergence_or_temperature(option):
    case = make_case(4, 11, 3)
    with pytest.raises(ConfigError, match="sampled"):
        near_policy_loss(*case, target="sampled", **option)


# ---------------------------------------------------------------- precision and memory


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_bfloat16_is_close_to_float32(target, kind):
    case = make_case(257, 203, 5, dim=64, dtype=torch.float32)
    hidden, weight, *rest = case
    options = {"target": target, "divergence": kind, "chunk": 32}
    want = run(*case, **options)
    got = run(hidden.bfloat16(), weight, *rest, **options)
    assert got[1].dtype == torch.bfloat16
    assert got[2].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], atol=0.01, rtol=0.01)
    for grad, exact in zip(got[1:3], want[1:3], strict=True):
        assert (grad.float() - exact).norm() < 0.02 * exact.norm()


def test_head_gradient_is_accumulated_in_float32():
    # 4,096 equal contributions: a bf16 sum would stop growing once it is 256 times one of them.
    num = 4096
    hidden = torch.ones(num, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16)
    labels = torch.zeros(num, dtype=torch.long)
    _, _, grad, _ = run(hidden, weight, labels, normalizer=1.0, chunk=4)
    assert grad[0].tolist() == [-0.75 * num] * 2
    assert grad[1].tolist() == [0.25 * num] * 2


def test_head_gradient_of_a_large_vocabulary():
    hidden, weight, *rest = make_case(6, 20_000, 5, dim=4, dtype=torch.float32)
    want = run(hidden, weight, *rest)[2]
    got = run(hidden.bfloat16(), weight, *rest, chunk=4)[2]
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_bfloat16_with_float32_weights(impl):
    hidden, weight, *rest = make_case(33, 203, 5, dim=64, dtype=torch.float32)
    want = run(hidden.bfloat16(), weight, *rest, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(hidden, weight, *rest, impl=impl)
    assert got[1].dtype == got[2].dtype == torch.float32
    torch.testing.assert_close((got[0], got[3]), (want[0], want[3]))
    torch.testing.assert_close(got[2], want[2])


class _Largest(TorchDispatchMode):
    """Records the most elements any tensor had, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [tensor.numel() for tensor in found if isinstance(tensor, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype, target, kind):
    num, vocab, chunk = 512, 301, 16
    case = make_case(num, vocab, 5, dim=4, dtype=dtype)
    sizes = {}
    for impl in IMPLS:
        with _Largest() as largest:
            run(*case, target=target, divergence=kind, impl=impl, chunk=chunk)
        sizes[impl] = largest.numel
    assert sizes["reference"] >= num * vocab  # the probe sees what it should
    assert sizes["chunked"] <= chunk * vocab

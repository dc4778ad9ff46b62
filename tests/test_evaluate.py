"""Held-out quality: KL against a full-vocabulary reference, and answers as people write them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npd.evaluate import exact_match, heldout_kl, is_match
from npd.models.lm_head import head_of
from npd.models.loading import hidden_states, load_model, pack_documents
from npd.types import FinishReason, Rollout, Scored

SHAPES = [(5, 7), (1, 1), (12, 2), (3, 19)]


@pytest.fixture(scope="module")
def tables(tiny_model_dir, tiny_teacher_dir):
    """(teacher, student, responses): full log-softmax tables [L, V] of a few fixed samples."""
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 300, n).astype(np.int32) for n in shape) for shape in SHAPES]

    def of(path):
        model = load_model(path, packed=False)
        tables = []
        for prompt, response in pairs:
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            with torch.no_grad():
                table = model(input_ids=ids).logits[0].double().log_softmax(-1)
            tables.append(table[len(prompt) - 1 : -1].numpy())
        return tables

    return of(tiny_teacher_dir), of(tiny_model_dir), pairs


def scored(tables, pairs, k):
    return [
        Scored(
            rollout=Rollout(i, i, 0, prompt, prompt[:1], response, None, FinishReason.STOP, 0),
            topk_ids=(best := np.argsort(-table, axis=1)[:, :k]).astype(np.int32),
            topk_logprobs=np.take_along_axis(table, best, axis=1).astype(np.float32),
            teacher_logprobs=table[np.arange(len(response)), response].astype(np.float32),
            nll_teacher=0.0,
        )
        for i, (table, (prompt, response)) in enumerate(zip(tables, pairs, strict=True))
    ]


def reference(teacher, student, k):
    """Tail-bucket KL by its definition, one position after another."""
    values = []
    for log_t, log_s in zip(np.concatenate(teacher), np.concatenate(student), strict=True):
        best = np.argsort(-log_t)[:k]
        p, q = np.exp(log_t[best]), np.exp(log_s[best])
        tail = (1 - p.sum()) * np.log((1 - p.sum()) / (1 - q.sum()))
        values.append((p * np.log(p / q)).sum() + tail)
    return np.mean(values)


@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("row_tokens", [8, 500])
@pytest.mark.parametrize("chunk", [1, 6, 512])
def test_heldout_kl_is_the_definition(tables, tiny_model_dir, k, row_tokens, chunk):
    teacher, student, pairs = tables
    model = load_model(tiny_model_dir)
    kl, agreement, ce, tokens, _ = heldout_kl(model, scored(teacher, pairs, k), row_tokens, chunk)
    assert kl == pytest.approx(reference(teacher, student, k), rel=1e-4)
    t, s = np.concatenate(teacher), np.concatenate(student)
    assert agreement == pytest.approx((t.argmax(1) == s.argmax(1)).mean())
    responses = np.concatenate([response for _, response in pairs])
    assert ce == pytest.approx(-s[np.arange(len(s)), responses].mean(), rel=1e-5)
    assert tokens == len(responses)


@pytest.mark.parametrize("sharpness", [10.0, 30.0])
def test_a_student_without_a_tail_is_as_far_as_the_definition_says(
    tables, tiny_model_dir, sharpness
):
    """Far more certain than float32 can say by 1 - mass: the tail comes from the logits."""
    teacher, _, pairs = tables
    model = load_model(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(sharpness)
    kl, *_ = heldout_kl(model, scored(teacher, pairs, 10), 64, 64)
    want = []
    for table, (prompt, response) in zip(teacher, pairs, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        row = pack_documents([ids[0].numpy()], "cpu")
        with torch.no_grad():
            logits = head_of(model).logits(hidden_states(model, row)).double()
        student = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for log_t, log_s in zip(torch.from_numpy(table).double(), student, strict=True):
            is_inside = torch.zeros_like(log_t, dtype=torch.bool)
            is_inside[log_t.argsort(descending=True)[:10]] = True
            outside = [side[~is_inside].logsumexp(0) for side in (log_t, log_s)]
            inside = log_t[is_inside].exp() @ (log_t - log_s)[is_inside]
            want.append(inside + outside[0].exp() * (outside[0] - outside[1]))
    assert kl == pytest.approx(torch.stack(want).mean().item(), rel=1e-4)


def test_the_bound_grows_with_the_support_towards_the_full_kl(tables, tiny_model_dir):
    teacher, student, pairs = tables
    model = load_model(tiny_model_dir)
    t, s = np.concatenate(teacher), np.concatenate(student)
    full = (np.exp(t) * (t - s)).sum(axis=1).mean()
    found = [heldout_kl(model, scored(teacher, pairs, k), 64, 64)[0] for k in (1, 10, 100, 304)]
    assert sorted(found) == found
    assert found[0] > 0
    assert found[-1] == pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("k", [1, 10, 304])
def test_a_student_that_is_the_teacher_is_perfect(tables, tiny_teacher_dir, k):
    teacher, _, pairs = tables
    kl, agreement, *_ = heldout_kl(load_model(tiny_teacher_dir), scored(teacher, pairs, k), 64, 64)
    assert kl == pytest.approx(0.0, abs=1e-5)
    assert agreement == 1.0


def test_the_model_keeps_its_mode_and_gets_no_gradient(tables, tiny_model_dir):
    teacher, _, pairs = tables
    model = load_model(tiny_model_dir)
    for mode in (True, False):
        model.train(mode)
        heldout_kl(model, scored(teacher, pairs, 4), 64, 64)
        assert model.training is mode
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("2 + 2 = 4, so\n#### 4", "4"),
        ("The total is 1,234.50 dollars.", "1234.5"),
        ("It costs $42.", "42"),
        ("so x = \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("first \\boxed{7}, no: \\boxed{8}", "8"),
        ("#### 18 eggs a day", "18"),
        ("#### 10\n#### 18", "18"),
        ("34+58=92;92+12=104;...#271", "271"),
        ("half of it, 1/2", "0.5"),
        ("-5", "-5"),
        ("10-3", "3"),
        ("The answer is 5%.", "5"),
        ("Ella has 8 apples. 8+4=<<8+4=12>>12\n#### 12", "steps ...\n#### 12"),
        ("I think it is Paris, of course.", "paris"),
        ("It is the  United\nStates.", "United States"),
        ("\\boxed{Paris}", "Paris"),
        ("#### Paris.", "Paris"),
    ],
)
def test_right_answers(response, answer):
    assert is_match(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("2 + 2 = 4, so\n#### 5", "4"),
        ("4 is my guess, or rather 5", "4"),
        ("142", "42"),
        ("42.5", "42"),
        ("no number at all", "42"),
        ("4 ... ####", "4"),
        ("\\boxed{7}, first 8", "8"),
        ("It is Parisian.", "Paris"),
        ("\\boxed{Paris or Rome}", "Paris"),
        ("", "42"),
        ("", "Paris"),
        ("anything", ""),
        ("5", "-5"),
        ("a.b", "axb"),
        ("axb", "a.b"),
    ],
)
def test_wrong_answers(response, answer):
    assert not is_match(response, answer)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numbers_are_compared_by_value(a, b):
    assert is_match(f"so we get {a:,}.", str(b)) == (a == b)
    assert is_match(f"{b} is not it\n#### {a}.00", str(a))


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_has_a_verdict(response, answer):
    assert is_match(response, answer) in (True, False)


def test_exact_match_is_a_share():
    assert exact_match([("4", "4"), ("5", "4"), ("#### 4", "4"), ("", "4")]) == 0.5


def test_the_sums_by_response_are_in_the_order_given(tables, tiny_model_dir):
    """Whatever row a response was packed into: each alone gives its own sum."""
    teacher, _, pairs = tables
    model, given = load_model(tiny_model_dir), scored(teacher, pairs, 10)
    together = heldout_kl(model, given, 40, 6)
    alone = [heldout_kl(model, [one], 500, 512) for one in given]
    assert together.kl_sums == pytest.approx([a.kl * a.num_tokens for a in alone], rel=1e-4)
    assert together.kl == pytest.approx(sum(together.kl_sums) / together.num_tokens)

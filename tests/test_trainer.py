"""The trainer against hand-written loops, and the invariances its docstring promises."""

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from npd.config import LossConfig, TrainConfig
from npd.errors import ModelError, RunError
from npd.models.kernels.compile import layers_of
from npd.models.loading import decoding
from npd.train.batch import build_row
from npd.train.trainer import Trainer, build_optimizer, recompute_activations
from npd.types import FinishReason, Rollout, Row, SampleRef, Scored, Segment, Step

VOCAB, TOP_K = 304, 10
SFT = LossConfig(kd_weight=0.0)
FP32 = TrainConfig(dtype="float32", row_tokens=256, weight_decay=0.1)


@pytest.fixture(scope="module")
def student(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32)


def make_rollouts(seed=0, lengths=((3, 5), (1, 1), (7, 12), (2, 9)), version=0):
    rng = np.random.default_rng(seed)

    def ids(size):
        return rng.integers(3, VOCAB, size).astype(np.int32)

    return [
        Rollout(
            sample_id=i,
            prompt_index=i,
            version=version,
            prompt_ids=ids(prompt),
            header_ids=ids(1),
            response_ids=ids(response),
            logprobs=None,
            finish=FinishReason.STOP,
            seed=i,
        )
        for i, (prompt, response) in enumerate(lengths)
    ]


@torch.no_grad()
def response_logprobs(model, rollout):
    """Log-probabilities [L, V] at the response positions: one sequence, no packing, full logits."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[len(rollout.prompt_ids) - 1 : -1].float().log_softmax(-1)


def own(model, rollout):
    """The log-probabilities `model` gives the response it is said to have written."""
    labels = torch.from_numpy(rollout.response_ids).long()[:, None]
    logprobs = response_logprobs(model, rollout).gather(-1, labels)[:, 0]
    return replace(rollout, logprobs=logprobs.numpy())


def score(model, rollout, k=TOP_K):
    logprobs = response_logprobs(model, rollout)
    top = logprobs.topk(k, dim=-1)
    labels = torch.from_numpy(rollout.response_ids).long()[:, None]
    sampled = logprobs.gather(-1, labels)[:, 0].numpy()
    return Scored(
        rollout,
        top.indices.numpy().astype(np.int32),
        top.values.numpy(),
        sampled,
        -float(sampled.mean()),
    )


def refs_of(samples):
    rollouts = [s.rollout if isinstance(s, Scored) else s for s in samples]
    return [SampleRef(r.sample_id, 0, r.version, r.num_tokens) for r in rollouts]


def segment_of(samples, rows, *, lr=1e-3, steps=1, version=0):
    """`steps` equal steps whose rows hold the samples at the given indices."""
    refs = refs_of(samples)
    packed = tuple(Row(tuple(refs[i] for i in row)) for row in rows)
    return Segment(0, version, tuple(Step(i, lr, (packed,)) for i in range(steps)))


def make_trainer(directory, samples, config=FP32, loss=SFT, seed=0, dist=None):
    by_id = {ref.sample_id: sample for ref, sample in zip(refs_of(samples), samples, strict=True)}
    return Trainer(
        config,
        loss,
        student=directory,
        read=lambda ref: by_id[ref.sample_id],
        device="cpu",
        seed=seed,
        dist=dist,
    )


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def sft_loss(model, rollouts):
    """Full-logits cross-entropy, mean over all response tokens, one sequence at a time."""
    tokens = sum(len(r.response_ids) for r in rollouts)
    total = torch.zeros(())
    for r in rollouts:
        ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.response_ids])).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        at = slice(len(r.prompt_ids) - 1, -1)
        total = total + F.cross_entropy(logits[at], ids[len(r.prompt_ids) :], reduction="sum")
    return total / tokens


def test_a_row_lists_the_positions_that_predict_the_response():
    rollouts = make_rollouts(lengths=((3, 2), (1, 4)))
    row = build_row(rollouts, version=0, device="cpu")
    assert row.packed.cu_seqlens == (0, 4, 8)
    assert row.positions_N.tolist() == [2, 3, 4, 5, 6, 7]
    before = [
        *(rollouts[0].prompt_ids[-1], rollouts[0].response_ids[0]),
        *(rollouts[1].prompt_ids[-1], *rollouts[1].response_ids[:3]),
    ]
    assert row.packed.input_ids[0, row.positions_N].tolist() == before
    assert row.labels_N.tolist() == [*rollouts[0].response_ids, *rollouts[1].response_ids]
    assert row.topk_ids_NK is None
    assert row.behavior_N is None


def test_behaviour_logprobs_count_only_where_the_newest_snapshot_wrote():
    old, new, text = make_rollouts(lengths=((3, 2), (1, 3), (2, 2)))
    old = replace(old, logprobs=np.full(2, -1.0, np.float32))
    new = replace(new, version=4, logprobs=np.full(3, -2.0, np.float32))
    row = build_row([old, new, replace(text, version=4)], version=4, device="cpu")
    assert row.behavior_N.isnan().tolist() == [True] * 2 + [False] * 3 + [True] * 2
    assert build_row([old, text], version=4, device="cpu").behavior_N is None


def test_sft_takes_the_steps_of_a_hand_written_loop(tiny_model_dir, student):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    report = trainer.train(segment_of(rollouts, [[0, 2], [1, 3]], steps=3))

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).train()
    decayed = [p for n, p in model.named_parameters() if "proj" in n]
    others = [p for n, p in model.named_parameters() if "proj" not in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for step in report.steps:
        loss = sft_loss(model, rollouts)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert step.ce == pytest.approx(loss.item(), rel=1e-5)
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights_of(trainer)[name], p.detach(), atol=2e-5, rtol=1e-4)


def test_distillation_gradient_is_the_printed_formulas(tiny_model_dir, tiny_teacher_dir, teacher):
    scored = [score(teacher, r) for r in make_rollouts()]
    trainer = make_trainer(tiny_model_dir, scored, loss=LossConfig(kd_weight=0.9, target="topk"))
    (step,) = trainer.train(segment_of(scored, [[0, 1, 2, 3]])).steps

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ce = kd = mass = torch.zeros(())
    tokens = sum(len(s.rollout.response_ids) for s in scored)
    for s in scored:
        r = s.rollout
        ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.response_ids])).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        log_s = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        log_t = torch.from_numpy(s.topk_logprobs)
        gap = log_t - log_s.gather(-1, torch.from_numpy(s.topk_ids).long())
        ce = ce - log_s.gather(-1, ids[len(r.prompt_ids) :, None]).sum() / tokens
        kd = kd + (log_t.exp() * gap).sum() / tokens
        mass = mass + log_t.exp().sum() / tokens
    (0.1 * ce + 0.9 * kd).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert step.ce == pytest.approx(ce.item(), rel=1e-4)
    assert step.kd == pytest.approx(kd.item(), rel=1e-4)
    assert step.loss == pytest.approx((0.1 * ce + 0.9 * kd).item(), rel=1e-4)
    assert step.teacher_mass == pytest.approx(mass.item(), rel=1e-4)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5), max_size=5))
def test_packing_row_order_and_split_do_not_matter(tiny_model_dir, teacher, order, cuts):
    lengths = ((3, 5), (1, 1), (7, 12), (2, 9), (4, 3), (1, 6))
    scored = [score(teacher, own(teacher, r)) for r in make_rollouts(lengths=lengths)]
    bounds = [0, *sorted(cuts), 6]
    rows = [order[a:b] for a, b in pairwise(bounds)]
    results = []
    for layout in ([[0, 1, 2, 3, 4, 5]], rows):
        trainer = make_trainer(tiny_model_dir, scored, loss=LossConfig(target="tail"))
        # A gradient alone: AdamW's first step would hide its size.
        gradients = {}
        step = segment_of(scored, layout).steps[0]
        trainer.optimizer.register_step_pre_hook(
            lambda *_, t=trainer, g=gradients: g.update(
                {n: p.grad.clone() for n, p in t.model.named_parameters()}
            )
        )
        (report,) = trainer.train(Segment(0, 0, (step,))).steps
        results.append((report, gradients, weights_of(trainer)))
    (one, grads, weights), (other, other_grads, other_weights) = results
    for name in ("loss", "ce", "kd", "grad_norm", "student_mass", "agreement", "drift", "ess"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-4, abs=1e-5), name
    assert (other.num_samples, other.response_tokens, other.total_tokens) == (6, 36, 54)
    assert other.num_rows == len(rows)
    assert other.fill == pytest.approx(54 / (len(rows) * FP32.row_tokens))
    for name in grads:
        torch.testing.assert_close(other_grads[name], grads[name], atol=2e-6, rtol=1e-3)
    # AdamW's first step is lr * sign(g): entries with g near 0 may move either way.
    moved = sum((other_weights[n] - weights[n]).abs().gt(1e-5).sum() for n in weights)
    assert moved < 0.01 * sum(w.numel() for w in weights.values())


def test_a_tiny_set_is_learnt_by_heart(tiny_model_dir, teacher):
    scored = [score(teacher, r) for r in make_rollouts()]
    loss = LossConfig(kd_weight=0.0)
    trainer = make_trainer(tiny_model_dir, scored, loss=loss)
    steps = trainer.train(segment_of(scored, [[0, 1, 2, 3]], lr=1e-2, steps=40)).steps
    assert steps[-1].ce < 0.3 * steps[0].ce
    assert steps[0].ce > 3.0


def test_distillation_brings_the_student_to_the_teacher(tiny_model_dir, teacher):
    scored = [score(teacher, r, k=32) for r in make_rollouts()]
    trainer = make_trainer(tiny_model_dir, scored, loss=LossConfig(kd_weight=1.0, target="tail"))
    steps = trainer.train(segment_of(scored, [[0, 1, 2, 3]], lr=1e-2, steps=40)).steps
    assert 0.0 < steps[-1].kd < 0.3 * steps[0].kd
    assert steps[-1].agreement > steps[0].agreement


def test_a_student_that_is_its_teacher_stays(tiny_model_dir, student):
    scored = [score(student, r) for r in make_rollouts()]
    trainer = make_trainer(tiny_model_dir, scored, loss=LossConfig(kd_weight=1.0, target="tail"))
    (step,) = trainer.train(segment_of(scored, [[0, 1], [2, 3]])).steps
    assert step.kd == pytest.approx(0.0, abs=1e-5)
    assert step.grad_norm < 1e-4
    assert step.agreement == 1.0


def test_drift_is_zero_on_own_samples_and_positive_once_trained(tiny_model_dir, student):
    rollouts = [own(student, r) for r in make_rollouts()]
    trainer = make_trainer(tiny_model_dir, rollouts)
    steps = trainer.train(segment_of(rollouts, [[0, 1, 2, 3]], steps=3)).steps
    assert steps[0].drift == pytest.approx(0.0, abs=1e-6)
    assert steps[0].drift_k3 == pytest.approx(0.0, abs=1e-6)
    assert steps[0].ess == pytest.approx(1.0, abs=1e-4)
    assert steps[2].drift > 1e-4
    assert steps[2].drift_k3 > 1e-4
    assert 0.0 < steps[2].ess < 1.0


def test_drift_is_that_of_the_newest_snapshots_samples_alone(tiny_model_dir, student):
    stale, fresh = (own(student, r) for r in make_rollouts(lengths=((3, 5), (2, 9))))
    stale = replace(stale, logprobs=stale.logprobs - 3.0)
    samples = [replace(stale, version=1), replace(fresh, version=3)]
    (step,) = (
        make_trainer(tiny_model_dir, samples)
        .train(segment_of(samples, [[0], [1]], version=3))
        .steps
    )
    assert step.drift == pytest.approx(0.0, abs=1e-6)
    assert (step.lag_mean, step.lag_max) == (1.0, 2)
    (step,) = (
        make_trainer(tiny_model_dir, samples)
        .train(segment_of(samples, [[0], [1]], version=4))
        .steps
    )
    assert (step.drift, step.drift_k3, step.ess) == (None, None, None)


def test_the_learning_rate_is_the_steps(tiny_model_dir):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts, replace_config(weight_decay=0.0))
    before = weights_of(trainer)
    (still,) = trainer.train(segment_of(rollouts, [[0, 1, 2, 3]], lr=0.0)).steps
    assert still.lr == 0.0
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    trainer.train(segment_of(rollouts, [[0, 1, 2, 3]], lr=1e-3))
    moved = max((before[n] - w).abs().max().item() for n, w in weights_of(trainer).items())
    assert 0.5e-3 < moved < 2e-3


def replace_config(**changes):
    return FP32.model_copy(update=changes)


def test_weight_decay_leaves_norms_biases_and_embeddings_alone(student):
    optimizer = build_optimizer(student, FP32)
    names = {id(p): n for n, p in student.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all("proj" in name for name in decayed)
    assert "model.embed_tokens.weight" in others
    assert decayed | others == set(names.values())
    assert len(decayed) == 2 * 7


def test_non_finite_loss_changes_nothing_and_names_the_samples(tiny_model_dir, teacher):
    scored = [score(teacher, r) for r in make_rollouts()]
    broken = scored[2].topk_logprobs.copy()
    broken[3, 1] = 200.0
    bad = [*scored[:2], replace(scored[2], topk_logprobs=broken), scored[3]]
    samples = [
        *scored,
        *(replace(s, rollout=replace(s.rollout, sample_id=i)) for s, i in zip(bad, count(10))),
    ]
    trainer = make_trainer(tiny_model_dir, samples, loss=LossConfig())
    trainer.train(segment_of(samples, [[0, 1, 2, 3]]))
    before, moments = weights_of(trainer), moments_of(trainer)
    with pytest.raises(RunError, match=r"step 0: .*samples 12, 13; .*train\.lr") as caught:
        trainer.train(segment_of(samples, [[4, 5], [6, 7]]))
    assert "10" not in str(caught.value)
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    assert all(torch.equal(moments[n], m) for n, m in moments_of(trainer).items())
    (after,) = trainer.train(segment_of(samples, [[0, 1, 2, 3]])).steps
    clean = make_trainer(tiny_model_dir, samples, loss=LossConfig())
    expected = clean.train(segment_of(samples, [[0, 1, 2, 3]], steps=2)).steps[1]
    assert after.loss == expected.loss


def test_a_full_device_says_what_to_lower(tiny_model_dir):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    before = weights_of(trainer)

    def is_full(*_):
        raise torch.OutOfMemoryError("out of memory")

    hook = trainer.model.model.norm.register_forward_hook(is_full)
    with pytest.raises(
        RunError, match=r"step 0: .*a sample of 18 tokens and loss\.chunk 1: set train\.act"
    ):
        trainer.train(segment_of(rollouts, [[0, 1], [2, 3]]))
    hook.remove()
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train(segment_of(rollouts, [[0, 1], [2, 3]]))


def moments_of(trainer):
    return {
        (i, kind): value.clone()
        for i, state in enumerate(trainer.optimizer.state.values())
        for kind, value in state.items()
    }


def test_a_gradient_that_overflows_takes_no_step(tiny_model_dir):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights_of(trainer)
    with pytest.raises(
        RunError, match=r"gradient norm (inf|nan) in the rows of samples 0, 1, 2, 3"
    ):
        trainer.train(segment_of(rollouts, [[0, 1], [2, 3]]))
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())


def test_bfloat16_is_close_to_float32(tiny_model_dir, teacher):
    scored = [score(teacher, own(teacher, r)) for r in make_rollouts()]
    reports = []
    for config in (FP32, replace_config(dtype="bfloat16")):
        trainer = make_trainer(tiny_model_dir, scored, config, LossConfig(target="tail"))
        reports.append(trainer.train(segment_of(scored, [[0, 1, 2, 3]])).steps[0])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    exact, rough = reports
    assert rough.loss != exact.loss
    for name in ("loss", "ce", "kd", "grad_norm", "entropy", "student_mass"):
        assert getattr(rough, name) == pytest.approx(getattr(exact, name), rel=0.03), name


def test_activation_checkpointing_changes_no_number(tiny_model_dir):
    rollouts = make_rollouts()
    runs = []
    for is_on in (False, True):
        config = replace_config(activation_checkpointing=is_on)
        trainer = make_trainer(tiny_model_dir, rollouts, config)
        layers = list(layers_of(trainer.model))
        assert [layer.gradient_checkpointing for layer in layers] == [is_on] * len(layers)
        report = trainer.train(segment_of(rollouts, [[0, 1], [2, 3]], steps=2))
        runs.append(([step.loss for step in report.steps], weights_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][n], w) for n, w in runs[1][1].items())


def test_the_callers_random_numbers_are_left_alone(tiny_model_dir):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer.train(segment_of(rollouts, [[0, 1, 2, 3]]))
    assert torch.equal(torch.rand(3), expected)


def test_each_step_is_heard_of_as_it_ends(tiny_model_dir):
    rollouts = make_rollouts()
    trainer = make_trainer(tiny_model_dir, rollouts)
    heard = []
    report = trainer.train(
        segment_of(rollouts, [[0, 1, 2, 3]], steps=3),
        on_step=lambda step: heard.append((step, trainer.last_step)),
    )
    assert [step for step, _ in heard] == list(report.steps)
    assert [last for _, last in heard] == [0, 1, 2]
    assert report.peak_memory_mib > 10.0
    assert all(step.seconds > 0.0 for step in report.steps)
    assert {step.kd for step in report.steps} == {None}


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_student_loads_and_gives_the_same_logits(tmp_path, tied):
    from tiny_model import save_model

    source = save_model(tmp_path / "source", seed=3, tied=tied)
    rollouts = make_rollouts()
    trainer = make_trainer(source, rollouts)
    trainer.train(segment_of(rollouts, [[0, 1, 2, 3]]))
    before = weights_of(trainer)
    trainer.save_pretrained(tmp_path / "out")
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    assert trainer.model.config.dtype == torch.float32 or trainer.model.config.dtype == "float32"

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    weights = (loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    assert (weights[0] is weights[1]) == tied
    for name, p in loaded.named_parameters():
        assert torch.equal(p, before[name].bfloat16()), name
    tokenizers = [AutoTokenizer.from_pretrained(d) for d in (source, tmp_path / "out")]
    text = "what is <|im_end|> two?"
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert "npd_packed" not in (tmp_path / "out" / "config.json").read_text()

    trainer.save_pretrained(tmp_path / "exact", dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype="auto")
    assert exact.dtype == torch.float32
    expected = response_logprobs(exact, rollouts[2])
    rough = response_logprobs(loaded.float(), rollouts[2])
    torch.testing.assert_close(rough, expected, atol=0.1, rtol=0.02)


def test_the_live_model_can_decode_in_between(tiny_model_dir):
    rollouts = make_rollouts()
    runs = []
    for decodes in (False, True):
        trainer = make_trainer(tiny_model_dir, rollouts)
        trainer.train(segment_of(rollouts, [[0, 1, 2, 3]]))
        if decodes:
            with decoding(trainer.model) as model, torch.no_grad():
                assert not model.training
                model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)
        assert trainer.model.training
        runs.append(trainer.train(segment_of(rollouts, [[0, 1, 2, 3]])).steps[0].loss)
    assert runs[0] == runs[1]


def test_a_missing_student_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"the student .* is not a directory here"):
        make_trainer(tmp_path / "nowhere", make_rollouts())


def test_a_student_that_cannot_compute_activations_again_names_the_key():
    class Rigid(torch.nn.Module):
        def gradient_checkpointing_enable(self, options):
            raise ValueError("Rigid does not support gradient checkpointing.")

    with pytest.raises(ModelError, match=r"Rigid.*train\.activation_checkpointing: false"):
        recompute_activations(Rigid())

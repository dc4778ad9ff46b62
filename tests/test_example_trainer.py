"""`examples/trainer.py`: the loss it gives a Hugging Face trainer is the method's, by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from npd import NearPolicyLoss
from tiny_model import make_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "trainer.py"
K = 5


def load_example():
    spec = importlib.util.spec_from_file_location("trainer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(num=8, length=12):
    """Token sequences; the first third of each is a prompt, without labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 304, (num, length), generator=draw)
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def make_trainer(tmp_path, teacher, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, dataloader_pin_memory=False, report_to="none",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    return load_example().near_policy(Trainer)(
        make_model(0), arguments, train_dataset=rows(), teacher=teacher, top_k=K, **options
    )


def by_hand(student, teacher, batch):
    """0.1 CE + 0.9 KD, token by token over whole vocabularies, and KD alone."""
    p, q = (
        model(input_ids=batch["input_ids"]).logits.log_softmax(-1) for model in (teacher, student)
    )
    ces, kds = [], []
    for row, labels in enumerate(batch["labels"]):
        for place in range(len(labels) - 1):
            if (word := labels[place + 1]) == -100:
                continue
            best = p[row, place].topk(K).indices.tolist()
            ces.append(-q[row, place, word])
            kds.append(sum(p[row, place, i].exp() * (p[row, place, i] - q[row, place, i])
                           for i in best))  # fmt: skip
    ce, kd = torch.stack(ces).mean(), torch.stack(kds).mean()
    return 0.1 * ce + 0.9 * kd, kd


def batch_of(examples):
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}


def test_the_loss_and_its_gradient_are_the_methods_by_hand(tmp_path):
    teacher = make_model(1)
    trainer, batch = make_trainer(tmp_path, teacher), batch_of(rows(3))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    expected, _ = by_hand(trainer.model, teacher, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_stored_top_k_gives_what_the_teacher_would(tmp_path):
    teacher, batch = make_model(1), batch_of(rows(3))
    live = make_trainer(tmp_path, teacher, loss=NearPolicyLoss(target="tail"))
    stored = make_trainer(tmp_path, None, loss=NearPolicyLoss(target="tail"))
    with torch.no_grad():
        top = teacher(input_ids=batch["input_ids"]).logits.log_softmax(-1).topk(K)
    brought = {**batch, "topk_ids": top.indices, "topk_logprobs": top.values}
    got = stored.compute_loss(stored.model, brought)
    torch.testing.assert_close(got, live.compute_loss(live.model, batch))


def test_a_training_run_logs_the_metrics_of_its_steps(tmp_path):
    teacher = make_model(1)
    trainer = make_trainer(tmp_path, teacher)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "kd" in line]
    assert len(steps) == 2
    for line in steps:
        assert line["loss"] == pytest.approx(0.1 * line["ce"] + 0.9 * line["kd"], rel=1e-4)
    assert 0.0 < steps[0]["teacher_mass"] < 1.0

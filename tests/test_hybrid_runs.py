"""Whole runs with models that have recurrent or convolutional layers, as student and as teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import npd
from npd.export import export_model
from npd.store.layout import RunLayout
from npd.store.shards import read_scored
from npd.types import Outcome
from run_process import check_books
from tiny_model import save_hybrid
from tiny_run import tiny_config, write_prompts

LONGER = {"epochs": 12, "reuse": 4, "refresh": {"at_epochs": [4, 8]}}


@torch.no_grad()
def logprobs_of(model, sample):
    """The model's log-probs of a response's tokens and of its top-k, without npd's code."""
    rollout = sample.rollout
    ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    logits = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
    logprobs = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(dim=-1)
    tokens = torch.from_numpy(rollout.response_ids).long()[:, None]
    top = torch.from_numpy(sample.topk_ids).long()
    return logprobs.gather(1, tokens)[:, 0].numpy(), logprobs.gather(1, top).numpy()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("Qwen3_5Text", "Llama"), ("Lfm2", "Llama"), ("Llama", "FalconH1"), ("Mamba", "Qwen3_5Text")],
)
def test_a_hybrid_is_trained_and_teaches(
    student, teacher, tmp_path, tiny_model_dir, tiny_teacher_dir
):
    """The run ends near its teacher; transformers alone agrees with its scores and its student."""
    start = tiny_model_dir if student == "Llama" else save_hybrid(tmp_path / "student", student)
    source = tiny_teacher_dir
    if teacher != "Llama":
        source = save_hybrid(tmp_path / "teacher", teacher, seed=1)
    config = tiny_config(
        start,
        source,
        write_prompts(tmp_path / "prompts.jsonl"),
        tmp_path / "run",
        schedule=LONGER,
        loss={"target": "tail"},
        train={"activation_checkpointing": True, "lr": 5e-3},
    )
    result = npd.run(config)
    layout = RunLayout(result.directory)
    assert result.is_done
    assert check_books(layout, reuse=4)[Outcome.TRAINED_OUT] > 0
    assert result.data.evals[-1]["kl"] < 0.9 * result.data.evals[0]["kl"]

    scorer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    # A snapshot is in bfloat16, and scores are kept in float16.
    writer = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).float().eval()
    shards = sorted(layout.root.glob("scored/*.arrow"))
    samples = [sample for path in shards for sample in read_scored(path)]
    first = [sample for sample in samples if sample.rollout.version == 0]
    assert first
    for sample in first:
        _, top = logprobs_of(scorer, sample)
        np.testing.assert_allclose(sample.topk_logprobs, top, atol=8e-3)
        written, _ = logprobs_of(writer, sample)
        np.testing.assert_allclose(sample.rollout.logprobs, written, atol=2e-3)

    exported = export_model(result.student, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("what is moon number 3?", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4
    assert type(model) is type(writer)

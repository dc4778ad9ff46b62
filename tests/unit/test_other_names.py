"""Settings as other training programs name them: what each is here, in one short line."""

from __future__ import annotations

import re

import pytest

from npd.config.load import dump_config, load_config
from npd.config.other_names import keys_of, other_hint, other_names
from npd.errors import ConfigError

MODELS = ("student=s", "teacher=t", "data.train=d.jsonl")
# Theirs -> the keys here, or a word of what else is said.
TRL = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "data.train",
    "dataset_config": "data.train",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.heldout_split",
    "dataset_text_field": "data.columns",
    "eval_dataset": "data.heldout",
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "train.batch_size train.row_tokens",
    "gradient_checkpointing": "train.activation_checkpointing",
    "max_grad_norm": "train.clip",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "num_train_epochs": "schedule.epochs",
    "max_steps": "schedule.steps",
    "max_length": "data.max_prompt_tokens generate.max_new_tokens",
    "max_seq_length": "data.max_prompt_tokens generate.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "generate.max_new_tokens",
    "num_generations": "generate.samples_per_prompt",
    "eval_steps": "eval.every_steps",
    "eval_strategy": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "run_dir",
    "run_name": "name",
    "report_to": "observe.trackers",
    "bf16": "train.dtype",
    "torch_compile": "train.compile",
    "deepspeed": "train.ranks",
    "fsdp": "train.ranks",
    "use_peft": "train.lora",
    "lora_r": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_target_modules": "train.lora.targets",
    "use_vllm": "generate.engine",
    "vllm_server_base_url": "generate.urls",
    "seq_kd": "generate.source",
    "loss_top_k": "score.top_k",
    "use_teacher_server": "score.engine",
    "teacher_model_server_url": "score.urls",
    "packing": "always on",
    "padding_free": "always on",
    "optim": "train.optimizer",
    "lr_scheduler_type": "always on (a cosine",
    "logging_steps": "always on",
    "completion_only_loss": "always on",
    "assistant_only_loss": "always on",
    "use_liger_kernel": "always on",
    "attn_implementation": "always on",
    "disable_dropout": "always on",
    "fp16": "not supported: set train.dtype",
    "load_in_4bit": "not supported: the student is trained unquantised",
    "push_to_hub": "not supported: npd export",
    "resume_from_checkpoint": "not supported: resume a run with npd run",
    "lmbda": "not supported: set generate.source",
    "neftune_noise_alpha": "not supported: leave it out",
    "dataset_num_proc": "not supported: leave it out",
    "dataloader_num_workers": "not supported: leave it out",
    "hub_model_id": "not supported: npd export",
    "bnb_4bit_quant_type": "not supported",
}
AXOLOTL = {
    "base_model": "student",
    "datasets": "data.train",
    "test_datasets": "data.heldout",
    "val_set_size": "data.heldout_size",
    "sequence_len": "data.max_prompt_tokens generate.max_new_tokens",
    "micro_batch_size": "train.row_tokens train.batch_size",
    "num_epochs": "schedule.epochs",
    "adapter": "train.lora",
    "lora_target_linear": "train.lora.targets",
    "cosine_min_lr_ratio": "train.min_lr",
    "evals_per_epoch": "eval.every_steps",
    "saves_per_epoch": "checkpoint.every_steps",
    "kd_alpha": "loss.kd_weight",
    "kd_temperature": "loss.temperature",
    "sample_packing": "always on",
    "flash_attention": "always on",
    "optimizer": "train.optimizer",
    "lr_scheduler": "always on (a cosine",
    "train_on_inputs": "always on",
    "chat_template": "data.chat_template",
    "wandb_project": "not supported: set observe.trackers",
    "special_tokens": "not supported: read from the model",
    "auto_resume_from_checkpoints": "not supported: resume a run",
}
OTHERS = {
    "cutoff_len": "data.max_prompt_tokens generate.max_new_tokens",
    "finetuning_type": "train.lora",
    "lora_rank": "train.lora.rank",
    "max_samples": "data.limit",
    "default_system": "data.system",
    "template": "always on",
    "quantization_bit": "not supported",
    "overwrite_output_dir": "not supported: give another name",
    "max_steps_per_epoch": "schedule.steps",
    "enable_activation_checkpointing": "train.activation_checkpointing",
    "lora_attn_modules": "train.lora.targets",
    "metric_logger": "observe.trackers",
    "max_seq_len": "data.max_prompt_tokens generate.max_new_tokens",
    "log_every_n_steps": "always on",
    "tokenizer": "not supported: read from the model",
    "checkpointer": "not supported: resume a run",
}
ALL = TRL | AXOLOTL | OTHERS


def complaint(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("npd", [*MODELS, f"{name}=1"])
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("name", ALL)
def test_a_key_of_another_program_is_told_what_it_is_here(name):
    said = complaint(name).removeprefix(f"--set {name}=1: unknown key {name}: ")
    wanted = ALL[name]
    if wanted.startswith(("always on", "not supported")):
        assert said.startswith(wanted)
    else:
        assert said.startswith("did you mean ")
        assert re.findall(r"(?:mean|or) ([\w.]+)", said) == wanted.split()


def keys() -> set[str]:
    """Every key there is, those of sections that may be left out too."""
    sets = ["train.lora.rank=8", "generate.engine=vllm", "generate.launch.tensor_parallel=1"]
    config = dump_config(load_config("npd", [*MODELS, *sets]).config)

    def walk(values, prefix=""):
        for name, value in values.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return set(walk(config))


@pytest.mark.parametrize("name", sorted(other_names()))
def test_every_hint_is_true_and_short(name):
    hint, known = other_hint(name), keys()
    assert hint is not None
    assert len(hint) <= 120
    assert set(keys_of(name)) <= known
    named = re.findall(
        r"\b(?:train|data|generate|score|loss|schedule|eval|observe)\.[a-z_.]*[a-z_]", hint
    )
    assert {key for key in named if not key.endswith((".jsonl", ".html"))} <= known
    assert name not in known, "a key of ours is not another program's"


def test_there_are_many():
    assert len(other_names()) >= 150
    assert len(ALL) >= 100

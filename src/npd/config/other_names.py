"""Setting names of other training programs, each with npd's equivalent.

The programs are TRL, Transformers, axolotl, LLaMA-Factory and torchtune. Each name has a short
hint: npd's key, "always on", or a remedy. Does not know which keys npd has (`npd.config.load`
does).
"""

from __future__ import annotations

# Their name -> npd's keys, separated by spaces; a note in brackets is part of the hint.
_RENAMED = {
    # models
    "model_name_or_path": "student",
    "model_name": "student",
    "base_model": "student",
    "model": "student",
    "teacher_model_name_or_path": "teacher",
    "teacher_model": "teacher",
    # data
    "dataset_name": "data.train",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_path": "data.train",
    "dataset_mixer": "data.mix",
    "chat_template": "data.chat_template (a Jinja file)",
    "chat_template_path": "data.chat_template",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "train_file": "data.train",
    "data_path": "data.train",
    "data_files": "data.train",
    "dataset_config": "data.train (write NAME:CONFIG)",
    "dataset_config_name": "data.train (write NAME:CONFIG)",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.heldout_split",
    "dataset_text_field": "data.columns",
    "column_map": "data.columns",
    "eval_dataset": "data.heldout",
    "test_datasets": "data.heldout",
    "validation_file": "data.heldout",
    "dataset_valid": "data.heldout",
    "val_set_size": "data.heldout_size (a number of prompts)",
    "val_size": "data.heldout_size (a number of prompts)",
    "max_samples": "data.limit",
    "max_train_samples": "data.limit",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_length": "data.max_prompt_tokens generate.max_new_tokens",
    "max_seq_length": "data.max_prompt_tokens generate.max_new_tokens",
    "max_seq_len": "data.max_prompt_tokens generate.max_new_tokens",
    "sequence_len": "data.max_prompt_tokens generate.max_new_tokens",
    "cutoff_len": "data.max_prompt_tokens generate.max_new_tokens",
    "model_max_length": "data.max_prompt_tokens generate.max_new_tokens",
    "system_prompt": "data.system",
    "default_system": "data.system",
    # optimiser
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "micro_batch_size": "train.row_tokens (memory) train.batch_size (samples a step)",
    "gradient_accumulation_steps": "train.batch_size train.row_tokens",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "clip_grad_norm": "train.clip",
    "warmup_steps": "train.warmup (a share of the run, 0 to 1)",
    "num_warmup_steps": "train.warmup (a share of the run, 0 to 1)",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer (adamw, adamw8bit)",
    "optimizer": "train.optimizer (adamw, adamw8bit)",
    "optimizer_type": "train.optimizer (adamw, adamw8bit)",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "min_lr_ratio": "train.min_lr (a rate, not a ratio)",
    "cosine_min_lr_ratio": "train.min_lr (a rate, not a ratio)",
    "lr_scheduler_kwargs": "train.min_lr train.warmup",
    "gradient_checkpointing": "train.activation_checkpointing",
    "enable_activation_checkpointing": "train.activation_checkpointing",
    "reshard_after_forward": "train.shard",
    "fsdp_reshard_after_forward": "train.shard",
    "torch_compile": "train.compile",
    "bf16": "train.dtype (bfloat16 is the default)",
    "torch_dtype": "train.dtype generate.dtype score.dtype",
    "deepspeed": "train.ranks",
    "fsdp": "train.ranks",
    "fsdp_config": "train.ranks",
    "num_processes": "train.ranks",
    "nproc_per_node": "train.ranks",
    "data_seed": "seed",
    # adapters
    "use_peft": "train.lora",
    "use_lora": "train.lora",
    "peft_config": "train.lora",
    "adapter": "train.lora",
    "finetuning_type": "train.lora",
    "lora_r": "train.lora.rank",
    "r": "train.lora.rank",
    "target_modules": "train.lora.targets",
    "lora_rank": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_target_modules": "train.lora.targets",
    "lora_target_linear": "train.lora.targets (all-linear)",
    "lora_target": "train.lora.targets",
    "lora_attn_modules": "train.lora.targets",
    # length of the run, evaluation, checkpoints
    "num_train_epochs": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "max_steps": "schedule.steps",
    "max_steps_per_epoch": "schedule.steps",
    "num_training_steps": "schedule.steps",
    "eval_steps": "eval.every_steps",
    "eval_strategy": "eval.every_steps",
    "evaluation_strategy": "eval.every_steps",
    "evals_per_epoch": "eval.every_steps",
    "per_device_eval_batch_size": "eval.batch_size",
    "eval_batch_size": "eval.batch_size",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps",
    "saves_per_epoch": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "run_dir",
    "run_name": "name",
    "report_to": "observe.trackers (tensorboard; metrics.jsonl is always written)",
    "logging_dir": "run_dir",
    "metric_logger": "observe.trackers",
    # generation and distillation
    "max_completion_length": "generate.max_new_tokens",
    "max_tokens": "generate.max_new_tokens",
    "num_generations": "generate.samples_per_prompt",
    "use_vllm": "generate.engine",
    "vllm_server_base_url": "generate.urls",
    "vllm_server_host": "generate.urls",
    "vllm_server_timeout": "generate.request_timeout",
    "vllm_tensor_parallel_size": "generate.launch.tensor_parallel",
    "vllm_gpu_memory_utilization": "generate.launch.memory",
    "vllm_mode": "generate.launch generate.urls",
    "use_teacher_server": "score.engine (vllm)",
    "teacher_model_server_url": "score.urls",
    "seq_kd": "generate.source (teacher)",
    "loss_type": "loss.target loss.divergence",
    "loss_top_k": "score.top_k",
    "kd_alpha": "loss.kd_weight",
    "kd_ce_alpha": "loss.kd_weight (1 - kd_ce_alpha)",
    "kd_ratio": "loss.kd_weight",
    "kd_temperature": "loss.temperature",
    "kd_beta": "loss.beta",
    "distillation_temperature": "loss.temperature",
}


def _each(names: str, hint: str) -> dict[str, str]:
    """The same hint for each of `names`, which are separated by spaces."""
    return dict.fromkeys(names.split(), hint)


_ALWAYS = {
    **_each(
        "packing sample_packing packed padding_free neat_packing eval_packing "
        "eval_sample_packing pad_to_sequence_len group_by_length packing_strategy "
        "sample_packing_eff_est multipack_real_batches",
        "samples are packed into rows of train.row_tokens",
    ),
    **_each(
        "flash_attention flash_attn attn_implementation sdp_attention xformers_attention "
        "attn_impl",
        "npd has its own packed attention",
    ),
    **_each(
        "use_liger_kernel use_liger liger_fused_linear_cross_entropy chunked_cross_entropy",
        "the loss is computed in chunks (loss.impl: triton fuses it)",
    ),
    **_each(
        "lr_scheduler_type lr_scheduler lr_schedule",
        "a cosine from train.lr to train.min_lr, after train.warmup",
    ),
    **_each(
        "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_prompt "
        "train_on_input train_on_responses_only",
        "the loss covers responses only, never prompts",
    ),
    **_each(
        "logging_steps logging_strategy logging_first_step log_every_n_steps log_level "
        "include_tokens_per_second include_num_input_tokens_seen plot_loss",
        "every step is in metrics.jsonl and report.html",
    ),
    **_each(
        "template prompt_template default_system_message",
        "the student's own chat template, or data.chat_template",
    ),
    **_each(
        "shuffle shuffle_dataset disable_dropout use_cache save_safetensors do_train "
        "remove_unused_columns average_tokens_across_devices",
        "npd does this itself",
    ),
}  # fmt: skip
_INSTEAD = {
    **_each(
        "tokenizer tokenizer_type tokenizer_name_or_path model_type special_tokens processor "
        "is_llama_derived_model pad_token eos_token",
        "read from the model directories, leave it out",
    ),
    "fp16": "set train.dtype: bfloat16 or float32",
    "tf32": "leave it out",
    "lmbda": "set generate.source: student (as 1) or dataset (as 0)",
    **_each(
        "load_in_4bit load_in_8bit quantization_bit quantization_config quantization_method "
        "qlora_sharded_model_loading",
        "the student is trained unquantised; for less memory set train.lora",
    ),
    **_each(
        "resume_from_checkpoint auto_resume_from_checkpoints checkpointer",
        "resume a run with npd run CONFIG --resume",
    ),
    "overwrite_output_dir": "give another name or run_dir, or --resume",
    "push_to_hub": "npd export RUN DIR, and upload that",
    **_each(
        "use_wandb use_mlflow use_comet",
        "set observe.trackers: [tensorboard], or read metrics.jsonl",
    ),
    **_each(
        "lora_modules_to_save modules_to_save",
        "adapters only: leave it out",
    ),
    **_each(
        "load_best_model_at_end metric_for_best_model early_stopping_patience "
        "greater_is_better",
        "set eval.every_steps and choose a snapshot by hand",
    ),
    **_each(
        "adam_epsilon optim_args neftune_noise_alpha neftune_alpha label_smoothing_factor "
        "gradient_checkpointing_kwargs model_init_kwargs teacher_model_init_kwargs "
        "dataset_num_proc preprocessing_num_workers dataset_prepared_path dataset_kwargs "
        "dataset_prepared overwrite_cache streaming torch_empty_cache_steps "
        "auto_find_batch_size full_determinism local_rank strict stage do_eval do_predict "
        "predict_with_generate ddp profiler trl rl plugins kd_trainer missing_eos_token "
        "dataset_batch_size eos_token_id jit_mode_eval",
        "leave it out",
    ),
}  # fmt: skip
# Families of names, by prefix.
_FAMILIES = {
    "wandb_": _INSTEAD["use_wandb"],
    "mlflow_": _INSTEAD["use_mlflow"],
    "comet_": _INSTEAD["use_comet"],
    "hub_": _INSTEAD["push_to_hub"],
    "push_to_hub_": _INSTEAD["push_to_hub"],
    "bnb_": _INSTEAD["load_in_4bit"],
    "fsdp_": "set train.ranks",
    "ddp_": "set train.ranks",
    "vllm_": "set generate.engine: vllm, with generate.launch.args",
    "dataloader_": "leave it out",
    "dpo_": "npd distils; leave it out",
    "reward_": "npd distils; leave it out",
}

# Values that are not supported, each with its replacement.
_VALUES = {
    ("generate.engine", "sglang"): "set generate.engine: vllm",
    ("score.engine", "sglang"): "set score.engine: vllm",
    ("schedule.refresh.in_flight", "abort"): "set in_flight: finish or in_flight: mix",
}


def value_hint(path: str, value: object) -> str | None:
    """The remedy for a known `value` that the setting at `path` does not support, else None.

    >>> value_hint("generate.engine", "sglang"), value_hint("generate.engine", "hf")
    ('not supported: set generate.engine: vllm', None)
    """
    instead = _VALUES.get((path, value)) if isinstance(value, str) else None
    return None if instead is None else f"not supported: {instead}"


def other_names() -> tuple[str, ...]:
    """Every setting name of another program that has a hint."""
    return (*_RENAMED, *_ALWAYS, *_INSTEAD)


def keys_of(name: str) -> tuple[str, ...]:
    """npd's keys for the setting that other programs call `name`; empty without an equivalent.

    >>> keys_of("max_length"), keys_of("packing")
    (('data.max_prompt_tokens', 'generate.max_new_tokens'), ())
    """
    words = _RENAMED.get(name, "").split(" (")
    plain = [words[0], *(rest.partition(")")[2] for rest in words[1:])]
    return tuple(word for part in plain for word in part.split())


def other_hint(name: str) -> str | None:
    """The hint for a setting that other programs call `name`; None if it is unknown.

    >>> other_hint("learning_rate"), other_hint("packing")[:9], other_hint("fp16")[:13]
    ('did you mean train.lr?', 'always on', 'not supported')
    """
    if name in _RENAMED:
        keys = keys_of(name)
        notes = _RENAMED[name]
        if "(" not in notes:
            return f"did you mean {' or '.join(keys)}?"
        return f"did you mean {notes.replace(') ', ') or ')}?"
    if name in _ALWAYS:
        return f"always on ({_ALWAYS[name]}): leave it out"
    family = next((text for start, text in _FAMILIES.items() if name.startswith(start)), None)
    instead = _INSTEAD.get(name, family)
    return None if instead is None else f"not supported: {instead}"

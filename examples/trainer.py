"""npd's loss in somebody else's trainer: transformers' `Trainer`, or TRL's `SFTTrainer`.

    python examples/trainer.py STUDENT TEACHER texts.jsonl OUT          # {"text": ...} a line
    python examples/trainer.py STUDENT TEACHER texts.jsonl OUT --trl    # needs: pip install trl

Everything else (data, optimiser, accumulation, DDP, logging) stays the trainer's. The top-k comes
from the teacher in each step, or with the batch: `topk_ids` and `topk_logprobs`, [B, T, K], where
position t has the teacher's log-probs for the token after t (untempered; -inf: no entry).
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from npd import NearPolicyLoss
from npd.models.lm_head import head_of

IGNORED = -100


def near_policy(base: type[Trainer]) -> type[Trainer]:
    """`base` with the near-policy loss: the whole change is `compute_loss`."""

    class NearPolicyTrainer(base):
        """Takes `teacher` (a model, or None where batches bring its top-k), `top_k` and `loss`."""

        def __init__(self, *args: Any, teacher: Any = None, top_k: int = 10,
                     loss: NearPolicyLoss | None = None, **kwargs: Any) -> None:  # fmt: skip
            super().__init__(*args, **kwargs)
            self.near_policy_loss, self.top_k = loss or NearPolicyLoss(), top_k
            self.teacher = teacher and teacher.eval().requires_grad_(False).to(self.args.device)
            self.sums: Counter[str] = Counter()

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                         num_items_in_batch: Tensor | int | None = None) -> Any:  # fmt: skip
            inputs = dict(inputs)
            labels = inputs.pop("labels")[:, 1:]
            stored = [inputs.pop(name, None) for name in ("topk_ids", "topk_logprobs")]
            keep = labels != IGNORED  # positions whose next token is trained on
            # Through the model itself, as DDP and FSDP want it, but with logits of one position.
            out = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            if stored[0] is None:
                topk = teacher_topk(self.teacher, inputs, keep, self.top_k)
            else:
                topk = tuple(tensor[:, :-1][keep] for tensor in stored)
            # The model's own autocast ends with its forward pass.
            device = keep.device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.args.bf16):
                found = self.near_policy_loss(
                    out.hidden_states[-1][:, :-1][keep],
                    head_of(self.accelerator.unwrap_model(model)),
                    labels[keep],
                    *topk,
                    normalizer=float(num_items_in_batch or keep.sum().clamp(min=1)),
                )
            if model.training:
                self.sums.update({name: value.item() for name, value in found.metrics.items()})
            # The count is of the whole accumulated batch on all processes, which DDP averages over.
            self.loss_is_scaled_for_ga = num_items_in_batch is not None
            shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
            loss = found.loss * (self.accelerator.num_processes if shared else 1)
            return (loss, out) if return_outputs else loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            tokens = self.sums.pop("tokens", 0.0)
            if tokens:
                logs |= {name: value / tokens for name, value in self.sums.items()}
            self.sums.clear()
            super().log(logs, *args, **kwargs)

    return NearPolicyTrainer


@torch.no_grad()
def teacher_topk(teacher: Any, inputs: dict[str, Any], keep: Tensor, k: int) -> tuple[Any, Any]:
    """Ids and log-probs [N, k] of the teacher at the kept positions, some of them at a time."""
    out = teacher(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden, head = out.hidden_states[-1][:, :-1][keep], head_of(teacher)
    parts = [head.logits(hidden[part]).log_softmax(-1).topk(k)
             for part in head.slices(len(hidden), 1024)]  # fmt: skip
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def main() -> None:
    """Fine-tune a student on texts, with the teacher's top-k beside them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("student", "teacher", "texts", "out"):
        parser.add_argument(name)
    parser.add_argument("--trl", action="store_true", help="SFTTrainer in place of Trainer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.student)
    # A small learning rate is lost on weights in bfloat16; the teacher's do not change.
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher)
    data = load_dataset("json", data_files=args.texts, split="train")
    has_gpu = torch.cuda.is_available()
    options = {"output_dir": args.out, "max_steps": args.steps, "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 2, "learning_rate": 1e-5, "logging_steps": 1,
               "use_cpu": not has_gpu, "bf16": has_gpu, "dataloader_pin_memory": has_gpu,
               "report_to": "none"}  # fmt: skip
    if args.trl:
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**options, max_length=args.max_length)
        trainer = near_policy(SFTTrainer)(
            student, config, train_dataset=data, processing_class=tokenizer, teacher=teacher
        )
    else:

        def encode(row: dict[str, str]) -> Any:
            return tokenizer(row["text"], truncation=True, max_length=args.max_length)

        data = data.map(encode, remove_columns=data.column_names)
        trainer = near_policy(Trainer)(
            student,
            TrainingArguments(**options),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            teacher=teacher,
        )
    trainer.train()
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

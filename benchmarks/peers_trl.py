"""TRL's `DistillationTrainer` and `GKDTrainer` on a pair of `pair.py`, timed and evaluated.

Both run as their users call them, `trainer.train()` on conversations, strictly on-policy, forward
KL at temperature 1, transformers' `generate`, nothing recomputed. A callback reads the process's
CPU time (with a GPU: wall time, the device's included) at the begin and the end of each step and
stops the training when the budget is spent; subclasses time `generate` and count its tokens, a hook
times the teacher's layers. Evaluation is outside that time. Needs TRL; nothing else of the
benchmarks imports it.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from common import clock_of, seconds
from npd.generate.decoding import without_cudnn_attention
from npd.models.loading import load_model

Evaluate = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class PeerSetting:
    """What is trained on and how; `budget`: seconds of steps after which it ends."""

    student: Path
    teacher: Path
    prompts: Path
    system: str | None
    seed: int
    lr: float
    batch: int
    max_response: int
    budget: float
    most_steps: int = 1000
    dtype: str = "bfloat16"
    teacher_dtype: str = "bfloat16"
    every: float = 40.0
    """Seconds of steps between evaluations."""
    device: str = "cpu"


@dataclass
class Count:
    """What a trainer did so far, in seconds of `clock`: whole steps, and of them two parts."""

    clock: str

    seconds: dict[str, float] = field(
        default_factory=lambda: {"step": 0.0, "generate": 0.0, "teacher": 0.0}
    )
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def add(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work`; its time is that of `name`."""
        started = seconds(self.clock)
        found = work()
        self.seconds[name] += seconds(self.clock) - started
        return found

    def wrote(self, prompt_tokens: int, response_tokens: int, samples: int) -> None:
        """Count real tokens of samples that were written, and will be trained on once."""
        self.samples += samples
        self.response_tokens += response_tokens
        self.tokens += prompt_tokens + response_tokens


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times steps, has the student evaluated between them, and ends the training."""

    def __init__(self, setting: PeerSetting, count: Count, evaluate: Evaluate) -> None:
        self._setting, self._count, self._evaluate = setting, count, evaluate
        self._evaluated_at = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = seconds(self._count.clock)

    def on_step_end(self, _: Any, __: Any, control: Any, *, model: Any, **___: Any) -> None:
        count = self._count
        count.seconds["step"] += seconds(count.clock) - self._started
        count.steps += 1
        spent = count.seconds["step"]
        is_over = spent >= self._setting.budget or count.steps >= self._setting.most_steps
        if is_over or spent - self._evaluated_at >= self._setting.every:
            self._look(model)
        control.should_training_stop = control.should_training_stop or is_over

    def _look(self, model: Any) -> None:
        self._evaluated_at = self._count.seconds["step"]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = self._evaluate(Path(folder))
        self._count.curve.append(
            {"seconds": self._evaluated_at, "samples": self._count.samples, **found}
        )


def run_peer(name: str, setting: PeerSetting, evaluate: Evaluate, out: Path) -> Count:
    """Train with `distillation` or `gkd` and save the student in `out`.

    `evaluate` gets the directory of a student saved between steps, the start apart.
    """
    warnings.simplefilter("ignore")
    count = Count(clock_of(setting.device))
    torch.manual_seed(setting.seed)
    load = partial(load_model, device=setting.device, packed=False)
    student = load(setting.student, dtype=setting.dtype).train()
    teacher = load(setting.teacher, dtype=setting.teacher_dtype)
    _time_teacher(teacher, count)
    make = {"distillation": _distillation, "gkd": _gkd}[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(setting, count, student, teacher, folder)
        trainer.add_callback(Clock(setting, count, evaluate))
        trainer.train()
    student.save_pretrained(out)
    _tokenizer(setting).save_pretrained(out)
    return count


def _time_teacher(teacher: Any, count: Count) -> None:
    """Time the passes through the teacher's layers (its LM head is not in it)."""
    started = [0.0]

    def begin(*_: Any) -> None:
        started[0] = seconds(count.clock)

    def end(*_: Any) -> None:
        count.seconds["teacher"] += seconds(count.clock) - started[0]

    teacher.base_model.register_forward_pre_hook(begin)
    teacher.base_model.register_forward_hook(end)


def _arguments(setting: PeerSetting, folder: str) -> dict[str, Any]:
    """What both trainers are told: AdamW as npd's, a constant learning rate."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch,
        "max_steps": setting.most_steps,
        "learning_rate": setting.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": setting.device == "cpu",
        "gradient_checkpointing": False,
        "seed": setting.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
    }


def _conversations(setting: PeerSetting) -> list[list[dict[str, str]]]:
    lines = setting.prompts.read_text().splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    random.Random(setting.seed).shuffle(questions)
    system = [{"role": "system", "content": setting.system}] if setting.system else []
    return [[*system, {"role": "user", "content": question}] for question in questions]


def _tokenizer(setting: PeerSetting) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(setting.student, padding_side="left")


def _distillation(
    setting: PeerSetting, count: Count, student: Any, teacher: Any, folder: str
) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):  # type: ignore[misc]
        """Times what writes, and counts what it wrote."""

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
            plain = super()._generate_single_turn
            with without_cudnn_attention():
                written = count.add("generate", lambda: plain(prompt_ids, *rest, **options))
            count.wrote(sum(map(len, prompt_ids)), sum(map(len, written)), len(prompt_ids))
            return written

    return Timed(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            max_completion_length=setting.max_response, **_arguments(setting, folder)
        ),
        train_dataset=Dataset.from_dict({"prompt": _conversations(setting)}),
        processing_class=_tokenizer(setting),
    )


def _gkd(setting: PeerSetting, count: Count, student: Any, teacher: Any, folder: str) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Timed(GKDTrainer):  # type: ignore[misc]
        """Times what writes, and counts what it wrote."""

        @staticmethod
        def generate_on_policy_outputs(*arguments: Any) -> Any:
            plain = GKDTrainer.generate_on_policy_outputs
            with without_cudnn_attention():
                ids, mask, labels = count.add("generate", lambda: plain(*arguments))
            responses = int((labels != -100).sum())
            count.wrote(int(mask.sum()) - responses, responses, len(ids))
            return ids, mask, labels

    answer = {"role": "assistant", "content": ""}
    return Timed(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            max_new_tokens=setting.max_response, lmbda=1.0, **_arguments(setting, folder)
        ),
        train_dataset=Dataset.from_dict(
            {"messages": [[*asked, answer] for asked in _conversations(setting)]}
        ),
        processing_class=_tokenizer(setting),
    )

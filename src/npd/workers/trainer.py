"""The trainer worker: trains segments, publishes snapshots, saves checkpoints, evaluates.

With `train.ranks` every rank runs this class and receives the same calls; the first rank writes
files and returns results.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npd.config import RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.evaluate import IF_NOTHING_FITS, Match, exact_match, heldout_kl, kl_by_teacher, row_fitting
from npd.models.device import free_cached, is_gpu, resolve_device
from npd.models.distributed import DistContext, Rendezvous
from npd.models.loading import decoding
from npd.models.out_of_memory import Fitting
from npd.observe.pace import noted, write_note
from npd.store.files import explain_write, remove
from npd.store.layout import RunLayout
from npd.store.shards import ShardReader, read_scored
from npd.store.snapshots import publish
from npd.types import EncodedPrompt, EvalReport, SampleRequest, Segment, SegmentReport, StepReport

if TYPE_CHECKING:
    from npd.train.trainer import Trainer


class TrainerWorker:
    """Trains segments, publishes snapshots, saves checkpoints, evaluates."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config, self._layout = config, layout
        if config.needs_scores:
            self._reader = ShardReader(layout.scored, "scored")
        else:
            self._reader = ShardReader(layout.rollouts, "rollouts")
        self._chat = ChatTokenizer.of_student(config)
        self._device = resolve_device(config.runtime.device)
        self._dist: DistContext | None = None
        self._opened = ExitStack()
        self._row_fitting = row_fitting(config.train.row_tokens)
        self._fitting = Fitting(
            "eval.batch_size", config.eval.batch_size, IF_NOTHING_FITS, is_alone=True
        )
        self._rendezvous = Rendezvous(
            config.train.ranks,
            device=self._device,
            call_timeout=config.runtime.call_timeout,
            setting="train.ranks",
        )
        if config.train.ranks == 1:
            self._load()

    def open_rendezvous(self) -> str:
        """Open a rendezvous on this rank, which is rank 0, for ranks on other machines."""
        return self._rendezvous.open()

    def join(self, rank: int, address: str) -> None:
        """Become rank `rank` of the trainer; `address` as in `npd.models.distributed.connect`.

        Raises:
            ConfigError: a rank has no GPU.
        """
        self._dist = self._rendezvous.join(rank, address)
        self._load()

    def _load(self) -> None:
        from npd.train.trainer import Trainer

        self._loaded = Trainer(
            self._config.train,
            self._config.loss,
            student=self._config.student,
            read=self._reader.read,
            device=self._device,
            trust_remote_code=self._config.trust_remote_code,
            seed=self._config.seed,
            dist=self._dist,
            stop_ids=self._chat.stop_ids,
        )
        self._opened.callback(self._trainer.close)

    @property
    def _trainer(self) -> Trainer:
        """The trainer, on its device."""
        self._loaded.to_device()
        return self._loaded

    def release(self) -> None:
        """Move the student and the moments off the device; the next call moves them back."""
        if is_gpu(self._device):
            self._loaded.off_device()

    def restore(self, step: int) -> None:
        """Load the checkpoint of `step`; 0 is the initial student."""
        if step > 0:
            self._trainer.load_checkpoint(self._layout.checkpoint(step))

    def train(self, segment: Segment) -> SegmentReport:
        """Take the segment's optimiser steps; write each step's progress for the live view."""
        done: list[StepReport] = []

        def write_progress(report: StepReport) -> None:
            done.append(report)
            if self._trainer.dist.is_first:
                write_note(self._layout.trainer_step, noted(segment.index, done))

        return self._trainer.train(segment, on_step=write_progress)

    def publish(self, version: int) -> str:
        """Write the student (or its LoRA adapter) as snapshot `version`; returns its checksum."""
        with self._trainer.gathered_for_save() as model:
            if model is None:
                return ""
            directory = self._layout.snapshot(version)
            return publish(directory, lambda into: self._write_snapshot(into, model))

    def _write_snapshot(self, directory: Path, model: Any) -> None:
        """Write the student in the form that its generator loads."""
        generate = self._config.generate
        is_served = generate.is_served and generate.source == "student"
        # vLLM 0.32 does not reload a tied LM head, so it is written as a separate tensor.
        self._trainer.save_snapshot(directory, untie=is_served, full=model)
        self._chat.save_template(directory)

    def _write_student(self, directory: Path, model: Any) -> None:
        self._trainer.save_pretrained(directory, full=model)
        self._chat.save_template(directory)

    def checkpoint(self, step: int) -> float:
        """Copy the state for resuming from `step`; it is written while training goes on.

        Returns the seconds that it waited for the checkpoint before it.
        """
        return self._trainer.start_checkpoint(self._checkpoint(step), self._layout.store)

    def is_saved(self, step: int) -> bool:
        """Whether the copied state of `step` is where checkpoints are kept.

        Raises:
            RunError: it could not be written.
        """
        return self._loaded.is_saved(self._checkpoint(step))  # wherever the student is

    def _checkpoint(self, step: int) -> Path:
        # Not by way of a cache, which takes part in the calls and not in what goes on beside them.
        return RunLayout(self._layout.root).checkpoint(step)

    def export(self) -> str:
        """Write the final student as a Hugging Face model directory; replaces an older one."""
        student = self._layout.student
        with self._trainer.gathered_for_save() as model:
            if model is not None:
                new = student.with_name(f"{student.name}-new")
                remove(new)
                publish(new, lambda into: self._write_student(into, model))
                remove(student)
                with explain_write(student):
                    new.rename(student)
        return str(student)

    def evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...]) -> EvalReport | None:
        """Held-out KL and agreement on `heldout.arrow`, exact match and sample texts by greedy
        decoding. With several ranks, rank 0 evaluates the gathered student; others return None.
        """
        with self._trainer.full_model() as model:
            found = None if model is None else self._evaluate(step, prompts, model)
        free_cached()  # other processes may use what logits and decoding took
        return found

    def _evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...], model: Any) -> EvalReport:
        started = time.monotonic()
        match: Match | None = None
        kls: tuple[tuple[str, float], ...] = ()
        if self._layout.heldout.exists():
            heldout = read_scored(self._layout.heldout)
            with self._autocast(self._config.train.dtype):
                rows = self._config.train.row_tokens
                match = heldout_kl(model, heldout, rows, 512, fitting=self._row_fitting)
            kls = kl_by_teacher(match, heldout)
        texts = self._greedy(prompts, model)
        pairs = [(text, prompt.answer) for prompt, text in texts if prompt.answer is not None]
        shown = texts[: self._config.eval.num_samples]
        return EvalReport(
            step=step,
            kl=match.kl if match else None,
            agreement=match.agreement if match else None,
            exact_match=exact_match(pairs) if pairs else None,
            num_prompts=len(prompts),
            num_answers=len(pairs),
            num_tokens=match.num_tokens if match else 0,
            seconds=time.monotonic() - started,
            samples=tuple((self._chat.decode(p.prompt_ids), text) for p, text in shown),
            kl_sums=match.kl_sums if match else (),
            teacher_kls=kls,
        )

    def _autocast(self, dtype: str) -> AbstractContextManager[object]:
        import torch

        is_bf16 = dtype == "bfloat16"
        return torch.autocast(self._trainer.device, torch.bfloat16, enabled=is_bf16)

    def _greedy(
        self, prompts: Sequence[EncodedPrompt], model: Any
    ) -> list[tuple[EncodedPrompt, str]]:
        """The student's greedy responses to prompts with answers, and to a few to display."""
        from npd.generate.in_process import generate_with
        from npd.generate.sampling import Sampling

        evaluation = self._config.eval
        few = prompts[: evaluation.num_samples]
        chosen = [p for p in prompts if p.answer is not None or p in few]
        if not chosen:
            return []
        sampling = Sampling(
            max_new_tokens=evaluation.max_new_tokens,
            stop_ids=self._chat.stop_ids,
            pad_id=self._chat.pad_id,
            temperature=0.0,
            top_p=1.0,
            batch_size=evaluation.batch_size,
            vocab_size=self._chat.vocab_size,
        )
        requests = [SampleRequest(p.index, p.index, p) for p in chosen]
        with self._autocast(self._config.train.dtype), decoding(model):
            rollouts = generate_with(
                model,
                requests,
                sampling,
                with_logprobs=False,
                fitting=self._fitting,
            )
        return [
            (p, self._chat.decode(r.response_ids)) for p, r in zip(chosen, rollouts, strict=True)
        ]

    def ready(self) -> None:
        """No-op. The first call constructs the worker; loading gets its own span in traces."""

    def close(self) -> None:
        """Drop a checkpoint that is being written, close the shard files, leave the other ranks."""
        self._opened.close()
        self._reader.close()
        self._rendezvous.leave()

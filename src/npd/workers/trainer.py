"""The trainer: trains segments, publishes snapshots, saves checkpoints, evaluates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from npd.chat import Chat
from npd.config import RunConfig
from npd.evaluate import Match, exact_match, heldout_kl, kl_by_teacher
from npd.modeling import decoding, resolve_device
from npd.reports import EvalReport, SegmentReport
from npd.store.files import explain_write, remove
from npd.store.layout import RunLayout
from npd.store.shards import ShardReader, read_scored
from npd.store.snapshots import is_whole, publish
from npd.types import Ask, EncodedPrompt, Segment
from npd.world import Meeting, World


class TrainerWorker:
    """Trains segments, publishes snapshots, saves checkpoints, evaluates."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config, self._layout = config, layout
        if config.needs_scores:
            self._reader = ShardReader(layout.scored, "scored")
        else:
            self._reader = ShardReader(layout.rollouts, "rollouts")
        self._chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._device = resolve_device(config.runtime.device)
        self._world: World | None = None
        self._meeting = Meeting(
            config.train.ranks,
            device=self._device,
            call_timeout=config.runtime.call_timeout,
            setting="train.ranks",
        )
        if config.train.ranks == 1:
            self._load()

    def host(self) -> str:
        """Open a place where ranks of other machines can join this one, the first."""
        return self._meeting.host()

    def join(self, rank: int, place: str) -> None:
        """Become rank `rank` of the trainer; they meet at a new file, or where the first one hosts.

        Raises:
            ConfigError: a rank has no GPU of its own.
        """
        self._world = self._meeting.join(rank, place)
        self._load()

    def _load(self) -> None:
        from npd.train.trainer import Trainer

        self._trainer = Trainer(
            self._config.train,
            self._config.loss,
            student=self._config.student,
            read=self._reader.read,
            device=self._device,
            trust_remote_code=self._config.trust_remote_code,
            seed=self._config.seed,
            world=self._world,
        )

    def restore(self, step: int) -> None:
        """Become what was saved after `step`; 0 is the student as it came."""
        if step > 0:
            self._trainer.load_checkpoint(self._layout.checkpoint(step))

    def train(self, segment: Segment) -> SegmentReport:
        """Take the segment's optimiser steps."""
        return self._trainer.train(segment)

    def publish(self, version: int) -> str:
        """Write the student (or its LoRA adapter) as snapshot `version`; returns its checksum."""
        with self._trainer.to_write() as model:
            if model is None:
                return ""
            directory = self._layout.snapshot(version)
            return publish(directory, lambda into: self._write_snapshot(into, model))

    def _write_snapshot(self, directory: Path, model: Any) -> None:
        """The student as its generator takes it."""
        generate = self._config.generate
        is_served = generate.engine != "transformers" and generate.source == "student"
        # A tied LM head is forgotten by vLLM's reload (0.32): written out, it is not.
        self._trainer.save_snapshot(directory, untie=is_served, whole=model)

    def checkpoint(self, step: int) -> None:
        """Save everything needed to go on from `step`, unless that is done."""
        directory = self._layout.checkpoint(step)
        if not self._trainer.world.decided(lambda: is_whole(directory)):
            self._trainer.save_checkpoint(directory)

    def export(self) -> str:
        """Write the final student as a Hugging Face model directory, in place of an older one."""
        student = self._layout.student
        with self._trainer.to_write() as model:
            if model is not None:
                new = student.with_name(f"{student.name}-new")
                remove(new)
                publish(new, lambda into: self._trainer.save_pretrained(into, whole=model))
                remove(student)
                with explain_write(student):
                    new.rename(student)
        return str(student)

    def evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...]) -> EvalReport | None:
        """Held-out KL and agreement on `heldout.arrow`, exact match and samples by greedy text.

        Of several ranks the first one does it, with the others' parts; they have nothing to say.
        """
        with self._trainer.whole() as model:
            return None if model is None else self._evaluate(step, prompts, model)

    def _evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...], model: Any) -> EvalReport:
        started = time.monotonic()
        match: Match | None = None
        kls: tuple[tuple[str, float], ...] = ()
        if self._layout.heldout.exists():
            heldout = read_scored(self._layout.heldout)
            with self._autocast(self._config.train.dtype):
                match = heldout_kl(model, heldout, self._config.train.row_tokens, 512)
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
        """The student's greedy responses to the prompts with answers, and to a few to show."""
        from npd.generate.sampling import Sampling
        from npd.generate.transformers import generate_with

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
        asks = [Ask(p.index, p.index, p) for p in chosen]
        with self._autocast(self._config.train.dtype), decoding(model):
            rollouts = generate_with(model, asks, sampling, with_logprobs=False)
        return [
            (p, self._chat.decode(r.response_ids)) for p, r in zip(chosen, rollouts, strict=True)
        ]

    def ready(self) -> None:
        """Nothing: the first call of a worker builds it, and that takes long enough to be seen."""

    def close(self) -> None:
        """Close the shard files and leave the other ranks."""
        self._reader.close()
        self._meeting.leave()

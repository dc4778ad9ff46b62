"""The three workers: a room's engine joined to the run directory. They hold models, decide nothing.

A task is carried out once: what a worker finds already written, whole and for the same task, it
does not make again. Results are files, written whole or not at all; only scalars are returned.
Each class is built inside its own process by the factory of the same name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npd.chat import Chat
from npd.config import RunConfig
from npd.evaluate import exact_match, heldout_kl
from npd.filters import repeat_share
from npd.modeling import resolve_device
from npd.score.base import Scorer
from npd.store.layout import RunLayout
from npd.store.shards import (
    ShardReader,
    read_rollouts,
    read_scored,
    write_rollouts,
    write_scored,
)
from npd.store.snapshots import publish, verify
from npd.types import (
    Ask,
    EncodedPrompt,
    EvalReport,
    Rollout,
    SampleStats,
    Scored,
    Segment,
    SegmentReport,
)


@dataclass(frozen=True, slots=True, eq=False)
class GenerateTask:
    """Write these samples as `shard` with snapshot `version`."""

    shard: int
    version: int
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Score these samples of `shard`, which snapshot `version` wrote."""

    shard: int
    version: int
    sample_ids: tuple[int, ...]


def generated_stats(rollout: Rollout) -> SampleStats:
    """What is known of a sample before it is scored."""
    return SampleStats(
        sample_id=rollout.sample_id,
        prompt_index=rollout.prompt_index,
        version=rollout.version,
        prompt_tokens=len(rollout.prompt_ids),
        response_tokens=len(rollout.response_ids),
        finish=rollout.finish,
        repeat=repeat_share(rollout.response_ids),
    )


def scored_stats(scored: Scored) -> SampleStats:
    """What the filters see of a scored sample."""
    base = generated_stats(scored.rollout)
    mass = np.exp(scored.topk_logprobs.astype(np.float64)).sum(axis=1).mean()
    return SampleStats(
        base.sample_id,
        base.prompt_index,
        base.version,
        base.prompt_tokens,
        base.response_tokens,
        base.finish,
        base.repeat,
        nll_teacher=scored.nll_teacher,
        nll_teacher_alone=scored.nll_teacher_alone,
        nll_student=scored.nll_student,
        nll_student_alone=scored.nll_student_alone,
        overlap=scored.overlap,
        teacher_mass=float(mass),
    )


class GeneratorWorker:
    """Writes shards of rollouts: the student's snapshots, the teacher, or the data itself."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        from npd.generate import build_generator

        chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._layout = layout
        self._is_student = config.generate.source == "student"
        self._loaded: int | None = None
        self._engine = build_generator(
            config.generate,
            stop_ids=chat.stop_ids,
            pad_id=chat.pad_id,
            vocab_size=chat.vocab_size,
            device=resolve_device(config.runtime.device),
            trust_remote_code=config.trust_remote_code,
        )
        if config.generate.source == "teacher":
            assert config.teacher is not None, "checked by the config"
            self._engine.load(Path(config.teacher), 0)

    def generate(self, task: GenerateTask) -> tuple[SampleStats, ...]:
        """Write the shard, unless it is there already; returns its samples' scalars."""
        path = self._layout.rollouts(task.shard)
        if path.exists():
            rollouts = read_rollouts(path)
        else:
            self._load(task.version)
            rollouts = self._engine.generate(task.asks)
            write_rollouts(path, rollouts)
        asked = [(ask.sample_id, task.version) for ask in task.asks]
        assert [(r.sample_id, r.version) for r in rollouts] == asked, f"{path} is another task's"
        return tuple(map(generated_stats, rollouts))

    def _load(self, version: int) -> None:
        if self._is_student and self._loaded != version:
            snapshot = self._layout.snapshot(version)
            verify(snapshot)
            self._engine.load(snapshot, version)
            self._loaded = version

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


class ScorerWorker:
    """Scores shards by the teacher and, for Δ-IFD, by the snapshot that wrote them."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config, self._layout = config, layout
        self._chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._device = resolve_device(config.runtime.device)
        self._scorer: Scorer | None = None
        self._loaded: int | None = None

    def score(self, task: ScoreTask) -> tuple[SampleStats, ...]:
        """Score the shard's chosen samples, unless that is done; returns their scalars."""
        path = self._layout.scored(task.shard)
        if path.exists():
            scored = read_scored(path)
        else:
            wanted = set(task.sample_ids)
            rollouts = read_rollouts(self._layout.rollouts(task.shard))
            chosen = [r for r in rollouts if r.sample_id in wanted]
            scored = self._ready(task.version).score(chosen)
            write_scored(path, scored)
        ids = tuple(s.rollout.sample_id for s in scored)
        assert ids == task.sample_ids, f"{path} is another task's"
        return tuple(map(scored_stats, scored))

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> int:
        """Write `heldout.arrow`: held-out responses with the teacher's support; returns tokens."""
        path = self._layout.heldout
        if not path.exists():
            rollouts = self._heldout_rollouts(prompts)
            scorer = self._build(top_k=64, ifd=False, support="topk")
            write_scored(path, scorer.score(rollouts))
            scorer.close()
        return sum(len(s.rollout.response_ids) for s in read_scored(path))

    def _heldout_rollouts(self, prompts: Sequence[EncodedPrompt]) -> list[Rollout]:
        from npd.generate import build_generator

        evaluation = self._config.eval
        source = "teacher" if evaluation.source == "teacher" else "dataset"
        generator = build_generator(
            self._config.generate.model_copy(
                update={
                    "source": source,
                    "temperature": 0.0,
                    "max_new_tokens": evaluation.max_new_tokens,
                    "batch_size": evaluation.batch_size,
                }
            ),
            stop_ids=self._chat.stop_ids,
            pad_id=self._chat.pad_id,
            vocab_size=self._chat.vocab_size,
            device=self._device,
            trust_remote_code=self._config.trust_remote_code,
        )
        assert self._config.teacher is not None, "checked by the config"
        generator.load(Path(self._config.teacher), 0)
        rollouts = generator.generate([Ask(p.index, p.index, p) for p in prompts])
        generator.close()
        return rollouts

    def _ready(self, version: int) -> Scorer:
        config = self._config
        if self._scorer is None:
            support = "sampled" if config.loss.target == "sampled" else "topk"
            self._scorer = self._build(config.score.top_k, config.needs_ifd, support)
        if (config.needs_ifd or config.needs_student_pass) and self._loaded != version:
            self._scorer.load_student(self._layout.snapshot(version), version)
            self._loaded = version
        return self._scorer

    def _build(self, top_k: int, ifd: bool, support: str) -> Scorer:
        from npd.score.base import build_scorer

        config = self._config
        assert config.teacher is not None, "checked by the config"
        return build_scorer(
            config.score.model_copy(update={"top_k": top_k}),
            teacher=config.teacher,
            vocab_size=self._chat.vocab_size,
            needs_ifd=ifd,
            needs_student_pass=ifd and config.needs_student_pass,
            support="sampled" if support == "sampled" else "topk",
            device=self._device,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )

    def close(self) -> None:
        """Let go of the models."""
        if self._scorer is not None:
            self._scorer.close()


class TrainerWorker:
    """Trains segments, publishes snapshots, saves checkpoints, evaluates."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        from npd.train.trainer import Trainer

        self._config, self._layout = config, layout
        if config.needs_scores:
            scored = ShardReader(layout.scored, "scored")
            self._reader, read = scored, scored.scored
        else:
            self._reader = ShardReader(layout.rollouts, "rollouts")
            read = self._reader.rollout
        self._chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._trainer = Trainer(
            config.train,
            config.loss,
            student=config.student,
            read=read,
            device=resolve_device(config.runtime.device),
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )

    def restore(self, step: int) -> None:
        """Become what was saved after `step`; 0 is the student as it came."""
        if step > 0:
            self._trainer.load_checkpoint(self._layout.checkpoint(step))

    def train(self, segment: Segment) -> SegmentReport:
        """Take the segment's optimiser steps."""
        return self._trainer.train(segment)

    def publish(self, version: int) -> str:
        """Write the student as snapshot `version`; returns its checksum."""
        return publish(self._layout.snapshot(version), self._trainer.save_pretrained)

    def checkpoint(self, step: int) -> None:
        """Save everything needed to go on from `step`."""
        self._trainer.save_checkpoint(self._layout.checkpoint(step))

    def export(self) -> str:
        """Write the final student as a Hugging Face model directory."""
        publish(self._layout.student, self._trainer.save_pretrained)
        return str(self._layout.student)

    def evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...]) -> EvalReport:
        """Held-out KL and agreement on `heldout.arrow`, exact match and samples by greedy text."""
        started = time.monotonic()
        kl = agreement = None
        tokens = 0
        if self._layout.heldout.exists():
            heldout = read_scored(self._layout.heldout)
            with self._autocast():
                kl, agreement, _, tokens = heldout_kl(
                    self._trainer.model, heldout, self._config.train.row_tokens, 512
                )
        texts = self._greedy(prompts)
        pairs = [(text, prompt.answer) for prompt, text in texts if prompt.answer is not None]
        shown = texts[: self._config.eval.num_samples]
        return EvalReport(
            step=step,
            kl=kl,
            agreement=agreement,
            exact_match=exact_match(pairs) if pairs else None,
            num_prompts=len(prompts),
            num_tokens=tokens,
            seconds=time.monotonic() - started,
            samples=tuple((self._chat.decode(p.prompt_ids), text) for p, text in shown),
        )

    def _autocast(self) -> AbstractContextManager[object]:
        import torch

        is_bf16 = self._config.train.dtype == "bfloat16"
        return torch.autocast(self._trainer.device, torch.bfloat16, enabled=is_bf16)

    def _greedy(self, prompts: Sequence[EncodedPrompt]) -> list[tuple[EncodedPrompt, str]]:
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
        with self._autocast(), self._trainer.decoding() as model:
            rollouts = generate_with(model, asks, sampling, with_logprobs=False)
        return [
            (p, self._chat.decode(r.response_ids)) for p, r in zip(chosen, rollouts, strict=True)
        ]

    def close(self) -> None:
        """Close the shard files."""
        self._reader.close()


@dataclass(frozen=True, slots=True)
class Factory:
    """Builds one worker inside its process; `role` is generator, scorer or trainer."""

    role: str
    config: RunConfig
    root: Path

    def __call__(self) -> GeneratorWorker | ScorerWorker | TrainerWorker:
        """The worker, its models loaded."""
        kinds = {"generator": GeneratorWorker, "scorer": ScorerWorker, "trainer": TrainerWorker}
        return kinds[self.role](self.config, RunLayout(self.root))

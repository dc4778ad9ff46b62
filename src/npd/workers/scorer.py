"""The scorer: the teachers' word on shards, and the held-out text of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from npd.chat import Chat
from npd.config import RunConfig
from npd.errors import RunError
from npd.modeling import resolve_device
from npd.names import DEFAULT_TEACHER
from npd.score.base import Scorer, Support
from npd.score.together import Leaders
from npd.servers.limits import HELDOUT_TOP_K
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, read_scored, write_scored
from npd.store.snapshots import verify
from npd.types import EncodedPrompt, Failed, Rollout, Scored
from npd.workers.heldout import heldout_rollouts
from npd.workers.tasks import HeldoutResult, ScoreTask, ShardResult, scored_stats


class ScorerWorker:
    """Scores shards by each prompt's teacher and, for Δ-IFD, by the snapshot that wrote them."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        *,
        held: Leaders | None = None,
    ) -> None:
        """With `held` teachers in process are not loaded here alone: `held` has them."""
        from npd.score import open_teachers

        self._config, self._layout, self._held = config, layout, held
        self._hold = None if held is None else held.hold
        self._chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._device = resolve_device(config.runtime.device)
        self._scorer: Scorer | None = None
        self._loaded: int | None = None
        self._notes: list[str] = []
        self._teachers = open_teachers(
            config,
            self._chat.vocab_size,
            device=self._device,
            log=self._log_of,
            widest=HELDOUT_TOP_K,
            tell=self._notes.append,
            hold=self._hold,
        )

    @property
    def chat(self) -> Chat:
        """The chat format that teacher and student share."""
        return self._chat

    def score(self, task: ScoreTask) -> ShardResult:
        """Score the shard's chosen samples, unless that is done; returns their scalars."""
        path = self._layout.scored(task.shard)
        there = read_scored(path) if path.exists() else []
        failed: tuple[Failed, ...] = ()
        rollouts = self._chosen(task)
        known = {record.rollout.sample_id: record for record in there}
        if _ids(there) != task.sample_ids or not all(_is_of(known, r) for r in rollouts):
            found = self._completed(there, rollouts)
            failed = tuple(item for item in found if isinstance(item, Failed))
            records = [item for item in found if isinstance(item, Scored)]
            # Records are equal where they are the same one: rounding them again is not free.
            if records != there or not path.exists():
                write_scored(path, records)
        # Read back, because stored log-probs are rounded: the same answer now and after a crash.
        scored = read_scored(path)
        refused = {item.sample_id for item in failed}
        wanted = tuple(i for i in task.sample_ids if i not in refused)
        assert _ids(scored) == wanted, f"{path} lacks samples of its task"
        return ShardResult(tuple(map(scored_stats, scored)), failed, self._take_notes())

    def _chosen(self, task: ScoreTask) -> list[Rollout]:
        wanted = set(task.sample_ids)
        rollouts = read_rollouts(self._layout.rollouts(task.shard))
        return [rollout for rollout in rollouts if rollout.sample_id in wanted]

    def _completed(
        self, there: Sequence[Scored], rollouts: Sequence[Rollout]
    ) -> list[Scored | Failed]:
        """Scores of all rollouts: those there already, and the others asked for (again)."""
        known = {record.rollout.sample_id: record for record in there}
        kept = {r.sample_id: known[r.sample_id] for r in rollouts if _is_of(known, r)}
        found = iter(self._scored([r for r in rollouts if r.sample_id not in kept]))
        return [kept.get(r.sample_id) or next(found) for r in rollouts]

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Scored | Failed]:
        """Scores, the student's side by the snapshot that wrote each (two, around a refresh)."""
        by_id: dict[int, Scored | Failed] = {}
        for version in sorted({rollout.version for rollout in rollouts}):
            group = [rollout for rollout in rollouts if rollout.version == version]
            found = self._scorer_for(version).score(group)
            by_id |= {r.sample_id: item for r, item in zip(group, found, strict=True)}
        return [by_id[rollout.sample_id] for rollout in rollouts]

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> HeldoutResult:
        """Write `heldout.arrow`: held-out responses with their teachers' support.

        Raises:
            RunError: a teacher's server has no answer to a prompt, or for a response.
        """
        path, teachers = self._layout.heldout, self._teachers
        if not path.exists():
            rollouts = heldout_rollouts(
                self._config, self._chat, prompts, self._device, teachers.served, self._hold
            )
            widest = teachers.widest({p.teacher for p in prompts}, HELDOUT_TOP_K)
            scorer = self._build(widest, "topk", is_for_filter=False)
            write_scored(path, _whole(scorer.score(rollouts)))
            scorer.close()
            if not self._config.needs_scores:
                self._unload()  # nothing else is read
        num_tokens = sum(len(s.rollout.response_ids) for s in read_scored(path))
        return HeldoutResult(num_tokens, self._take_notes())

    def _unload(self) -> None:
        self._teachers.unload()
        if self._held is not None:
            self._held.unload()

    def _take_notes(self) -> tuple[str, ...]:
        """What is to be told and was not yet."""
        notes, self._notes[:] = tuple(self._notes), []
        return notes

    def _scorer_for(self, version: int) -> Scorer:
        config = self._config
        if self._scorer is None:
            support: Support = "sampled" if config.loss.target == "sampled" else "topk"
            self._scorer = self._build(config.score.top_k, support, is_for_filter=True)
        if (config.needs_ifd or config.needs_student_pass) and self._loaded != version:
            verify(self._layout.snapshot(version))
            self._scorer.load_student(self._layout.snapshot(version), version)
            self._loaded = version
        return self._scorer

    def _build(self, top_k: int, support: Support, *, is_for_filter: bool) -> Scorer:
        from npd.score import build_scorer

        config = self._config
        return build_scorer(
            config.score.model_copy(update={"top_k": top_k}),
            teacher=self._teachers,
            vocab_size=self._chat.vocab_size,
            needs_ifd=is_for_filter and config.needs_ifd,
            needs_student_pass=is_for_filter and config.needs_student_pass,
            support=support,
            device=self._device,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )

    def _log_of(self, teacher: str) -> Path:
        name = "" if teacher == DEFAULT_TEACHER else f"-{teacher}"
        return self._layout.logs / f"server-{self._config.score.engine}-teacher{name}.log"

    def ready(self) -> None:
        """Nothing: the first call of a worker builds it, and that takes long enough to be seen."""

    def close(self) -> None:
        """Let go of the models, and of the teachers' servers."""
        if self._scorer is not None:
            self._scorer.close()
        self._teachers.close()


def _is_of(known: Mapping[int, Scored], rollout: Rollout) -> bool:
    """Whether there is a score of this very rollout, and not of another one of its id."""
    record = known.get(rollout.sample_id)
    if record is None or record.rollout.version != rollout.version:
        return False
    return np.array_equal(record.rollout.response_ids, rollout.response_ids)


def _whole(found: Sequence[Scored | Failed]) -> list[Scored]:
    """All of held-out text: what is measured on a part of it is another measure."""
    for item in found:
        if isinstance(item, Failed):
            raise RunError(f"no score of held-out sample {item.sample_id}: {item.reason}")
    return [item for item in found if isinstance(item, Scored)]


def _ids(scored: Sequence[Scored]) -> tuple[int, ...]:
    return tuple(record.rollout.sample_id for record in scored)

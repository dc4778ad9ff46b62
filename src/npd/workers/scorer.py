"""The scorer: teacher's word on shards, and the held-out text of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npd.chat import Chat
from npd.config import RunConfig
from npd.modeling import resolve_device
from npd.score.base import Scorer, Support
from npd.servers.limits import HELDOUT_TOP_K
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, read_scored, write_scored
from npd.types import EncodedPrompt, Rollout, SampleStats, Scored
from npd.workers.heldout import heldout_rollouts
from npd.workers.tasks import ScoreTask, scored_stats

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher


class ScorerWorker:
    """Scores shards by the teacher and, for Δ-IFD, by the snapshot that wrote them."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config, self._layout = config, layout
        self._chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
        self._device = resolve_device(config.runtime.device)
        self._scorer: Scorer | None = None
        self._teacher: ServedTeacher | None = None
        self._loaded: int | None = None

    def score(self, task: ScoreTask) -> tuple[SampleStats, ...]:
        """Score the shard's chosen samples, unless that is done; returns their scalars."""
        path = self._layout.scored(task.shard)
        if not path.exists() or _ids(read_scored(path)) != task.sample_ids:
            wanted = set(task.sample_ids)
            rollouts = read_rollouts(self._layout.rollouts(task.shard))
            chosen = [r for r in rollouts if r.sample_id in wanted]
            write_scored(path, self._scored(chosen))
        # Read back, because stored log-probs are rounded: the same answer now and after a crash.
        scored = read_scored(path)
        assert _ids(scored) == task.sample_ids, f"{path} lacks samples of its task"
        return tuple(map(scored_stats, scored))

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Scores, the student's side by the snapshot that wrote each (two, around a refresh)."""
        by_id: dict[int, Scored] = {}
        for version in sorted({rollout.version for rollout in rollouts}):
            group = [rollout for rollout in rollouts if rollout.version == version]
            for scored in self._scorer_for(version).score(group):
                by_id[scored.rollout.sample_id] = scored
        return [by_id[rollout.sample_id] for rollout in rollouts]

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> int:
        """Write `heldout.arrow`: held-out responses with the teacher's support; returns tokens."""
        path = self._layout.heldout
        if not path.exists():
            served = self._served()
            rollouts = heldout_rollouts(self._config, self._chat, prompts, self._device, served)
            widest = HELDOUT_TOP_K if served is None else served.max_k
            scorer = self._build(widest, "topk", is_for_filter=False)
            write_scored(path, scorer.score(rollouts))
            scorer.close()
        return sum(len(s.rollout.response_ids) for s in read_scored(path))

    def _scorer_for(self, version: int) -> Scorer:
        config = self._config
        if self._scorer is None:
            support: Support = "sampled" if config.loss.target == "sampled" else "topk"
            self._scorer = self._build(config.score.top_k, support, is_for_filter=True)
        if (config.needs_ifd or config.needs_student_pass) and self._loaded != version:
            self._scorer.load_student(self._layout.snapshot(version), version)
            self._loaded = version
        return self._scorer

    def _build(self, top_k: int, support: Support, *, is_for_filter: bool) -> Scorer:
        from npd.score import build_scorer

        config = self._config
        assert config.teacher is not None, "checked by the config"
        return build_scorer(
            config.score.model_copy(update={"top_k": top_k}),
            teacher=config.teacher,
            vocab_size=self._chat.vocab_size,
            needs_ifd=is_for_filter and config.needs_ifd,
            needs_student_pass=is_for_filter and config.needs_student_pass,
            support=support,
            device=self._device,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
            served=self._served(),
        )

    def _served(self) -> ServedTeacher | None:
        """The teacher on its servers, one connection for all that is read and written; or None."""
        if self._teacher is None:
            from npd.score import open_teacher

            log = self._layout.logs / f"server-{self._config.score.engine}-teacher.log"
            vocab_size = self._chat.vocab_size
            self._teacher = open_teacher(self._config, vocab_size, log, widest=HELDOUT_TOP_K)
        return self._teacher

    def ready(self) -> None:
        """Nothing: the first call of a worker builds it, and that takes long enough to be seen."""

    def close(self) -> None:
        """Let go of the models, and of the teacher's server."""
        if self._scorer is not None:
            self._scorer.close()
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None


def _ids(scored: Sequence[Scored]) -> tuple[int, ...]:
    return tuple(record.rollout.sample_id for record in scored)

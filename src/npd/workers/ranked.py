"""A scorer of several ranks: the first one scores, the others hold the teacher with it.

Whatever is called is called on every rank at once. Only the first reads and writes files, holds the
student's snapshot (a small model, which more ranks would not make faster), and answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npd.chat import Chat
from npd.config import RunConfig
from npd.errors import NpdError
from npd.generate.sampling import Sampling
from npd.generate.transformers import generate_with
from npd.modeling import decoding, load_model, resolve_device
from npd.score.base import Document, Key, Reading
from npd.score.prefill import PrefillReader
from npd.score.together import Follower, Leaders, Order
from npd.store.layout import RunLayout
from npd.types import Ask, EncodedPrompt, Rollout
from npd.workers.scorer import ScorerWorker
from npd.workers.tasks import HeldoutResult, ScoreTask, ShardResult
from npd.workers.writers import stop_ids
from npd.world import Meeting, World


class ScorerRank:
    """One of the `score.ranks` processes of a scorer; `join` comes before everything else."""

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config = config
        self._world = World()
        self._meeting = Meeting(
            config.score.ranks,
            device=resolve_device(config.runtime.device),
            call_timeout=config.runtime.call_timeout,
            setting="score.ranks",
        )
        self._scorer = ScorerWorker(config, layout, held=Leaders(self._load, self._tell))
        self._follower = Follower(self._load, self._tell)

    def host(self) -> str:
        """Open a place where ranks of other machines can join this one, the first."""
        return self._meeting.host()

    def join(self, rank: int, place: str) -> None:
        """Become rank `rank`; they meet at a new file, or where the first one hosts.

        Raises:
            ConfigError: a rank has no GPU of its own.
        """
        self._world = self._meeting.join(rank, place)

    def score(self, task: ScoreTask) -> ShardResult | None:
        """Score the shard's chosen samples; what the first rank finds."""
        found: ShardResult | None = self._together("score", task)
        return found

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> HeldoutResult | None:
        """Write `heldout.arrow`; what the first rank finds."""
        found: HeldoutResult | None = self._together("prepare_heldout", prompts)
        return found

    def ready(self) -> None:
        """Nothing; see `ScorerWorker`."""

    def close(self) -> None:
        """Let go of the models and leave the other ranks."""
        self._scorer.close()
        self._meeting.leave()

    def _together(self, method: str, *args: Any) -> Any:
        if not self._world.is_first:
            self._follower.follow()
            return None
        try:
            found = getattr(self._scorer, method)(*args)
        except NpdError:
            self._tell(None)
            raise
        # Of any other error the others hear by losing this rank: they may be waiting in a layer.
        self._tell(None)
        return found

    def _tell(self, order: Order | None) -> Order | None:
        return self._world.decided(lambda: order)

    def _load(self, name: str) -> PartOfTeacher:
        return PartOfTeacher(self._config, self._scorer.chat, name, self._world)


class PartOfTeacher:
    """A teacher of which this rank holds a part: all ranks must ask the same of it.

    It reads in `score.dtype` and writes in `generate.dtype`, as one process would: loaded as it is
    first asked, and anew where the other type is, because two copies might not fit.
    """

    def __init__(self, config: RunConfig, chat: Chat, name: str, world: World) -> None:
        self._config, self._world = config, world
        self._path = config.teacher_models[name]
        self._vocab_size = chat.vocab_size
        self._model: Any = None
        self._dtype: str | None = None
        self._sampling = Sampling(
            max_new_tokens=config.eval.max_new_tokens,
            stop_ids=world.agreed(lambda: stop_ids(config, chat, name)),
            pad_id=chat.pad_id,
            temperature=0.0,
            top_p=1.0,
            batch_size=config.eval.batch_size,
            vocab_size=chat.vocab_size,
        )

    def read(self, documents: Mapping[Key, Document]) -> dict[Key, Reading]:
        """A reading of each document, under its key."""
        score = self._config.score
        model = self._in(score.dtype)
        return PrefillReader(model, self._path, self._vocab_size, score).read(documents)

    def write(self, asks: Sequence[Ask]) -> list[Rollout]:
        """A greedy response to each: held-out text."""
        with decoding(self._in(self._config.generate.dtype)) as model:
            return generate_with(model, asks, self._sampling, with_logprobs=False)

    def _in(self, dtype: str) -> Any:
        if dtype != self._dtype:
            self._model = self._dtype = None
            self._model = load_model(
                self._path,
                dtype=dtype,
                device=resolve_device(self._config.runtime.device),
                trust_remote_code=self._config.trust_remote_code,
                world=self._world,
            )
            self._dtype = dtype
        return self._model

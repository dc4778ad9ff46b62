"""The scorer worker: scores shards, and prepares the held-out responses of a run.

`ScorerWorker` is a complete scorer. With `score.ranks` each process is a `ScorerRank`: rank 0 runs
a `ScorerWorker`, and the other ranks run their `TeacherShard` on its commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from npd.config import RunConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.engines import EngineServer, Unavailable
from npd.engines.base import SamplingSettings
from npd.engines.capabilities import HELDOUT_TOP_K
from npd.errors import NpdError, RunError
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.models.device import free_cached, resolve_device
from npd.models.distributed import DistContext, Rendezvous
from npd.models.loading import decoding, load_model
from npd.score.base import Key, LogprobRequest, Logprobs, Scorer, Support
from npd.score.in_process import PrefillModel
from npd.score.tensor_parallel import Command, RankZeroTeachers, TeacherReplica
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts, read_scored, write_scored
from npd.store.snapshots import verify
from npd.types import (
    DEFAULT_TEACHER,
    EncodedPrompt,
    Failed,
    FinishReason,
    Rollout,
    SampleRequest,
    Scored,
    role_of,
)
from npd.workers.generator import stop_ids
from npd.workers.tasks import HeldoutResult, ScoreTask, ShardResult, scored_stats

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher
    from npd.score.tensor_parallel import Teacher


class ScorerWorker:
    """Scores shards by each prompt's teacher and, for Δ-IFD, by the snapshot that wrote them."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        *,
        rank_teachers: RankZeroTeachers | None = None,
    ) -> None:
        """With `rank_teachers`, all ranks of the scorer load teachers in process together."""
        from npd.score import open_teachers

        self._config, self._layout, self._rank_teachers = config, layout, rank_teachers
        self._get_teacher = None if rank_teachers is None else rank_teachers.get
        self._chat = ChatTokenizer.of_student(config)
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
            notify=self._notes.append,
            get_teacher=self._get_teacher,
        )

    @property
    def chat(self) -> ChatTokenizer:
        """The chat format that teacher and student share."""
        return self._chat

    def score(self, task: ScoreTask) -> ShardResult:
        """Score the task's samples unless they are already scored; returns their scalars."""
        path = self._layout.scored(task.shard)
        there = read_scored(path) if path.exists() else []
        failed: tuple[Failed, ...] = ()
        rollouts = self._chosen(task)
        known = {record.rollout.sample_id: record for record in there}
        if _ids(there) != task.sample_ids or not all(_is_of(known, r) for r in rollouts):
            found = self._completed(there, rollouts)
            failed = tuple(item for item in found if isinstance(item, Failed))
            records = [item for item in found if isinstance(item, Scored)]
            # All records were reused; writing them again would round them again.
            if records != there or not path.exists():
                write_scored(path, records)
        # Stored log-probs are rounded. Reading them back gives the same result as after a crash.
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
        """Scores of all rollouts: stored ones are reused, the others computed."""
        known = {record.rollout.sample_id: record for record in there}
        kept = {r.sample_id: known[r.sample_id] for r in rollouts if _is_of(known, r)}
        found = iter(self._scored([r for r in rollouts if r.sample_id not in kept]))
        return [kept.get(r.sample_id) or next(found) for r in rollouts]

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Scored | Failed]:
        """Score each rollout with the snapshot that generated it; a refresh makes it two."""
        by_id: dict[int, Scored | Failed] = {}
        for version in sorted({rollout.version for rollout in rollouts}):
            group = [rollout for rollout in rollouts if rollout.version == version]
            found = self._scorer_for(version).score(group)
            by_id |= {r.sample_id: item for r, item in zip(group, found, strict=True)}
        return [by_id[rollout.sample_id] for rollout in rollouts]

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> HeldoutResult:
        """Write `heldout.arrow`: held-out responses with their teachers' support.

        Raises:
            RunError: a teacher's server failed to generate or to score a response.
        """
        path, teachers = self._layout.heldout, self._teachers
        if not path.exists():
            rollouts = heldout_rollouts(
                self._config, self._chat, prompts, self._device, teachers.served, self._get_teacher
            )
            widest = teachers.widest({p.teacher for p in prompts}, HELDOUT_TOP_K)
            scorer = self._build(widest, "topk", is_for_filter=False)
            write_scored(path, _whole(scorer.score(rollouts)))
            scorer.close()
            if not self._config.needs_scores:
                self._unload()  # in-process teachers are not needed for the run itself
            free_cached()
        num_tokens = sum(len(s.rollout.response_ids) for s in read_scored(path))
        return HeldoutResult(num_tokens, self._take_notes())

    def _unload(self) -> None:
        self._teachers.unload()
        if self._rank_teachers is not None:
            self._rank_teachers.unload()

    def _take_notes(self) -> tuple[str, ...]:
        """The notes since the last call."""
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

    def release(self) -> None:
        """Free the models for other workers on the device; the next call loads what it needs."""
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = self._loaded = None
        self._teachers.release()
        free_cached()

    def ready(self) -> None:
        """No-op. The first call constructs the worker; loading gets its own span in traces."""

    def close(self) -> None:
        """Free the models and stop the teachers' servers."""
        if self._scorer is not None:
            self._scorer.close()
        self._teachers.close()


def _is_of(known: Mapping[int, Scored], rollout: Rollout) -> bool:
    """Whether `known` has a score of this rollout, not of an older one with the same id."""
    record = known.get(rollout.sample_id)
    if record is None or record.rollout.version != rollout.version:
        return False
    return np.array_equal(record.rollout.response_ids, rollout.response_ids)


def _whole(found: Sequence[Scored | Failed]) -> list[Scored]:
    """All held-out scores, without exception, so that evaluations stay comparable."""
    for item in found:
        if isinstance(item, Failed):
            raise RunError(f"no score of held-out sample {item.sample_id}: {item.reason}")
    return [item for item in found if isinstance(item, Scored)]


def _ids(scored: Sequence[Scored]) -> tuple[int, ...]:
    return tuple(record.rollout.sample_id for record in scored)


def heldout_rollouts(
    config: RunConfig,
    chat: ChatTokenizer,
    prompts: Sequence[EncodedPrompt],
    device: str,
    served: Callable[[str], ServedTeacher | None],
    get_teacher: Callable[[str], Teacher] | None = None,
) -> list[Rollout]:
    """The held-out responses: the data's own completions, or the teachers' greedy text.

    They are in the order of the prompts; a prompt without a completion has none. Each teacher
    responds to its own prompts: on its servers (`served`), together with other ranks
    (`get_teacher`), or loaded for this call, one teacher after the other.

    Raises:
        RunError: a server failed to respond to a prompt.
    """
    requests = [SampleRequest(prompt.index, prompt.index, prompt) for prompt in prompts]
    if config.eval.source != "teacher":
        return _in_process(config, chat, requests, device, None)
    found: dict[int, Rollout] = {}
    for name in sorted({prompt.teacher for prompt in prompts}):
        own = [request for request in requests if request.prompt.teacher == name]
        servers = served(name)
        if servers is None and get_teacher is not None:
            written = list(get_teacher(name).write(own))
        elif servers is None:
            written = _in_process(config, chat, own, device, name)
        else:
            written = _by_server(config, chat, own, servers, name)
        found |= {rollout.sample_id: rollout for rollout in written}
    return [found[request.sample_id] for request in requests if request.sample_id in found]


def _in_process(
    config: RunConfig,
    chat: ChatTokenizer,
    requests: Sequence[SampleRequest],
    device: str,
    teacher: str | None,
) -> list[Rollout]:
    """Responses of a teacher loaded for this call; with None, the data's own completions."""
    from npd.generate import build_generator

    source: Literal["teacher", "dataset"] = "dataset" if teacher is None else "teacher"
    # In process, even if the run's samples are generated on servers.
    section = type(config.generate)(
        source=source,
        temperature=0.0,
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
        dtype=config.generate.dtype,
    )
    generator = build_generator(
        section,
        stop_ids=stop_ids(config, chat, teacher),
        pad_id=chat.pad_id,
        vocab_size=chat.vocab_size,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    with closing(generator):
        if teacher is not None:
            generator.load(Path(config.teacher_models[teacher]), 0)
        found = generator.generate(requests)
    return [rollout for rollout in found if isinstance(rollout, Rollout)]


def _by_server(
    config: RunConfig,
    chat: ChatTokenizer,
    requests: Sequence[SampleRequest],
    served: ServedTeacher,
    teacher: str,
) -> list[Rollout]:
    first_padding = chat.vocab_size
    sampling = SamplingSettings(
        config.eval.max_new_tokens,
        tuple(sorted(stop_ids(config, chat, teacher))),
        temperature=0.0,
        banned_ids=tuple(range(first_padding, first_padding + served.num_padding_ids)),
    )

    async def write(server: EngineServer, request: SampleRequest) -> Rollout:
        prompt = request.prompt
        # Greedy, so without a seed.
        written = await server.complete(prompt.prompt_ids.tolist(), sampling, seed=None, model=None)
        if written.ending == "abort" or not len(written.ids):
            raise Unavailable(server.name, "aborts held-out responses: does another run pause it?")
        return Rollout(
            sample_id=request.sample_id,
            prompt_index=prompt.index,
            version=0,
            prompt_ids=prompt.prompt_ids,
            header_ids=prompt.header_ids,
            response_ids=written.ids,
            logprobs=None,
            finish=FinishReason.STOP if written.ending == "stop" else FinishReason.LENGTH,
            seed=request.seed,
            teacher=prompt.teacher,
        )

    rollouts = []
    for request, found in zip(
        requests, served.run_jobs(requests, write, at_once=config.eval.batch_size), strict=True
    ):
        if isinstance(found, RunError):
            prompt = request.sample_id  # held-out samples are numbered as their prompts
            raise RunError(f"no held-out response to prompt {prompt}: {found}") from found
        rollouts.append(found)
    return rollouts


class ScorerRank:
    """One of the `score.ranks` processes of a scorer; `join` must be called first.

    Every call goes to all ranks at once. Only rank 0 reads and writes files, returns results, and
    loads the student's snapshot (a small model, which more ranks would not make faster).
    """

    def __init__(self, config: RunConfig, layout: RunLayout) -> None:
        self._config = config
        self._dist = DistContext()
        self._rendezvous = Rendezvous(
            config.score.ranks,
            device=resolve_device(config.runtime.device),
            call_timeout=config.runtime.call_timeout,
            setting="score.ranks",
        )
        self._scorer = ScorerWorker(
            config, layout, rank_teachers=RankZeroTeachers(self._load, self._broadcast)
        )
        self._follower = TeacherReplica(self._load, self._broadcast)

    def open_rendezvous(self) -> str:
        """Open a rendezvous on this rank, which is rank 0, for ranks on other machines."""
        return self._rendezvous.open()

    def join(self, rank: int, address: str) -> None:
        """Become rank `rank` of the scorer; `address` as in `npd.models.distributed.connect`.

        Raises:
            ConfigError: a rank has no GPU.
        """
        self._dist = self._rendezvous.join(rank, address)

    def score(self, task: ScoreTask) -> ShardResult | None:
        """Score the task's samples; the first rank returns the result, the others None."""
        found: ShardResult | None = self._together("score", task)
        return found

    def prepare_heldout(self, prompts: tuple[EncodedPrompt, ...]) -> HeldoutResult | None:
        """Write `heldout.arrow`; the first rank returns the result, the others None."""
        found: HeldoutResult | None = self._together("prepare_heldout", prompts)
        return found

    def ready(self) -> None:
        """No-op; see `ScorerWorker`."""

    def close(self) -> None:
        """Free the models and leave the process group."""
        self._scorer.close()
        self._rendezvous.leave()

    def _together(self, method: str, *args: Any) -> Any:
        if not self._dist.is_first:
            self._follower.follow()
            return None
        try:
            found = getattr(self._scorer, method)(*args)
        except NpdError:
            self._broadcast(None)
            raise
        # Any other error ends this rank, because other ranks may wait for it in a collective.
        self._broadcast(None)
        return found

    def _broadcast(self, command: Command | None) -> Command | None:
        return self._dist.from_rank0(lambda: command)

    def _load(self, name: str) -> TeacherShard:
        return TeacherShard(self._config, self._scorer.chat, name, self._dist)


class TeacherShard:
    """This rank's part of a teacher. All ranks must make the same calls.

    It scores in `score.dtype` and generates in `generate.dtype`, like a teacher in one process. It
    is loaded at its first use, and reloaded for the other dtype, because two copies might not fit.
    """

    def __init__(
        self, config: RunConfig, chat: ChatTokenizer, name: str, dist: DistContext
    ) -> None:
        self._config, self._dist = config, dist
        self._path, self._role = config.teacher_models[name], role_of(name)
        self._vocab_size = chat.vocab_size
        self._model: Any = None
        self._dtype: str | None = None
        self._sampling = Sampling(
            max_new_tokens=config.eval.max_new_tokens,
            stop_ids=dist.all_or_raise(lambda: stop_ids(config, chat, name)),
            pad_id=chat.pad_id,
            temperature=0.0,
            top_p=1.0,
            batch_size=config.eval.batch_size,
            vocab_size=chat.vocab_size,
        )

    def read(self, documents: Mapping[Key, LogprobRequest]) -> dict[Key, Logprobs]:
        """The log-probs of each document, under its key."""
        score = self._config.score
        model = self._in(score.dtype)
        return PrefillModel(model, self._path, self._vocab_size, score).read(documents)

    def write(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """A greedy response to each request (held-out text)."""
        with decoding(self._in(self._config.generate.dtype)) as model:
            return generate_with(model, requests, self._sampling, with_logprobs=False)

    def _in(self, dtype: str) -> Any:
        if dtype != self._dtype:
            self._model = self._dtype = None
            self._model = load_model(
                self._path,
                role=self._role,
                dtype=dtype,
                device=resolve_device(self._config.runtime.device),
                trust_remote_code=self._config.trust_remote_code,
                dist=self._dist,
            )
            self._dtype = dtype
        return self._model

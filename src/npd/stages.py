"""Single stages that read and write files: generate, score, train. They share a run's engines.

They are for inspecting a stage and for custom pipelines. There is no ledger, so an interrupted
stage starts from the beginning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from npd.config import RunConfig
from npd.config.paths import why_unmakeable, why_unreadable
from npd.control.devices.defaults import with_defaults
from npd.control.model_checks import check_model
from npd.control.preflight import device_here, prepare
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.inputs import RunInputs, check_names, for_workers
from npd.data.vocabulary import compare_ends
from npd.errors import ConfigError, DataError, InputError, RunError, StoreError
from npd.filters import build_filter, prefilter
from npd.models.device import resolve_device, use
from npd.models.loading import read_config
from npd.schedule.plan import make_step
from npd.schedule.replay_buffer import ReplayBuffer
from npd.schedule.requests import hash64, make_requests
from npd.store.shards import (
    Kind,
    read_rollouts,
    read_scored,
    verify_shard,
    write_rollouts,
    write_scored,
)
from npd.text import counted, shown_path
from npd.types import (
    DEFAULT_TEACHER,
    Failed,
    Rollout,
    SampleRef,
    SampleRequest,
    SampleStats,
    Scored,
    Segment,
    Step,
    role_of,
)
from npd.workers import generated_stats, scored_stats
from npd.workers.generator import generator_for

if TYPE_CHECKING:
    from npd.generate.served import ServingContext


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a stage: the number of records in its file, and the failed samples."""

    num_records: int
    failed: tuple[Failed, ...] = ()


def generate(
    config: RunConfig,
    out: Path,
    *,
    snapshot: str | None = None,
    notify: Callable[[str], None] = _log.info,
) -> Made:
    """Generate `samples_per_prompt` rollouts for every training prompt, and write them to `out`.

    `snapshot`: a model directory that generates in place of the config's model. `notify` receives
    messages for the user, e.g. which weights a server was verified to hold.

    Raises:
        InputError: config, data, model or `out` cannot be used.
        RunError: no sample could be generated.
    """
    _check_new(out)
    if snapshot is not None:
        check_model("--snapshot", snapshot, config)
    prepared = prepare(config)
    for note in (*prepared.notes, *prepared.remarks):
        notify(note)
    config = for_workers(config, prepared)
    _device(config)
    chat = ChatTokenizer.of_student(config)
    is_teacher = config.generate.source == "teacher"
    model = snapshot or (None if is_teacher else config.student)
    engine = generator_for(
        config, chat, partial(_serving_context, config, out, notify), model=model
    )
    with closing(engine):
        found = engine.generate(_requests(config, prepared))
    rollouts = [rollout for rollout in found if isinstance(rollout, Rollout)]
    failed = _failed(found, "generated", num_made=len(rollouts))
    write_rollouts(out, rollouts)
    return Made(len(rollouts), failed)


def score(
    config: RunConfig,
    rollouts: Path,
    out: Path,
    *,
    snapshot: str | None = None,
    notify: Callable[[str], None] = _log.info,
) -> Made:
    """Score the rollouts of a file that pass the pre-filters.

    `snapshot`: the model directory that generated them, default the student. `notify` and errors
    are as in `generate`.
    """
    from npd.score import build_scorer, open_teachers

    config = with_defaults(config, alone="scorer")
    _check_new(out)
    if not config.teacher_models:
        raise ConfigError("npd score needs a teacher: set `teacher` in the config or with --set")
    device = _device(config)
    student = snapshot or config.student
    check_model("--snapshot" if snapshot else "student", student, config)
    found = _read(rollouts, "rollouts", "--rollouts", "npd generate")
    named = [(f"{rollouts}: sample {r.sample_id}", r.teacher) for r in found]
    for name in sorted(check_names(named, config)):
        check_model(role_of(name), config.teacher_models[name], config)
    chat = ChatTokenizer.of_student(config)
    if config.needs_ifd:
        chat.check_alone(f"filter.name {config.filter.name}")
    kept = [r for r in found if prefilter(generated_stats(r), config.filter).keep]
    log = partial(_server_log, out)
    teachers = open_teachers(config, chat.vocab_size, device=device, log=log, notify=notify)
    with closing(teachers):
        scorer = build_scorer(
            config.score,
            teacher=teachers,
            vocab_size=chat.vocab_size,
            needs_ifd=config.needs_ifd,
            needs_student_pass=config.needs_student_pass,
            support="sampled" if config.loss.target == "sampled" else "topk",
            device=device,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )
        if config.needs_ifd or config.needs_student_pass:
            scorer.load_student(Path(student), 0)
        records = scorer.score(kept)
    scored = [item for item in records if isinstance(item, Scored)]
    failed = _failed(records, "scored", num_made=len(scored))
    write_scored(out, scored)
    return Made(len(scored), failed)


def train(config: RunConfig, data: Path, out: Path) -> Iterator[str]:
    """Filter, pack and train on a file; writes a model directory. Yields progress lines."""
    from npd.train.trainer import Trainer

    device = _device(config)
    config = with_defaults(config, alone="trainer")
    _check_new(out)
    check_model("student", config.student, config)
    samples: Sequence[Scored | Rollout] = (
        _read(data, "scored", "--data", "npd score")
        if config.needs_scores
        else _read(data, "rollouts", "--data", "npd generate")
    )
    _check_ids(samples, data, config)
    by_id = {_stats(sample).sample_id: sample for sample in samples}
    refs = _filtered(config, [_stats(sample) for sample in samples])
    if not refs:
        raise DataError(
            f"{data}: the filter rejects all of its {counted(len(samples), 'sample')}: loosen "
            "filter.*, or set filter.name: none"
        )
    yield f"kept {len(refs)} of {counted(len(samples), 'sample')}"
    chat = ChatTokenizer.of_student(config)
    trainer = Trainer(
        config.train,
        config.loss,
        student=config.student,
        read=lambda ref: by_id[ref.sample_id],
        device=device,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
        stop_ids=compare_ends(config, chat).stop_ids,
    )
    for step in _steps(config, refs):
        report = trainer.train(Segment(step.index, 0, (step,))).steps[0]
        yield f"step {report.step}  loss {report.loss:.4f}  ce {report.ce:.4f}  lr {report.lr:.2e}"
    trainer.save_pretrained(out)
    chat.save_template(out)
    yield f"model directory {out}"


def _device(config: RunConfig) -> str:
    """The device of a stage, which this process uses from now on.

    Raises:
        ConfigError: it is not there.
    """
    device_here(config.runtime.device)
    use(config.runtime.device)
    return resolve_device(config.runtime.device)


def _failed(found: Sequence[object], what: str, *, num_made: int) -> tuple[Failed, ...]:
    """The samples that failed; raises RunError if all did."""
    failed = tuple(item for item in found if isinstance(item, Failed))
    if failed and not num_made:
        raise RunError(f"no sample could be {what}: {failed[0].reason}")
    return failed


def _serving_context(
    config: RunConfig, out: Path, notify: Callable[[str], None], teacher: str | None
) -> ServingContext | None:
    if not config.generate.is_served:
        return None
    from npd.generate.served import ServingContext

    return ServingContext(_server_log(out, teacher), config.max_sample_tokens, notify=notify)


def _server_log(out: Path, teacher: str | None) -> Path:
    """The log file of a server that npd starts for `teacher`; it is next to `out`."""
    name = "" if teacher in (None, DEFAULT_TEACHER) else f".{teacher}"
    return out.with_suffix(f"{name}.server.log")


def _requests(config: RunConfig, prepared: RunInputs) -> list[SampleRequest]:
    per_round = len(prepared.prompts) * config.generate.samples_per_prompt
    refs = make_requests(range(per_round), config, per_round)
    return [SampleRequest(ref.sample_id, ref.seed, prepared.prompts[ref.prompt]) for ref in refs]


def _stats(sample: Scored | Rollout) -> SampleStats:
    return scored_stats(sample) if isinstance(sample, Scored) else generated_stats(sample)


def _filtered(config: RunConfig, stats: list[SampleStats]) -> list[SampleRef]:
    passed = [s for s in stats if prefilter(s, config.filter).keep]
    verdicts = build_filter(config.filter, config.seed).judge(passed, ())
    return [
        SampleRef(s.sample_id, 0, s.version, s.num_tokens)
        for s, verdict in zip(passed, verdicts, strict=True)
        if verdict.keep
    ]


def _steps(config: RunConfig, refs: list[SampleRef]) -> Iterator[Step]:
    """Batches of the file's samples for `schedule.epochs` passes or `schedule.steps` steps."""
    size = min(config.train.batch_size, len(refs))
    per_pass = math.ceil(len(refs) / size)
    total = config.schedule.steps or per_pass * (config.schedule.epochs or 1)
    done = 0
    for epoch in range(math.ceil(total / per_pass)):
        buffer = ReplayBuffer(hash64(config.seed, epoch), 1)
        buffer.add(refs)
        while done < total and (batch := buffer.take(size, allow_used=False)):
            progress = (done / total, (done + 1) / total)
            done += 1
            yield make_step(done, batch, config.train, progress=progress)


@overload
def _read(path: Path, kind: Literal["rollouts"], option: str, maker: str) -> list[Rollout]: ...
@overload
def _read(path: Path, kind: Literal["scored"], option: str, maker: str) -> list[Scored]: ...
def _read(path: Path, kind: Kind, option: str, maker: str) -> Sequence[Rollout | Scored]:
    """The samples of a file that the previous stage wrote; InputError for other files."""
    remedy = f"give the Arrow file of the previous stage ({maker})"
    if (why := why_unreadable(path)) is not None:
        raise InputError(f"{option} {shown_path(path)} {why}: {remedy}")
    try:
        found = read_rollouts(path) if kind == "rollouts" else read_scored(path)
    except StoreError as error:
        raise InputError(f"{option} {shown_path(path)} {_why_not(path, kind)}: {remedy}") from error
    if not found:
        raise InputError(f"{option} {shown_path(path)} has no samples: {remedy}")
    return found


def _check_ids(samples: Sequence[Scored | Rollout], path: Path, config: RunConfig) -> None:
    """Refuse token ids outside the student's vocabulary: samples of another model family."""
    settings = read_config(config.student, trust_remote_code=config.trust_remote_code)
    size = int(settings.get_text_config().vocab_size)
    rollouts = [sample.rollout if isinstance(sample, Scored) else sample for sample in samples]
    highest = max(int(max(r.prompt_ids.max(), r.response_ids.max())) for r in rollouts)
    if highest >= size:
        raise DataError(
            f"--data {shown_path(path)} holds token id {highest:,}, but the student has "
            f"{size:,} ids: give samples of models with the student's tokenizer"
        )


def _why_not(path: Path, kind: Kind) -> str:
    """Why a file cannot be read as `kind`, with its actual content."""
    other: Kind = "scored" if kind == "rollouts" else "rollouts"
    with suppress(StoreError):
        verify_shard(path, other)
        names: dict[Kind, str] = {"rollouts": "rollouts", "scored": "scored rollouts"}
        return f"holds {names[other]}, but {names[kind]} are needed"
    return "is not a complete Arrow file of npd (truncated, altered, or from another program)"


def _check_new(out: Path) -> None:
    if (why := why_unmakeable(out)) is not None:
        raise InputError(f"--out {shown_path(out)} {why}: choose another --out")

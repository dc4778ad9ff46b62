"""One stage alone, files to files: generate, score, train. The same engines as in a run.

For looking at a stage by itself and for pipelines of one's own; there is no ledger, so a stage that
stops half way starts again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from npd.chat import Chat
from npd.config import RunConfig
from npd.control.batches import make_asks, make_step
from npd.control.order import mix
from npd.control.pool import Pool
from npd.control.preparation import Prepared, check_model, prepare
from npd.control.teaching import check_names, role_of
from npd.errors import ConfigError, DataError, InputError, RunError
from npd.filters import build_filter, prefilter
from npd.modeling import resolve_device
from npd.names import DEFAULT_TEACHER
from npd.store.shards import read_rollouts, read_scored, write_rollouts, write_scored
from npd.types import Ask, Failed, Rollout, SampleRef, SampleStats, Scored, Segment, Step
from npd.wording import counted
from npd.workers import generated_stats, scored_stats
from npd.workers.writers import build_writer

if TYPE_CHECKING:
    from npd.generate.served import Surroundings


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage made: how many records are in its file, and the samples that are not."""

    num_records: int
    failed: tuple[Failed, ...] = ()


def generate(
    config: RunConfig,
    out: Path,
    *,
    snapshot: str | None = None,
    tell: Callable[[str], None] = _log.info,
) -> Made:
    """Write `samples_per_prompt` rollouts for every training prompt.

    `tell` takes what a person should hear meanwhile: which weights servers have shown to hold.

    Raises:
        InputError: config, data, model or `out` cannot be used.
        RunError: no sample could be written.
    """
    _check_new(out)
    if snapshot is not None:
        check_model("--snapshot", snapshot, config)
    prepared = prepare(config)
    for note in prepared.notes:
        tell(note)
    chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
    is_teacher = config.generate.source == "teacher"
    model = snapshot or (None if is_teacher else config.student)
    engine = build_writer(config, chat, partial(_surroundings, config, out, tell), model=model)
    with closing(engine):
        found = engine.generate(_asks(config, prepared))
    rollouts = [rollout for rollout in found if isinstance(rollout, Rollout)]
    failed = _failed(found, "written", num_made=len(rollouts))
    write_rollouts(out, rollouts)
    return Made(len(rollouts), failed)


def score(
    config: RunConfig,
    rollouts: Path,
    out: Path,
    *,
    snapshot: str | None = None,
    tell: Callable[[str], None] = _log.info,
) -> Made:
    """Score the rollouts of a file that pass the pre-filters; arguments and errors as above."""
    from npd.score import build_scorer, open_teachers

    _check_new(out)
    if not config.teacher_models:
        raise ConfigError("npd score needs a teacher: set `teacher` in the config or with --set")
    student = snapshot or config.student
    check_model("--snapshot" if snapshot else "student", student, config)
    found = read_rollouts(_existing(rollouts))
    named = [(f"{rollouts}: sample {r.sample_id}", r.teacher) for r in found]
    for name in sorted(check_names(named, config)):
        check_model(role_of(name), config.teacher_models[name], config)
    chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
    kept = [r for r in found if prefilter(generated_stats(r), config.filter).keep]
    device = resolve_device(config.runtime.device)
    log = partial(_server_log, out)
    teachers = open_teachers(config, chat.vocab_size, device=device, log=log, tell=tell)
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
    """Filter, pack and train on a file; writes a model directory. Yields lines of progress."""
    from npd.train.trainer import Trainer

    _check_new(out)
    check_model("student", config.student, config)
    samples: Sequence[Scored | Rollout] = (
        read_scored(_existing(data)) if config.needs_scores else read_rollouts(_existing(data))
    )
    by_id = {_stats(sample).sample_id: sample for sample in samples}
    refs = _filtered(config, [_stats(sample) for sample in samples])
    if not refs:
        raise DataError(f"{data}: the filter keeps none of its {counted(len(samples), 'sample')}")
    yield f"kept {len(refs)} of {counted(len(samples), 'sample')}"
    trainer = Trainer(
        config.train,
        config.loss,
        student=config.student,
        read=lambda ref: by_id[ref.sample_id],
        device=resolve_device(config.runtime.device),
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
    )
    for step in _steps(config, refs):
        report = trainer.train(Segment(step.index, 0, (step,))).steps[0]
        yield f"step {report.step}  loss {report.loss:.4f}  ce {report.ce:.4f}  lr {report.lr:.2e}"
    trainer.save_pretrained(out)
    yield f"model directory {out}"


def _failed(found: Sequence[object], what: str, *, num_made: int) -> tuple[Failed, ...]:
    """The samples that failed, where not all did."""
    failed = tuple(item for item in found if isinstance(item, Failed))
    if failed and not num_made:
        raise RunError(f"no sample could be {what}: {failed[0].reason}")
    return failed


def _surroundings(
    config: RunConfig, out: Path, tell: Callable[[str], None], teacher: str | None
) -> Surroundings | None:
    if config.generate.engine == "transformers":
        return None
    from npd.generate.served import Surroundings

    return Surroundings(_server_log(out, teacher), config.max_sample_tokens, tell=tell)


def _server_log(out: Path, teacher: str | None) -> Path:
    """Where a server of ours writes, beside `out`; `teacher`: the name of the one it holds."""
    name = "" if teacher in (None, DEFAULT_TEACHER) else f".{teacher}"
    return out.with_suffix(f"{name}.server.log")


def _asks(config: RunConfig, prepared: Prepared) -> list[Ask]:
    per_round = len(prepared.prompts) * config.generate.samples_per_prompt
    refs = make_asks(range(per_round), config, per_round)
    return [Ask(ref.sample_id, ref.seed, prepared.prompts[ref.prompt]) for ref in refs]


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
        pool = Pool(mix(config.seed, epoch), 1)
        pool.add(refs)
        while done < total and (batch := pool.take(size, reuse=False)):
            progress = (done / total, (done + 1) / total)
            done += 1
            yield make_step(done, batch, config.train, progress=progress)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist: give the Arrow file of the stage before")
    return path


def _check_new(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already: choose another --out")

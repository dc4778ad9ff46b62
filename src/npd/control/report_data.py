"""Summarises a run from its directory, for the report and `npd show`.

Reads the ledger, the trace and the shards. Needs no model; needs a tokenizer only for texts. Of
many samples only every k-th is kept, so that memory is bounded; counts cover all samples.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from npd.config import RunConfig
from npd.control.resume import recorded
from npd.control.run_record import read_record
from npd.data.chat_tokenizer import ChatTokenizer
from npd.errors import NpdError, StoreError
from npd.filters import bounds, delta_ifd
from npd.models.metadata import model_settings, size_of
from npd.observe.metrics import read_metrics
from npd.observe.report import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
    build_report,
)
from npd.observe.trace import CONTROLLER, Span, export_perfetto, read_trace, sessions
from npd.remote.artifact_store import readable
from npd.schedule import events as ev
from npd.store.files import write_atomic
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger, SampleRow
from npd.store.shards import read_rollouts
from npd.text import counted
from npd.types import EvalReport, Outcome, SampleStats, StepReport

_EXAMPLES_EACH = 3
# Each is drawn; more samples would enlarge the page without changing the picture.
_MOST_SAMPLES = 20_000


@dataclass(slots=True)
class RunEvents:
    """The events of a run by kind.

    `stats`: every `every`-th sample. `recent`: the last scored samples. `written` and `scored`:
    (tokens, samples), counted over all samples.
    """

    every: int
    recent: deque[SampleStats]
    stats: dict[int, SampleStats] = field(default_factory=dict)
    written: tuple[int, int] = (0, 0)
    scored: tuple[int, int] = (0, 0)
    steps: list[StepReport] = field(default_factory=list)
    evals: list[EvalReport] = field(default_factory=list)
    snapshots: list[tuple[int, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, ledger: Ledger, *, every: int, history: int) -> RunEvents:
        """Read every event once; `recent` keeps at most `history` samples."""
        events = cls(every, deque(maxlen=history))
        for event in recorded(ledger):
            events._note(event)
        return events

    def _note(self, event: ev.Event) -> None:
        match event:
            case ev.ShardGenerated(_, stats):
                self._keep(stats)
                tokens, samples = self.written
                tokens += sum(s.response_tokens for s in stats)
                self.written = tokens, samples + len(stats)
            case ev.ShardScored(_, stats):
                self._keep(stats)
                self.recent.extend(stats)
                tokens, samples = self.scored
                self.scored = tokens + sum(s.num_tokens for s in stats), samples + len(stats)
            case ev.SegmentTrained(report):
                self.steps.extend(report.steps)
            case ev.Evaluated(report):
                self.evals.append(report)
            case ev.SnapshotPublished(version, step):
                self.snapshots.append((version, step))
            case ev.ShardFailed(shard, stage, error):
                self.failures.append(f"shard {shard}, {stage}: {error}")
            case ev.Started() | ev.CheckpointDue() | ev.CheckpointCopied() | ev.CheckpointSaved():
                pass

    def _keep(self, stats: Sequence[SampleStats]) -> None:
        self.stats |= {s.sample_id: s for s in stats if s.sample_id % self.every == 0}


def summarize(layout: RunLayout, config: RunConfig, *, tokenizer: str | None) -> ReportData:
    """The report's data about the run in `layout`.

    `tokenizer` is the model whose tokenizer decodes the samples' texts; without it, or if it cannot
    be loaded, there are no texts. Its Python code, if any, runs only if `config` trusts it.
    """
    about = read_record(layout)
    traced = read_trace(layout.trace_jsonl)
    spans = [span for span in traced if span.worker != CONTROLLER]
    going = sessions(traced)
    with Ledger.reader(layout.ledger_db) as ledger:
        conservation = ledger.conservation()
        every = max(1, math.ceil(conservation.asked / _MOST_SAMPLES))
        run_events = RunEvents.of(ledger, every=every, history=config.filter.history)
        rows = ledger.samples(every=every)
        lags = dict(_lags(ledger, every))
        reasons, unused = ledger.reasons(), ledger.unused()
    ratio = config.filter.ratio
    samples = [
        ReportSample(
            stats=run_events.stats[row.sample_id],
            outcome=row.outcome,
            reason=row.reason,
            lag=lags.get(row.sample_id),
            delta=_finite(delta_ifd(run_events.stats[row.sample_id], ratio)),
        )
        for row in rows
        if row.sample_id in run_events.stats
    ]
    return ReportData(
        title=config.name,
        config=about["config"],
        started=going[0][0] if going else 0.0,
        ended=max((s.end for s in spans), default=0.0),
        going=going,
        is_done=layout.student.is_dir(),
        **_student(config),
        steps=[asdict(step) for step in run_events.steps],
        evals=_timed(run_events.evals, spans),
        samples=samples,
        every=every,
        bounds=_bounds(config, run_events.recent),
        conservation=asdict(conservation),
        reasons=reasons,
        unused=unused,
        spans=spans,
        snapshots=run_events.snapshots,
        throughput=throughput(spans, run_events, config),
        examples=_examples(layout, config, samples, rows, tokenizer) if tokenizer else [],
        heldout_texts=_heldout_texts(run_events.evals),
        environment=about["versions"],
        origins=about["origins"],
    )


def _student(config: RunConfig) -> dict[str, int | None]:
    """The student's parameters and context, if its directory is here; no hub is queried."""
    size = size_of(config.student)
    if size is None:
        return {}
    context = None
    with suppress(NpdError):
        context = model_settings(Path(config.student)).context or None
    return {"parameters": size.parameters, "context": context}


def _timed(evals: list[EvalReport], spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Evaluations, each with its end time if the trace has it."""
    ended = {str(span.args.get("step")): span.end for span in spans if span.name == "evaluate"}
    times = [ended.get(str(report.step)) for report in evals]
    return [
        _named(report) | ({} if time is None else {"time": time})
        for report, time in zip(evals, times, strict=True)
    ]


def _named(report: EvalReport) -> dict[str, Any]:
    """An evaluation's values by metric name."""
    values = asdict(report)
    return values | {f"kl/{teacher}": kl for teacher, kl in values.pop("teacher_kls")}


def throughput(
    spans: Sequence[Span], run_events: RunEvents, config: RunConfig
) -> dict[str, StageRate]:
    """Tokens and samples of each stage, and the seconds its workers were busy with it."""
    busy = dict.fromkeys(("generate", "score", "train"), 0.0)
    for span in spans:
        if span.name in busy:
            busy[span.name] += span.seconds
    amounts = {
        "generate": run_events.written,
        "score": run_events.scored,
        "train": (
            sum(step.total_tokens for step in run_events.steps),
            sum(step.num_samples for step in run_events.steps),
        ),
    }
    workers = {"generate": config.generate.workers, "score": config.score.workers, "train": 1}
    return {
        stage: StageRate(*amounts[stage], busy_seconds=busy[stage], num_workers=workers[stage])
        for stage in busy
        if busy[stage] > 0
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lags(ledger: Ledger, every: int) -> Iterator[tuple[int, int]]:
    """(sample id, lag in snapshots when last trained on) of every `every`-th sample."""
    for segment in ledger.segments_after(-1):
        for ref in segment.refs:
            if ref.sample_id % every == 0:
                yield ref.sample_id, segment.version - ref.version


def _bounds(config: RunConfig, recent: Sequence[SampleStats]) -> FilterBounds | None:
    """The Δ-IFD bounds in force at the end of the run."""
    if config.filter.name != "delta_ifd" or not recent:
        return None
    if config.filter.bounds == "fixed":
        return FilterBounds(config.filter.low, config.filter.high, config.filter.tolerance)
    low, high = bounds(config.filter, list(recent))
    return FilterBounds(low, high)


def _examples(
    layout: RunLayout,
    config: RunConfig,
    samples: list[ReportSample],
    rows: list[SampleRow],
    tokenizer: str,
) -> list[Example]:
    """A few samples of each outcome and reason, latest first."""
    shards = {row.sample_id: row.shard for row in rows}
    chosen: dict[tuple[Outcome | None, str], list[ReportSample]] = {}
    for sample in reversed(samples):
        group = chosen.setdefault((sample.outcome, sample.reason), [])
        if len(group) < _EXAMPLES_EACH:
            group.append(sample)
    found = []
    # If this machine cannot read the shards, or a file is missing, the numbers are still shown.
    with suppress(NpdError), readable(layout, config) as shown:
        chat = ChatTokenizer.load(tokenizer, trust_remote_code=config.trust_remote_code)
        for sample in (sample for group in chosen.values() for sample in group):
            with suppress(StoreError):
                found.append(_example(shown, chat, sample, shards[sample.stats.sample_id]))
    return found


def _example(layout: RunLayout, chat: ChatTokenizer, sample: ReportSample, shard: int) -> Example:
    rollouts = read_rollouts(layout.rollouts(shard))
    rollout = next(r for r in rollouts if r.sample_id == sample.stats.sample_id)
    return Example(
        prompt=chat.decode(rollout.prompt_ids),
        response=chat.decode(rollout.response_ids),
        outcome=sample.outcome,
        reason=sample.reason,
        delta=sample.delta,
        nll_teacher=sample.stats.nll_teacher,
        nll_student=sample.stats.nll_student,
    )


def _heldout_texts(evals: list[EvalReport]) -> list[HeldoutText]:
    """The last evaluation's texts, each with the first evaluation's text."""
    if not evals:
        return []
    before = dict(evals[0].samples) if len(evals) > 1 else {}
    after = [HeldoutText(prompt, response) for prompt, response in evals[-1].samples]
    return [replace(text, before=before.get(text.prompt)) for text in after]


def headline(data: ReportData) -> dict[str, Any]:
    """The numbers `npd show` prints: first and last evaluation, throughput, conservation."""
    return {
        "first": data.evals[0] if data.evals else None,
        "last": data.evals[-1] if data.evals else None,
        "throughput": {stage: r.tokens_per_second for stage, r in data.throughput.items()},
        "conservation": data.conservation,
    }


def tokenizer_here(layout: RunLayout, config: RunConfig) -> str | None:
    """A model directory on this machine whose tokenizer decodes the run's texts, or None.

    A name in the record is never looked up on a hub, because another user may have made the run.
    """
    candidates = (layout.student, Path(config.student))
    return next((str(folder) for folder in candidates if folder.is_dir()), None)


def write_report(config: RunConfig, layout: RunLayout, data: ReportData) -> Path:
    """Write `report.html`, and `trace.json` for Perfetto; returns the report's path."""
    if config.observe.trace:
        with suppress(FileNotFoundError):
            export_perfetto(layout.trace_jsonl, layout.trace_json)
    page = build_report(data).encode()
    write_atomic(layout.report_html, lambda file: file.write(page))
    return layout.report_html


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """The result of a run. `student` is None if the run was interrupted; then it can be resumed.

    `go_on`: the command that resumes the run. `was_done`: the run had already finished, and nothing
    was trained.
    """

    directory: Path
    is_done: bool
    step: int
    student: Path | None
    report: Path | None
    data: ReportData
    go_on: str
    was_done: bool = False

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, each with step, kind (train, score, run, eval), time and
        values; `pandas.DataFrame(result.metrics)` is a table of them."""
        return read_metrics(RunLayout(self.directory).metrics_jsonl)

    @property
    def evals(self) -> list[dict[str, Any]]:
        """The held-out evaluations in order, by metric name (`kl`, `agreement`, ...)."""
        return [dict(evaluation) for evaluation in self.data.evals]

    def __repr__(self) -> str:
        return "RunResult(" + ", ".join(f"{name}: {value}" for name, value in outline(self)) + ")"

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        cell = '<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        rows = (cell.format(escape(name), escape(value)) for name, value in outline(self))
        return f"<table>{''.join(rows)}</table>"


def outline(result: RunResult) -> Iterator[tuple[str, str]]:
    """A result as (name, value) pairs: directory, state, held-out KL, and output files."""
    yield "run", str(result.directory)
    if result.is_done:
        yield "state", f"done after {counted(result.step, 'step')}"
    else:
        yield "state", f"interrupted after {counted(result.step, 'step')}"
        yield "resume", result.go_on
    kls = [f"{found:.3f}" for e in result.data.evals if (found := e.get("kl")) is not None]
    if kls:
        yield "held-out KL", " to ".join(kls[:1] if len(kls) == 1 else [kls[0], kls[-1]])
    for name, path in (("student", result.student), ("report", result.report)):
        if path is not None:
            yield name, str(path)

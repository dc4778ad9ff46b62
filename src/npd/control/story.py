"""A run told from its directory: what the report and `npd show` are made from.

Reads the ledger, the trace and the shards; needs no model and no tokenizer but to show texts. Of
many samples every k-th is looked at one by one, so that memory stays bounded; counts are of all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from npd.chat import Chat
from npd.config import RunConfig
from npd.control import codec
from npd.control import events as ev
from npd.control.place import readable
from npd.errors import NpdError, StoreError
from npd.filters import bounds, delta_ifd
from npd.observe.report import (
    Example,
    FilterBounds,
    HeldoutText,
    ReportData,
    ReportSample,
    StageRate,
)
from npd.observe.trace import Span, read_trace
from npd.reports import EvalReport, StepReport
from npd.store.files import read_json
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger, SampleRow
from npd.store.shards import read_rollouts
from npd.types import Outcome, SampleStats

_EXAMPLES_EACH = 3
# Drawn one by one; more would be more bytes and no other picture.
_MOST_SAMPLES = 20_000


@dataclass(slots=True)
class Facts:
    """The events of a run, sorted by kind.

    `stats` are of every `every`-th sample, `recent` of those scored last; `written` and `scored`
    count (tokens, samples) of all.
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
    def of(cls, ledger: Ledger, *, every: int, history: int) -> Facts:
        """Read every event once; `recent` are at most `history`."""
        facts = cls(every, deque(maxlen=history))
        for _, kind, payload in ledger.events():
            payload.pop("digest", None)
            facts._note(codec.decode(kind, payload))
        return facts

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
            case ev.Started() | ev.CheckpointSaved():
                pass

    def _keep(self, stats: Sequence[SampleStats]) -> None:
        self.stats |= {s.sample_id: s for s in stats if s.sample_id % self.every == 0}


def tell(layout: RunLayout, config: RunConfig) -> ReportData:
    """Everything the report shows of the run in `layout`."""
    about = read_json(layout.config_json)
    spans = read_trace(layout.trace_jsonl)
    with Ledger.reader(layout.ledger_db) as ledger:
        conservation = ledger.conservation()
        every = max(1, math.ceil(conservation.asked / _MOST_SAMPLES))
        facts = Facts.of(ledger, every=every, history=config.filter.history)
        rows = ledger.samples(every=every)
        lags = dict(_lags(ledger, every))
        reasons, unused = ledger.reasons(), ledger.unused()
    ratio = config.filter.ratio
    samples = [
        ReportSample(
            stats=facts.stats[row.sample_id],
            outcome=row.outcome,
            reason=row.reason,
            lag=lags.get(row.sample_id),
            delta=_finite(delta_ifd(facts.stats[row.sample_id], ratio)),
        )
        for row in rows
        if row.sample_id in facts.stats
    ]
    return ReportData(
        title=config.name,
        config=about["config"],
        started=min((s.start for s in spans), default=0.0),
        ended=max((s.end for s in spans), default=0.0),
        steps=[asdict(step) for step in facts.steps],
        evals=_timed(facts.evals, spans),
        samples=samples,
        every=every,
        bounds=_bounds(config, facts.recent),
        conservation=asdict(conservation),
        reasons=reasons,
        unused=unused,
        spans=spans,
        snapshots=facts.snapshots,
        throughput=throughput(spans, facts, config),
        examples=_examples(layout, config, samples, rows),
        heldout_texts=_heldout_texts(facts.evals),
        environment=about["versions"],
        origins=about["origins"],
    )


def _timed(evals: list[EvalReport], spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Evaluations with the time they ended at, where the trace has it."""
    ended = {span.args.get("step"): span.end for span in spans if span.name == "evaluate"}
    times = [ended.get(report.step) for report in evals]
    return [
        _named(report) | ({} if time is None else {"time": time})
        for report, time in zip(evals, times, strict=True)
    ]


def _named(report: EvalReport) -> dict[str, Any]:
    """An evaluation's values by their metrics' names."""
    values = asdict(report)
    return values | {f"kl/{teacher}": kl for teacher, kl in values.pop("teacher_kls")}


def throughput(spans: Sequence[Span], facts: Facts, config: RunConfig) -> dict[str, StageRate]:
    """Tokens and samples of each stage over the seconds its workers were busy with it."""
    busy = dict.fromkeys(("generate", "score", "train"), 0.0)
    for span in spans:
        if span.name in busy:
            busy[span.name] += span.seconds
    amounts = {
        "generate": facts.written,
        "score": facts.scored,
        "train": (
            sum(step.total_tokens for step in facts.steps),
            sum(step.num_samples for step in facts.steps),
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
    """(sample id, snapshots it was behind when last trained on) of every `every`-th sample."""
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
    layout: RunLayout, config: RunConfig, samples: list[ReportSample], rows: list[SampleRow]
) -> list[Example]:
    """A few samples of each way to leave, the latest first."""
    chat = Chat.load(config.student, trust_remote_code=config.trust_remote_code)
    shards = {row.sample_id: row.shard for row in rows}
    chosen: dict[tuple[Outcome | None, str], list[ReportSample]] = {}
    for sample in reversed(samples):
        group = chosen.setdefault((sample.outcome, sample.reason), [])
        if len(group) < _EXAMPLES_EACH:
            group.append(sample)
    found = []
    # This machine may not read there, or a file may be gone: the numbers are worth telling still.
    with suppress(NpdError), readable(layout, config) as shown:
        for sample in (sample for group in chosen.values() for sample in group):
            with suppress(StoreError):
                found.append(_example(shown, chat, sample, shards[sample.stats.sample_id]))
    return found


def _example(layout: RunLayout, chat: Chat, sample: ReportSample, shard: int) -> Example:
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
    """The first evaluation's texts beside the last one's."""
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

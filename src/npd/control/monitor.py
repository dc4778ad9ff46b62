"""Turns what happens into metrics, trace, trackers and the live view. It never decides anything.

Everything here could be lost without losing the run: the ledger is the truth, this is for people.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING

from npd.config import RunConfig
from npd.control import events as ev
from npd.filters import Ratio, delta_ifd
from npd.observe.live import LiveState, View, WorkerState
from npd.observe.metrics import MetricsWriter
from npd.observe.trace import Span, TraceWriter
from npd.observe.trackers import Tracker
from npd.store.layout import RunLayout
from npd.types import EvalReport, Outcome, SampleStats, StepReport

if TYPE_CHECKING:
    from npd.control.plan import Plan

_STAGES = ("generate", "score", "train")


class Monitor:
    """Writes down and shows a run; `teachers` are those of its prompts, where it has several."""

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        view: View,
        trackers: Sequence[Tracker] = (),
        teachers: Sequence[str] = (),
    ) -> None:
        self._view, self._trackers, self._teachers = view, trackers, teachers
        self._metrics = MetricsWriter(layout.metrics_jsonl)
        self._trace = TraceWriter(layout.trace_jsonl)
        self._total_steps = config.schedule.steps
        self._ratio = config.filter.ratio
        self._started = time.time()
        self._first_progress: float | None = None
        self._doing: dict[str, WorkerState] = {}
        self._seconds: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        self._tokens: Counter[str] = Counter()
        self._outcomes: Counter[Outcome] = Counter()
        self._trained_here = 0
        self._last: StepReport | None = None
        self._state = LiveState(elapsed=0.0, step=0, title=config.name)

    def message(self, text: str) -> None:
        """One line for the person watching."""
        self._view.message(text)

    def started(self, worker: str, doing: str) -> None:
        """A worker begins something, or is idle."""
        self._doing[worker] = WorkerState(worker, doing, time.time())
        self._state = replace(
            self._state,
            workers=tuple(self._doing.values()),
            elapsed=time.time() - self._started,
        )
        self._view.update(self._state)

    def span(self, span: Span) -> None:
        """A worker finished something."""
        if span.name in _STAGES:
            self._seconds[span.name] += span.seconds
        self._trace.append(span)

    def note(
        self, event: ev.Event, actions: list[ev.Action], plan: Plan, *, is_replay: bool = False
    ) -> None:
        """An event and what was decided; a replayed one only brings the counts up to date."""
        for action in actions:
            if isinstance(action, ev.Retire):
                left = Counter(outcome for _, outcome, _ in action.samples)
                self._outcomes.update(left)
                self._trained_here += 0 if is_replay else left[Outcome.TRAINED_OUT]
        match event:
            case ev.SegmentTrained(report):
                self._last = report.steps[-1]
            case ev.Evaluated(report):
                self._state = replace(self._state, latest_eval=report)
            case _:
                pass
        if not is_replay:
            self._record(event, actions, plan)
            self._show(plan)

    def close(self) -> None:
        """Close files and trackers; the view is its owner's to close."""
        self._metrics.close()
        self._trace.close()
        for tracker in self._trackers:
            tracker.close()

    def _record(self, event: ev.Event, actions: list[ev.Action], plan: Plan) -> None:
        match event:
            case ev.ShardGenerated(shard, stats, failed):
                self._tell_failed(shard, "generate", failed)
                self._tokens["generate"] += sum(s.response_tokens for s in stats)
            case ev.ShardScored(shard, stats, failed):
                self._tell_failed(shard, "score", failed)
                self._tokens["score"] += sum(s.num_tokens for s in stats)
                values = _shard_values(stats, actions, self._ratio, self._teachers)
                self._write(plan.step, values, "score")
            case ev.SegmentTrained(report):
                self._tokens["train"] += sum(s.total_tokens for s in report.steps)
                for step in report.steps:
                    self._write(step.step, _numbers(step), "train")
                values = {"peak_memory/trainer": report.peak_memory_mib, **self._rates(plan)}
                self._write(report.steps[-1].step, values, "run")
            case ev.Evaluated(report):
                self._write(report.step, _numbers(report), "eval")
                self.message(_eval_line(report))
            case ev.SnapshotPublished(version, step):
                self.message(f"snapshot v{version} published after step {step}")
            case ev.ShardFailed(shard, stage, error):
                self.message(
                    f"shard {shard}: {stage} failed, asked again if tries are left: {error}"
                )
            case _:
                pass

    def _tell_failed(self, shard: int, stage: str, failed: Sequence[tuple[int, str]]) -> None:
        if failed:
            count = f"{len(failed)} sample{'s' * (len(failed) > 1)}"
            self.message(f"shard {shard}: {stage} failed for {count}: {failed[0][1]}")

    def _write(self, step: int, values: dict[str, float | None], kind: str) -> None:
        self._metrics.write(step, values, kind)
        for tracker in self._trackers:
            tracker.log(step, values, kind)

    def _rates(self, plan: Plan) -> dict[str, float | None]:
        rates: dict[str, float | None] = {
            f"tokens_per_second/{stage}": self._tokens[stage] / seconds
            for stage, seconds in self._seconds.items()
            if seconds > 0
        }
        return rates | {
            "window_live": float(plan.num_live),
            "version": float(plan.version),
            "asked": float(plan.num_asked),
            "samples_per_hour": 3600 * self._trained_here / (time.time() - self._started),
            **{outcome.value: float(self._outcomes[outcome]) for outcome in Outcome},
        }

    def _show(self, plan: Plan) -> None:
        elapsed, progress, last = time.time() - self._started, plan.progress, self._last
        if self._first_progress is None:
            self._first_progress = progress
        gained = progress - self._first_progress
        self._state = replace(
            self._state,
            elapsed=elapsed,
            step=last.step if last else 0,
            total_steps=self._total_steps,
            progress=progress,
            loss=last.loss if last else None,
            ce=last.ce if last else None,
            kd=last.kd if last else None,
            drift=last.drift if last else None,
            lag=last.lag_mean if last else None,
            version=plan.version,
            tokens_per_second={
                stage: self._tokens[stage] / seconds
                for stage, seconds in self._seconds.items()
                if seconds > 0 and self._tokens[stage]
            },
            asked=plan.num_asked,
            live=plan.num_live,
            trained_out=self._outcomes[Outcome.TRAINED_OUT],
            rejected=self._outcomes[Outcome.REJECTED],
            stale=self._outcomes[Outcome.STALE],
            failed=self._outcomes[Outcome.FAILED],
            # Progress jumps in segments, so the estimate is rough until a twentieth is done.
            eta=elapsed * (1 - progress) / gained if gained > 0.05 else None,
        )
        self._view.update(self._state)


def _numbers(report: StepReport | EvalReport) -> dict[str, float | None]:
    values = asdict(report)
    own = {f"kl/{teacher}": kl for teacher, kl in values.pop("teacher_kls", ())}
    return {name: v for name, v in values.items() if name not in ("step", "samples")} | own


def _shard_values(
    stats: tuple[SampleStats, ...],
    actions: list[ev.Action],
    ratio: Ratio,
    teachers: Sequence[str],
) -> dict[str, float | None]:
    """The shard's median Δ-IFD and the share of it that the filter kept, by teacher too."""
    deltas = [delta for s in stats if math.isfinite(delta := delta_ifd(s, ratio))]
    rejected = {
        sample_id
        for action in actions
        if isinstance(action, ev.Retire)
        for sample_id, outcome, _ in action.samples
        if outcome is Outcome.REJECTED
    }
    kept: dict[str, list[bool]] = {}
    for s in stats if teachers else ():
        kept.setdefault(teachers[s.prompt_index], []).append(s.sample_id not in rejected)
    return {
        "delta_median": median(deltas) if deltas else None,
        "kept_share": 1 - len(rejected) / len(stats) if stats else None,
        **{f"kept_share/{teacher}": sum(own) / len(own) for teacher, own in sorted(kept.items())},
    }


def _eval_line(report: EvalReport) -> str:
    parts = [f"evaluated after step {report.step}"]
    if report.kl is not None:
        parts.append(f"held-out KL {report.kl:.3f}")
    parts += [f"of {teacher} {kl:.3f}" for teacher, kl in report.teacher_kls]
    if report.agreement is not None:
        parts.append(f"agreement {report.agreement:.1%}")
    if report.exact_match is not None:
        parts.append(f"exact match {report.exact_match:.1%}")
    return " · ".join(parts)

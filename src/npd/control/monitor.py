"""Turns what happens into metrics, trace, trackers and the live view. It never decides anything.

Everything here could be lost without losing the run: the ledger is the truth, this is for people.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import median
from typing import TYPE_CHECKING

from npd.config import RunConfig
from npd.control import events as ev
from npd.filters import Ratio, delta_ifd
from npd.observe.live import LiveState, View, WorkerState
from npd.observe.metrics import MetricsWriter
from npd.observe.trace import Span, TraceWriter
from npd.observe.trackers import Tracker
from npd.reports import EvalReport, StepReport
from npd.store.layout import RunLayout
from npd.types import Outcome, SampleStats
from npd.wording import counted

if TYPE_CHECKING:
    from npd.control.plan import Plan

# The share of the teacher's probability that its top k should hold. A student at the least loss of
# `topk` or `renorm` gives all of its own to them: 1 / 0.9 times too much, 0.1 nats a token.
ENOUGH_MASS = 0.9
# Response tokens before it is judged.
_MASS_TOKENS = 512
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
        self._ratio, self._needs_scores = config.filter.ratio, config.needs_scores
        is_cut_off = config.loss.kd_weight > 0 and config.loss.target in ("topk", "renorm")
        self._support = config.score.top_k if is_cut_off else None
        self._mass, self._mass_tokens = 0.0, 0
        self._started = time.monotonic()
        self._first_progress: float | None = None
        self._doing: dict[str, WorkerState] = {}
        self._seconds: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        self._tokens: Counter[str] = Counter()
        self._outcomes: Counter[Outcome] = Counter()
        self._trained_here = 0
        self._kept = self._cut = 0
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
            elapsed=time.monotonic() - self._started,
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

    def resumed(self, plan: Plan) -> None:
        """Everything that was recorded is noted: show where the run goes on from."""
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
                self._judged(0 if self._needs_scores else len(stats), actions)
            case ev.ShardScored(shard, stats, failed):
                self._tell_failed(shard, "score", failed)
                self._tokens["score"] += sum(s.num_tokens for s in stats)
                self._judged(len(stats), actions)
                self._tell_narrow(stats)
                kept = _kept_by_teacher(stats, actions, self._teachers)
                values = {"delta_median": _delta_median(stats, self._ratio), **kept}
                self._write(plan.step, values, "score")
            case ev.SegmentTrained(report):
                self._tokens["train"] += sum(s.total_tokens for s in report.steps)
                for step in report.steps:
                    self._write(step.step, _numbers(step), "train")
                values = {"peak_memory/trainer": report.peak_memory_mib, **self._rates(plan)}
                values["kept_share"] = self._take_kept_share()
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

    def _judged(self, passed: int, actions: list[ev.Action]) -> None:
        """Count what filters kept (`passed`, but for those rejected now) and what they cut."""
        outcomes = Counter(o for a in actions if isinstance(a, ev.Retire) for _, o, _ in a.samples)
        rejected = outcomes[Outcome.REJECTED]
        self._kept += max(0, passed - rejected)
        self._cut += rejected

    def _take_kept_share(self) -> float | None:
        """The share kept of what was judged since this was asked last; None where nothing was."""
        kept, judged = self._kept, self._kept + self._cut
        self._kept = self._cut = 0
        return kept / judged if judged else None

    def _tell_failed(self, shard: int, stage: str, failed: Sequence[tuple[int, str]]) -> None:
        if failed:
            count = counted(len(failed), "sample")
            self.message(f"shard {shard}: {stage} failed for {count}: {failed[0][1]}")

    def _tell_narrow(self, stats: Sequence[SampleStats]) -> None:
        """Say, once a start, that the loss leaves out much of the teacher on what was scored."""
        for s in stats:
            if s.teacher_mass is not None:
                self._mass += s.teacher_mass * s.response_tokens
                self._mass_tokens += s.response_tokens
        if self._support is None or self._mass_tokens < _MASS_TOKENS:
            return
        mass = self._mass / self._mass_tokens
        if mass < ENOUGH_MASS:
            self.message(
                f"the teacher's top {self._support} hold {mass:.1%} of its probability on this "
                "text and the loss does not see the rest: a student grows surer than its teacher; "
                "if it is to be sampled from, compare with loss.target=tail"
            )
            self._support = None

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
            "samples_per_hour": 3600 * self._trained_here / (time.monotonic() - self._started),
            **{outcome.value: float(self._outcomes[outcome]) for outcome in Outcome},
        }

    def _show(self, plan: Plan) -> None:
        elapsed, progress, last = time.monotonic() - self._started, plan.progress, self._last
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
    left_out = ("step", "samples", "kl_sums", "teacher_kls")
    names = [f.name for f in fields(report) if f.name not in left_out]
    own = {f"kl/{teacher}": kl for teacher, kl in getattr(report, "teacher_kls", ())}
    return {name: getattr(report, name) for name in names} | own


def _delta_median(stats: tuple[SampleStats, ...], ratio: Ratio) -> float | None:
    deltas = [delta for s in stats if math.isfinite(delta := delta_ifd(s, ratio))]
    return median(deltas) if deltas else None


def _kept_by_teacher(
    stats: tuple[SampleStats, ...], actions: list[ev.Action], teachers: Sequence[str]
) -> dict[str, float | None]:
    """The share of a scored shard that the filter kept of each teacher's samples; of several."""
    if not teachers:
        return {}
    rejected = {
        sample_id
        for action in actions
        if isinstance(action, ev.Retire)
        for sample_id, outcome, _ in action.samples
        if outcome is Outcome.REJECTED
    }
    kept: dict[str, list[bool]] = {}
    for s in stats:
        kept.setdefault(teachers[s.prompt_index], []).append(s.sample_id not in rejected)
    return {f"kept_share/{teacher}": sum(own) / len(own) for teacher, own in sorted(kept.items())}


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

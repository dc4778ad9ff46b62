"""Turns events and spans into metrics, trace, trackers and the live view. Decides nothing.

Its output is for people. A run is restored from the ledger alone.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

from npd.config import RunConfig
from npd.filters import Ratio, delta_ifd
from npd.observe.live import LiveState, View, WorkerState
from npd.observe.metrics import MetricsWriter
from npd.observe.pace import Pace, StepNote, read_note
from npd.observe.trace import CONTROLLER, Span, TraceWriter, steady_time
from npd.observe.trackers import Callback, Tracker
from npd.schedule import events as ev
from npd.store.files import remove, replace_text
from npd.store.layout import RunLayout
from npd.text import counted
from npd.types import EvalReport, Outcome, SampleStats, StepReport

if TYPE_CHECKING:
    from npd.schedule.plan import Plan

# The share of the teacher's probability that its top k should hold. At its minimum, the loss `topk`
# or `renorm` puts all of the student's probability on them: 1 / 0.9 times too much, 0.1 nats/token.
ENOUGH_MASS = 0.9
# Response tokens to measure before the warning.
_MASS_TOKENS = 512
_STAGES = ("generate", "score", "train")
_STATUS_SECONDS = 2.0


class Monitor:
    """Records and shows a run.

    `teachers`: the teacher of each prompt by its index, empty for a single teacher. `callbacks` get
    each message, step, snapshot and evaluation.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: RunLayout,
        view: View,
        trackers: Sequence[Tracker] = (),
        teachers: Sequence[str] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._view, self._trackers, self._teachers = view, trackers, teachers
        self._callbacks = callbacks
        self._metrics = MetricsWriter(layout.metrics_jsonl)
        self._trace = TraceWriter(layout.trace_jsonl)
        self._layout, self._is_rough = layout, config.schedule.steps is None
        self._pace = Pace()
        self._decided, self._decided_share, self._most_steps = 0, 0.0, config.schedule.steps
        self._status_due = float("-inf")
        self._ratio, self._needs_scores = config.filter.ratio, config.needs_scores
        is_cut_off = config.loss.kd_weight > 0 and config.loss.target in ("topk", "renorm")
        self._support = config.score.top_k if is_cut_off else None
        self._mass, self._mass_tokens = 0.0, 0
        self._started = time.monotonic()
        # Elapsed seconds and progress before the first step of this session.
        self._before_steps: tuple[float, float] | None = None
        self._doing: dict[str, WorkerState] = {}
        self._seconds: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        self._tokens: Counter[str] = Counter()
        self._outcomes: Counter[Outcome] = Counter()
        self._trained_here = 0
        self._kept = self._cut = 0
        self._last: StepReport | None = None
        self._state = LiveState(elapsed=0.0, step=0, title=config.name)
        remove(layout.trainer_step)  # written by a killed trainer in a segment that is repeated
        # Marks the start of a session, so that the pause before it is not counted as run time.
        now = steady_time()
        self._trace.append(Span(CONTROLLER, "start", now, now))

    def message(self, text: str) -> None:
        """Show one line to the user."""
        self._view.message(text)
        for callback in self._callbacks:
            callback.on_message(text)

    def started(self, worker: str, doing: str) -> None:
        """A worker starts a piece of work, or becomes idle."""
        self._doing[worker] = WorkerState(worker, doing, steady_time())
        self.tick()

    def tick(self) -> None:
        """Update the view's clock and the trainer's progress in its segment."""
        self._state = replace(self._state, workers=tuple(self._doing.values()), **self._progress())
        self._view.update(self._state)
        self._write_status()

    def wait_text(self) -> str:
        """The expected time until running work has ended and the trainer is saved."""
        return self._pace.wait_text(self._doing.values(), steady_time())

    def _progress(self) -> dict[str, Any]:
        """Steps done, including those of the running segment, with progress, speed and ETA."""
        elapsed = time.monotonic() - self._started
        done = self._last.step if self._last else 0
        is_training = any(worker.doing == "train" for worker in self._doing.values())
        note = read_note(self._layout.trainer_step) if is_training else None
        is_ahead = note is not None and done < note.step <= self._decided
        step = note.step if note is not None and is_ahead else done
        # The plan's progress covers decided steps; scale it to the steps done.
        share = self._decided_share * step / self._decided if self._decided else 0.0
        total = round(step / share) if step and share else self._most_steps
        if self._before_steps is None or share <= self._before_steps[1]:
            self._before_steps = elapsed, share
        since, before = self._before_steps
        gained = share - before
        return {
            "elapsed": elapsed,
            "step": step,
            "total_steps": total,
            "is_total_rough": self._is_rough,
            "progress": share,
            "tokens_per_second": self._speeds(note if is_ahead else None),
            # The pace excludes loading models and the first samples, which happen once.
            "eta": (elapsed - since) * (1 - share) / gained if gained > 0.02 else None,
        }

    def _speeds(self, note: StepNote | None) -> dict[str, float]:
        """Tokens per second of each stage that has worked, including the running segment."""
        tokens, seconds = Counter(self._tokens), dict(self._seconds)
        if note is not None:
            tokens["train"] += note.tokens
            seconds["train"] += note.seconds
        return {
            stage: tokens[stage] / seconds[stage]
            for stage in _STAGES
            if seconds[stage] > 0 and tokens[stage]
        }

    def _write_status(self) -> None:
        """Write the run's progress for `npd show`, every few seconds."""
        if time.monotonic() < self._status_due:
            return
        self._status_due = time.monotonic() + _STATUS_SECONDS
        state = self._state
        found = {
            "step": state.step,
            "of": state.total_steps,
            "is_rough": state.is_total_rough,
            "eta": state.eta,
        }
        with suppress(OSError):
            replace_text(self._layout.status_json, json.dumps(found))

    def span(self, span: Span) -> None:
        """Record finished work of a worker."""
        self._pace.add(span)
        if span.name in _STAGES:
            self._seconds[span.name] += span.seconds
        self._trace.append(span)

    def saved(self, seconds: float) -> None:
        """A checkpoint was written, beside the work of the trainer, in so many seconds."""
        self._pace.add(Span(CONTROLLER, "write", 0.0, seconds))

    def note(
        self, event: ev.Event, actions: list[ev.Action], plan: Plan, *, is_replay: bool = False
    ) -> None:
        """Record an event and its actions; a replayed event only updates the counts."""
        for action in actions:
            if isinstance(action, ev.Finalize):
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
        """Show the state after a replay."""
        self._show(plan)

    def close(self) -> None:
        """Close files and trackers, but not the view, which the caller closes."""
        self._metrics.close()
        self._trace.close()
        remove(self._layout.status_json)
        for tracker in self._trackers:
            tracker.close()

    def _record(self, event: ev.Event, actions: list[ev.Action], plan: Plan) -> None:
        match event:
            case ev.ShardGenerated(shard, stats, failed):
                self._report_failed(shard, "generate", failed)
                self._tokens["generate"] += sum(s.response_tokens for s in stats)
                self._judged(0 if self._needs_scores else len(stats), actions)
            case ev.ShardScored(shard, stats, failed):
                self._report_failed(shard, "score", failed)
                self._tokens["score"] += sum(s.num_tokens for s in stats)
                self._judged(len(stats), actions)
                self._warn_narrow(stats)
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
                for callback, step in product(self._callbacks, report.steps):
                    callback.on_step(step)
            case ev.Evaluated(report):
                self._write(report.step, _numbers(report), "eval")
                self.message(_eval_line(report))
                for callback in self._callbacks:
                    callback.on_eval(report)
            case ev.SnapshotPublished(version, step):
                self.message(f"snapshot v{version} published after step {step}")
                for callback in self._callbacks:
                    callback.on_snapshot(version, step)
            case ev.ShardFailed(shard, stage, error):
                self.message(f"shard {shard}: {stage} failed, retrying up to max_tries: {error}")
            case _:
                pass

    def _judged(self, passed: int, actions: list[ev.Action]) -> None:
        """Count samples that the filters kept (`passed` less those rejected now) and rejected."""
        outcomes = Counter(
            o for a in actions if isinstance(a, ev.Finalize) for _, o, _ in a.samples
        )
        rejected = outcomes[Outcome.REJECTED]
        self._kept += max(0, passed - rejected)
        self._cut += rejected

    def _take_kept_share(self) -> float | None:
        """The kept share of the samples judged since the last call; None if there were none."""
        kept, judged = self._kept, self._kept + self._cut
        self._kept = self._cut = 0
        return kept / judged if judged else None

    def _report_failed(self, shard: int, stage: str, failed: Sequence[tuple[int, str]]) -> None:
        if failed:
            count = counted(len(failed), "sample")
            self.message(f"shard {shard}: {stage} failed for {count}: {failed[0][1]}")

    def _warn_narrow(self, stats: Sequence[SampleStats]) -> None:
        """Warn, once a session, if the loss ignores much of the teacher's probability."""
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
                "text, and the loss ignores the rest, so the student becomes more confident than "
                "its teacher: if you will sample from the student, compare with loss.target=tail"
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
            "asked": float(plan.num_requested),
            "samples_per_hour": 3600 * self._trained_here / (time.monotonic() - self._started),
            **{outcome.value: float(self._outcomes[outcome]) for outcome in Outcome},
        }

    def _show(self, plan: Plan) -> None:
        self._decided, self._decided_share = plan.step, plan.progress
        self._most_steps, last = plan.most_steps, self._last
        self._state = replace(
            self._state,
            loss=last.loss if last else None,
            ce=last.ce if last else None,
            kd=last.kd if last else None,
            drift=last.drift if last else None,
            lag=last.lag_mean if last else None,
            version=plan.version,
            asked=plan.num_requested,
            live=plan.num_live,
            trained_out=self._outcomes[Outcome.TRAINED_OUT],
            rejected=self._outcomes[Outcome.REJECTED],
            stale=self._outcomes[Outcome.STALE],
            failed=self._outcomes[Outcome.FAILED],
        )
        self.tick()


def _numbers(report: StepReport | EvalReport) -> dict[str, float | None]:
    excluded = ("step", "samples", "kl_sums", "teacher_kls")
    names = [f.name for f in fields(report) if f.name not in excluded]
    own = {f"kl/{teacher}": kl for teacher, kl in getattr(report, "teacher_kls", ())}
    return {name: getattr(report, name) for name in names} | own


def _delta_median(stats: tuple[SampleStats, ...], ratio: Ratio) -> float | None:
    deltas = [delta for s in stats if math.isfinite(delta := delta_ifd(s, ratio))]
    return median(deltas) if deltas else None


def _kept_by_teacher(
    stats: tuple[SampleStats, ...], actions: list[ev.Action], teachers: Sequence[str]
) -> dict[str, float | None]:
    """The kept share of each teacher's samples in a scored shard, if there are several teachers."""
    if not teachers:
        return {}
    rejected = {
        sample_id
        for action in actions
        if isinstance(action, ev.Finalize)
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

"""The speed of a run: the trainer's progress inside a segment, and estimates of waiting times.

For display only: a note that cannot be written or read is skipped, and resuming does not use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from npd.observe.live import WorkerState, clock_text
from npd.observe.trace import Span
from npd.store.files import replace_text
from npd.types import StepReport

_IDLE = "idle"


@dataclass(frozen=True, slots=True)
class StepNote:
    """The trainer's progress in its segment: the last step done, and the seconds so far."""

    segment: int
    step: int
    tokens: int
    seconds: float


def write_note(path: Path, note: StepNote) -> None:
    """Write a note to `path`; ignores write errors, which must not stop training."""
    with suppress(OSError):
        replace_text(path, f"{note.segment} {note.step} {note.tokens} {note.seconds:.3f}\n")


def read_note(path: Path) -> StepNote | None:
    """The note at `path`; None if it is missing or incomplete."""
    try:
        segment, step, tokens, seconds = path.read_text().split()
        return StepNote(int(segment), int(step), int(tokens), float(seconds))
    except (OSError, ValueError):
        return None


def noted(segment: int, reports: Iterable[StepReport]) -> StepNote:
    """The note for the finished steps of a segment."""
    done = list(reports)
    tokens, seconds = sum(r.total_tokens for r in done), sum(r.seconds for r in done)
    return StepNote(segment, done[-1].step, tokens, seconds)


@dataclass(slots=True)
class Pace:
    """Mean durations of each kind of work, by its name in the trace."""

    seconds: dict[str, float] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)

    def add(self, span: Span) -> None:
        """Record finished work."""
        self.seconds[span.name] = self.seconds.get(span.name, 0.0) + span.seconds
        self.times[span.name] += 1

    def mean(self, name: str) -> float | None:
        """Mean seconds of work of this name; None before the first piece has ended."""
        return self.seconds[name] / self.times[name] if self.times[name] else None

    def wait_text(self, workers: Iterable[WorkerState], now: float) -> str:
        """The expected time until running work has ended and the trainer is saved, as a phrase."""
        running = [worker for worker in workers if worker.doing not in ("", _IDLE)]
        if not running:
            return "for a moment"
        known: list[float] = []
        for worker in running:
            mean = self.mean(worker.doing)
            if mean is None:
                return f"the time is unknown, as {worker.name} runs its first {worker.doing}"
            known.append(max(0.0, worker.since + mean - now))
        saving = sum(self.mean(work) or 0.0 for work in ("checkpoint", "write"))
        return f"about {clock_text(max(known) + saving)}"

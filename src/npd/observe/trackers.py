"""Experiment trackers, which receive the same metrics as `metrics.jsonl`, and user callbacks.

Imports no heavy library before a tracker is built. Does not decide what is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from npd.errors import ConfigError
from npd.types import EvalReport, StepReport


class Tracker(Protocol):
    """Receives the same numbers as the metrics file, without None values."""

    def log(self, step: int, values: Mapping[str, float | None], kind: str = "train") -> None:
        """Record `values` at `step` under names of the METRICS table, grouped by `kind`."""
        ...

    def close(self) -> None:
        """Flush buffers; close files and threads."""
        ...


class TensorboardTracker:
    """Writes TensorBoard event files to `directory`: one scalar `kind/name` for each metric."""

    def __init__(self, directory: Path) -> None:
        self._writer: Any = self.require()(log_dir=str(directory))

    @staticmethod
    def require() -> Any:
        """The class that writes event files; ConfigError if its library is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "observe.trackers has tensorboard, which is not installed: "
                "pip install 'npd[track]', or leave it out"
            ) from error
        return SummaryWriter

    def log(self, step: int, values: Mapping[str, float | None], kind: str = "train") -> None:
        """Record the numbers of one step."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, global_step=step)

    def close(self) -> None:
        """Flush, and end the writer's thread."""
        self._writer.close()


_TRACKERS = {"tensorboard": TensorboardTracker}


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker can be built.

    Raises:
        ConfigError: there is none of that name, or its library is not installed.
    """
    unknown = sorted(set(names) - set(_TRACKERS))
    if unknown:
        known = ", ".join(sorted(_TRACKERS))
        raise ConfigError(
            f"observe.trackers: there is no tracker {unknown[0]!r}: use one of {known}"
        )
    for name in names:
        _TRACKERS[name].require()


def build_trackers(names: Sequence[str], directory: Path) -> list[Tracker]:
    """One tracker for each name, in its own folder of `directory`. Errors as `check_trackers`."""
    check_trackers(names)
    return [_TRACKERS[name](directory / name) for name in names]


class Callback:
    """Callbacks of `npd.run`; override the ones you need. The defaults do nothing.

    They are called in the run's own thread, between decisions, and the run waits for them, so they
    must be quick. An exception in a callback ends the run; `npd.run(..., resume=True)` continues
    it. A resumed run does not repeat the calls of earlier sessions.

    >>> class Losses(Callback):
    ...     def on_step(self, report: StepReport) -> None:
    ...         print(report.step, report.loss)
    """

    def on_start(self, directory: Path) -> None:
        """The run starts or resumes in `directory`; models are not loaded yet."""

    def on_step(self, report: StepReport) -> None:
        """An optimiser step is done and recorded. Steps come in segments, up to
        `schedule.segment_steps` at once."""

    def on_eval(self, report: EvalReport) -> None:
        """A held-out evaluation is done."""

    def on_snapshot(self, version: int, step: int) -> None:
        """Snapshot `version`, the student after `step`, is published."""

    def on_message(self, text: str) -> None:
        """A message for the user: a refresh, a lost worker, a warning."""

    def on_end(self, step: int, *, is_done: bool) -> None:
        """The run ended after `step`; not `is_done` if it was interrupted. Not called after an
        error."""

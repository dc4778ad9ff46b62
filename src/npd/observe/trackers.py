"""Experiment trackers: where metrics go besides `metrics.jsonl`.

Promises: nothing heavy is imported before a tracker is built. Does not decide what is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from npd.errors import ConfigError


class Tracker(Protocol):
    """Takes the same numbers as the metrics file; None values are left out."""

    def log(self, step: int, values: Mapping[str, float | None], kind: str = "train") -> None:
        """Record `values` at `step` under names of the METRICS table, grouped by `kind`."""
        ...

    def close(self) -> None:
        """Write out what is buffered and let go of files and threads."""
        ...


class TensorboardTracker:
    """Writes TensorBoard event files to `directory`, one scalar `kind/name` a metric."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "observe.trackers asks for tensorboard, which is not installed: "
                "pip install 'npd[track]', or leave it out"
            ) from error
        self._writer: Any = SummaryWriter(log_dir=str(directory))

    def log(self, step: int, values: Mapping[str, float | None], kind: str = "train") -> None:
        """Record the numbers of one step."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, global_step=step)

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()


_TRACKERS = {"tensorboard": TensorboardTracker}


def build_trackers(names: Sequence[str], directory: Path) -> list[Tracker]:
    """One tracker a name, each in its own folder of `directory`. ConfigError if unknown."""
    unknown = sorted(set(names) - set(_TRACKERS))
    if unknown:
        known = ", ".join(sorted(_TRACKERS))
        raise ConfigError(f"observe.trackers: no tracker called {unknown[0]!r}; known: {known}")
    return [_TRACKERS[name](directory / name) for name in names]

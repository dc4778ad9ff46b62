"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere.

Promises: a view only shows what it is given; it never slows the run (the panel redraws at 4 Hz on
its own thread, lines come at most every 10 seconds). Does not configure logging.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TextIO

from npd.reports import EvalReport

_log = logging.getLogger("npd.live")
NEAR_POLICY_DRIFT = 0.10
"""Nats per token up to which the paper calls training near-policy (method, section 2)."""


class WorkerState(NamedTuple):
    """What a worker does and since when (`time.time()` seconds)."""

    name: str
    doing: str
    since: float


@dataclass(frozen=True, slots=True)
class LiveState:
    """The state of a run at a glance. `progress` is in [0, 1]; None means not known (yet)."""

    elapsed: float
    step: int
    total_steps: int | None = None
    progress: float = 0.0
    title: str = "npd"
    loss: float | None = None
    ce: float | None = None
    kd: float | None = None
    drift: float | None = None
    lag: float | None = None
    version: int = 0
    tokens_per_second: Mapping[str, float] = field(default_factory=dict)
    workers: tuple[WorkerState, ...] = ()
    asked: int = 0
    live: int = 0
    trained_out: int = 0
    rejected: int = 0
    stale: int = 0
    failed: int = 0
    eta: float | None = None
    latest_eval: EvalReport | None = None


class View(Protocol):
    """Where a run shows itself."""

    def update(self, state: LiveState) -> None:
        """Take the newest state."""
        ...

    def message(self, text: str) -> None:
        """Show one line that matters (a refresh, a lost worker, a written file)."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found, the last state still readable."""
        ...


def make_view(stream: TextIO | None = None) -> View:
    """A panel if `stream` (default stderr) is a terminal, else plain lines through logging."""
    target = sys.stderr if stream is None else stream
    if not target.isatty():
        return PlainView()
    from npd.observe.panel import RichView

    return RichView(target)


class PlainView:
    """Logs one line at most every `interval` seconds, messages at once, the last state on close."""

    def __init__(self, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._next = float("-inf")
        self._waiting: LiveState | None = None

    def update(self, state: LiveState) -> None:
        """Log `state` if the last line is long enough ago."""
        self._waiting = state
        if self._clock() >= self._next:
            self._flush()

    def message(self, text: str) -> None:
        """Log `text` at once."""
        _log.info("%s", text)

    def close(self) -> None:
        """Log the last state if it was held back."""
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            _log.info("%s", summary(self._waiting))
            self._waiting, self._next = None, self._clock() + self._interval


def summary(state: LiveState) -> str:
    """One line that says how the run is doing."""
    speed = state.tokens_per_second.get("train")
    parts = [
        f"step {steps_text(state)}",
        f"{state.progress:.0%}",
        *(f"{name} {value:.3f}" for name, value in losses(state)),
        "" if speed is None else f"{speed:,.0f} train tokens/s",
        f"live {state.live}",
        f"rejected {state.rejected}",
        f"v{state.version}",
        "" if state.eta is None else f"eta {clock_text(state.eta)}",
    ]
    return " · ".join(part for part in parts if part)


def steps_text(state: LiveState) -> str:
    """`12/300`, or `12` when the end is not known in steps."""
    return f"{state.step}" + (f"/{state.total_steps}" if state.total_steps is not None else "")


def losses(state: LiveState) -> list[tuple[str, float]]:
    """The loss parts and the drift that are known, by name."""
    named = (("loss", state.loss), ("ce", state.ce), ("kd", state.kd), ("drift", state.drift))
    return [(name, value) for name, value in named if value is not None]


def clock_text(seconds: float) -> str:
    """`42 s`, `12:05 min` or `3:07 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"

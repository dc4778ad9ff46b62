"""The live view of a run: a panel on a terminal (rich), plain lines elsewhere.

A view only shows the state it is given, and never slows the run. The panel redraws at 4 Hz on
rich's own thread and restores the terminal on close. Plain lines are written every 15 seconds at
first and every two minutes later. Does not configure logging.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO, cast

from npd.observe.trace import steady_time
from npd.terminal import Stream, safe_text
from npd.types import EvalReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_log = logging.getLogger("npd.live")
NEAR_POLICY_DRIFT = 0.10
"""Nats per token up to which the paper calls training near-policy (method, section 2)."""


class WorkerState(NamedTuple):
    """A worker's current work, and its start in `steady_time()` seconds."""

    name: str
    doing: str
    since: float


@dataclass(frozen=True, slots=True)
class LiveState:
    """The state of a run that a view shows. `progress` is in [0, 1]; None means not yet known.

    `is_total_rough`: the run's length is set in epochs, so its steps depend on rejected samples.
    """

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
    is_total_rough: bool = False


class View(Protocol):
    """Shows the state and messages of a run."""

    def update(self, state: LiveState) -> None:
        """Receive the newest state."""
        ...

    def message(self, text: str) -> None:
        """Show a message, e.g. a refresh, a lost worker or a written file."""
        ...

    def close(self) -> None:
        """Restore the terminal, with the last state still visible."""
        ...


def make_view(stream: TextIO | None = None) -> View:
    """A panel if `stream` (default stderr) is a terminal, else plain lines.

    Lines go through logging if it is configured to show them, and otherwise to stderr.
    """
    target = sys.stderr if stream is None else stream
    if target is None or not target.isatty():  # None: closed before Python started
        is_shown = _log.isEnabledFor(logging.INFO) and _log.hasHandlers()
        return PlainView(write=_to_log if is_shown else _to_stderr)
    return RichView(target)


def _to_log(text: str) -> None:
    _log.info("%s", text)


def _to_stderr(text: str) -> None:
    """Write a line to the current `sys.stderr`; ignores write errors."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{safe_text(text)}\n")
        sys.stderr.flush()


class SilentView:
    """Shows nothing."""

    def update(self, state: LiveState) -> None:
        """No-op."""

    def message(self, text: str) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""


_LONGEST_INTERVAL = 120.0


class PlainView:
    """Writes a line every `interval` seconds at first, and less often in a long run.

    The interval grows to a fortieth of the run's duration, at most two minutes, so that a day's log
    stays readable. Messages are written at once. The last state is written on close.
    """

    def __init__(
        self,
        interval: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = _to_log,
    ) -> None:
        self._interval, self._clock, self._write = interval, clock, write
        self._next = float("-inf")
        self._waiting: LiveState | None = None

    def update(self, state: LiveState) -> None:
        """Write `state` if enough time has passed since the last line."""
        self._waiting = state
        if self._clock() >= self._next:
            self._flush()

    def message(self, text: str) -> None:
        """Write `text` at once."""
        self._write(text)

    def close(self) -> None:
        """Write the last state if it was not written yet."""
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self._write(summary(self._waiting))
            wait = max(self._interval, min(self._waiting.elapsed / 40, _LONGEST_INTERVAL))
            self._waiting, self._next = None, self._clock() + wait


def summary(state: LiveState) -> str:
    """The state of the run in one line."""
    speed = state.tokens_per_second.get("train")
    busy = [worker.doing for worker in state.workers if worker.doing not in ("", "idle")]
    parts = [
        f"step {steps_text(state)}",
        f"{state.progress:.0%}",
        clock_text(state.elapsed),
        *(f"{name} {value:.3f}" for name, value in losses(state)),
        "" if speed is None else f"{speed:,.0f} train tokens/s",
        f"live {state.live}",
        f"rejected {state.rejected}",
        f"v{state.version}",
        "" if state.eta is None else f"eta {clock_text(state.eta)}",
        # Shown only before the first step, when nothing else is known.
        "" if state.step else ", ".join(dict.fromkeys(busy)),
    ]
    return " · ".join(part for part in parts if part)


def steps_text(state: LiveState) -> str:
    """`12/300`, `12/~300`, or `12` if the total is unknown."""
    if state.total_steps is None:
        return f"{state.step}"
    return f"{state.step}/{'~' if state.is_total_rough else ''}{state.total_steps}"


def losses(state: LiveState) -> list[tuple[str, float]]:
    """The known parts of the loss and the drift, by name."""
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


_REDRAWS_PER_SECOND = 4
_COLORS = {"generate": "blue", "score": "yellow", "train": "green", "evaluate": "magenta"}


class RichView:
    """A panel that stays at the bottom of `stream`; messages scroll above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._state: LiveState | None = None
        # A closed terminal must not end the run.
        self._console = Console(file=cast(TextIO, Stream(stream)))
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REDRAWS_PER_SECOND,
        )
        self._live.start()

    def update(self, state: LiveState) -> None:
        """Show `state` at the next redraw."""
        self._state = state

    def message(self, text: str) -> None:
        """Print `text` above the panel."""
        self._console.print(safe_text(text), markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Redraw a last time and stop."""
        self._live.stop()

    def _render(self) -> RenderableType:
        from rich.text import Text

        return Text("starting") if self._state is None else render_panel(self._state, steady_time())


def render_panel(state: LiveState, now: float) -> RenderableType:
    """The panel for `state`; `now`, in `steady_time()` seconds, gives the age of current work."""
    from rich.console import Group
    from rich.panel import Panel

    parts: list[RenderableType] = [_progress(state), _numbers(state)]
    if state.workers:
        parts.append(_workers(state, now))
    parts.append(_samples(state))
    if state.latest_eval is not None:
        parts.append(_evaluation(state.latest_eval))
    return Panel(
        Group(*parts),
        title=f"[bold]{_plain(state.title)}[/]",
        subtitle=f"[dim]{clock_text(state.elapsed)}[/]",
        title_align="left",
        subtitle_align="right",
        border_style="dim",
        padding=(0, 1),
    )


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(safe_text(text))


def _progress(state: LiveState) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    eta = "" if state.eta is None else f"[dim]eta[/] {clock_text(state.eta)}"
    # As Text, because printing a message above the panel turns off markup in the panel too.
    step = Text.from_markup(f"step [bold]{steps_text(state)}[/]")
    share = Text.from_markup(f"{state.progress:.0%}  {eta}")
    bar = ProgressBar(
        total=1.0, completed=min(1.0, max(0.0, state.progress)), complete_style="cyan"
    )
    row.add_row(step, bar, share)
    return row


def _facts(*pairs: tuple[str, str, str]) -> Text:
    """`name value` pairs on one line: dim names, styled values."""
    from rich.text import Text

    line = Text()
    for name, value, style in pairs:
        line.append("   " if line else "").append(f"{name} ", "dim").append(value, style)
    return line


def _numbers(state: LiveState) -> Text:
    pairs = [(name, f"{value:.3f}", _style(name, value)) for name, value in losses(state)]
    if state.lag is not None:
        pairs.append(("lag", f"{state.lag:.2f}", "bold"))
    return _facts(*pairs, ("snapshot", f"v{state.version}", "bold"))


def _style(name: str, value: float) -> str:
    return "bold red" if name == "drift" and value > NEAR_POLICY_DRIFT else "bold"


def _workers(state: LiveState, now: float) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column()
    table.add_column(min_width=10)
    table.add_column(justify="right", min_width=9)
    for name, doing, since in state.workers:
        style = next((c for kind, c in _COLORS.items() if doing.startswith(kind)), "dim")
        table.add_row(
            Text(name), Text(doing or "idle", style), Text(clock_text(now - since), "dim")
        )
    return table


def _samples(state: LiveState) -> Text:
    counts = [
        ("asked", state.asked),
        ("live", state.live),
        ("trained", state.trained_out),
        ("rejected", state.rejected),
        ("stale", state.stale),
        ("failed", state.failed),
    ]
    rates = state.tokens_per_second.items()
    line = _facts(*((n, f"{c:,}", "red" if n == "failed" and c else "") for n, c in counts))
    if rates:
        line.append("\n").append_text(_facts(*((f"{n} tok/s", f"{r:,.0f}", "") for n, r in rates)))
    return line


def _evaluation(report: EvalReport) -> Text:
    pairs = [
        ("held-out KL", None if report.kl is None else f"{report.kl:.4f}"),
        ("agreement", None if report.agreement is None else f"{report.agreement:.1%}"),
        ("exact match", None if report.exact_match is None else f"{report.exact_match:.1%}"),
    ]
    known = [(name, value, "cyan") for name, value in pairs if value is not None]
    return _facts(*known, ("at step", str(report.step), ""))

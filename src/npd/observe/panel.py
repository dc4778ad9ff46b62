"""The live panel of a run on a terminal (rich).

Promises: redraws at 4 Hz on rich's own thread from the last state given, and gives the terminal
back on close. Does not know where the numbers come from.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from npd.observe.live import NEAR_POLICY_DRIFT, LiveState, clock_text, losses, steps_text
from npd.reports import EvalReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_REDRAWS_PER_SECOND = 4
_COLORS = {"generate": "blue", "score": "yellow", "train": "green", "evaluate": "magenta"}


class RichView:
    """A panel that stays at the bottom of `stream`; messages scroll above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._state: LiveState | None = None
        self._console = Console(file=stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REDRAWS_PER_SECOND,
        )
        self._live.start()

    def update(self, state: LiveState) -> None:
        """Show `state` from the next redraw on."""
        self._state = state

    def message(self, text: str) -> None:
        """Print `text` above the panel."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw a last time and stop."""
        self._live.stop()

    def _render(self) -> RenderableType:
        from rich.text import Text

        return Text("starting") if self._state is None else render_panel(self._state, time.time())


def render_panel(state: LiveState, now: float) -> RenderableType:
    """The panel for `state`; `now` in `time.time()` seconds ages what the workers do."""
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

    return escape(text)


def _progress(state: LiveState) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    eta = "" if state.eta is None else f"[dim]eta[/] {clock_text(state.eta)}"
    # As Text: a message printed above the panel has markup off, and so has what is drawn with it.
    step = Text.from_markup(f"step [bold]{steps_text(state)}[/]")
    share = Text.from_markup(f"{state.progress:.0%}  {eta}")
    bar = ProgressBar(
        total=1.0, completed=min(1.0, max(0.0, state.progress)), complete_style="cyan"
    )
    row.add_row(step, bar, share)
    return row


def _facts(*pairs: tuple[str, str, str]) -> Text:
    """`name value` pairs on a line: the names dim, the values in their style."""
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

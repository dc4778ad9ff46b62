"""What the command line prints of a run and of a config: lines of text, nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npd.observe.report import ReportData
    from npd.settings import Settings
    from npd.store.layout import RunLayout

_MOST_REASONS = 5
_QUALITY = (
    ("kl", "KL to the teacher (nats)", "{:.3f}"),
    ("agreement", "same top token", "{:.1%}"),
    ("exact_match", "exact match", "{:.1%}"),
)


def result_lines(data: ReportData, layout: RunLayout, go_on: str | None = None) -> Iterator[str]:
    """Quality before and after, speed by stage, what became of each sample, where it all lies.

    `go_on`: the command that resumes the run; default: as it was started.
    """
    from npd.observe.live import clock_text
    from npd.observe.report.waste import wasted_line
    from npd.resuming import resume_command
    from npd.wording import counted

    steps = {int(step["step"]) for step in data.steps}
    yield f"{data.title}: {counted(len(steps), 'step')} in {clock_text(data.wall_seconds)}"
    yield ""
    if data.evals:
        yield from _quality(data.evals)
        yield ""
    if data.throughput:
        yield f"{'stage':10}{'samples':>10}{'tokens/s':>12}{'busy':>12}"
        for stage, rate in data.throughput.items():
            speed, busy = f"{rate.tokens_per_second:,.0f}", clock_text(rate.busy_seconds)
            yield f"{stage:10}{rate.samples:>10,}{speed:>12}{busy:>12}"
        yield ""
    yield conservation_line(data.conservation)
    yield from _reason_lines(layout)
    if wasted := wasted_line(data):
        yield f"warning   {wasted}"
    yield ""
    if layout.student.is_dir():
        yield f"student   {layout.student}"
    else:
        go_on = go_on or resume_command(data.config, data.origins)
        yield f"not finished: after step {max(steps, default=0)}; go on with {go_on}"
    if layout.report_html.exists():
        yield f"report    {layout.report_html}"


def _reason_lines(layout: RunLayout) -> Iterator[str]:
    """Why samples left before they were trained out, most frequent first, one line an outcome."""
    from npd.store.ledger import Ledger

    if not layout.ledger_db.exists():
        return
    with Ledger.reader(layout.ledger_db) as ledger:
        found = ledger.reasons()
    for outcome in sorted({outcome for outcome, _ in found} - {"trained_out"}):
        counts = {reason: n for (kind, reason), n in found.items() if kind == outcome}
        most = sorted(counts, key=lambda reason: -counts[reason])[:_MOST_REASONS]
        yield f"{outcome:10}" + ", ".join(f"{reason[:100]} {counts[reason]}" for reason in most)


def _quality(evals: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The held-out measures at the first evaluation and at the last."""
    shown = evals[:1] if len(evals) == 1 else [evals[0], evals[-1]]
    steps = (f"step {evaluation['step']}" for evaluation in shown)
    yield f"{'held-out':28}" + "".join(f"{step:>12}" for step in steps)
    own = [(name, f"  of {name[3:]}", "{:.3f}") for name in shown[-1] if name.startswith("kl/")]
    for name, label, form in (_QUALITY[0], *own, *_QUALITY[1:]):
        values = [evaluation.get(name) for evaluation in shown]
        if values[-1] is not None:
            cells = ("" if value is None else form.format(value) for value in values)
            yield f"{label:28}" + "".join(f"{cell:>12}" for cell in cells)


def conservation_line(counts: Any) -> str:
    """`asked 96 = trained out 80 + rejected 14 + stale 0 + failed 0 + live 2`."""
    left = ("trained_out", "rejected", "stale", "failed", "live")
    total = " + ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in left)
    sign = "=" if counts["asked"] == sum(counts[name] for name in left) else "≠"
    return f"samples   asked {counts['asked']} {sign} {total}"


def config_lines(settings: Settings) -> Iterator[str]:
    """`section.key: value  # origin`, one line a value; together a config file npd reads."""
    from npd.layers import as_yaml, flat
    from npd.settings import dump_config

    for key, value in flat(dump_config(settings.config)):
        yield f"{f'{key}: {as_yaml(value)}':58}  # {settings.origins.get(key, 'default')}"

"""The lines of text that the command line prints about a run and a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npd.config.load import Settings
    from npd.observe.report import ReportData
    from npd.store.layout import RunLayout

_MOST_REASONS = 5
_QUALITY = (
    ("kl", "KL to the teacher (nats)", "{:.3f}"),
    ("agreement", "same top token", "{:.1%}"),
    ("exact_match", "exact match", "{:.1%}"),
)


def result_lines(data: ReportData, layout: RunLayout, resume: str | None = None) -> Iterator[str]:
    """A run's quality before and after, speed by stage, sample outcomes, and output files.

    `resume`: the command that resumes the run; by default it follows from the run's origins.
    """
    from npd.config.sources import resume_command
    from npd.observe.live import clock_text
    from npd.observe.report import remedy_of_tables
    from npd.observe.report.advice import advice, wasted_line
    from npd.text import counted

    steps = {int(step["step"]) for step in data.steps}
    yield f"{data.title}: {counted(len(steps), 'step')} in {clock_text(data.wall_seconds)}"
    for finding in advice(data):
        yield f"advice    {finding}"
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
    if running := running_line(layout, max(steps, default=0)):
        yield running
    elif layout.student.is_dir():
        yield f"student   {layout.student}"
    else:
        command = resume or resume_command(data.config, data.origins)
        yield f"not finished: after step {max(steps, default=0)}; resume with {command}"
    if layout.report_html.exists():
        yield f"report    {layout.report_html}"
        if remedy := remedy_of_tables(layout.report_html):
            yield f"charts    {remedy}"


def running_line(layout: RunLayout, recorded: int) -> str | None:
    """The progress of a run that is running now, else None. `recorded`: its last recorded step."""
    from npd.errors import StoreError
    from npd.observe.live import clock_text
    from npd.store.database import is_locked
    from npd.store.files import read_json

    if not is_locked(layout.ledger_db):
        return None
    try:
        found = read_json(layout.status_json)
        step, of, eta = max(recorded, found["step"]), found["of"], found["eta"]
        about = "about " if found["is_rough"] else ""
    except (StoreError, KeyError, TypeError):
        step, of, eta, about = recorded, None, None, ""
    end = "" if of is None else f" of {about}{of}"
    left = "" if eta is None else f", about {clock_text(eta)} left"
    return f"running   step {step}{end}{left}"


def smoke_line(settings: Settings) -> str:
    """The result of a finished smoke run, and the command that starts the full run."""
    from npd.config.load import dump_config
    from npd.config.sources import start_command

    start = start_command(dump_config(settings.config), settings.origins)
    return (
        "smoke     every stage worked on a few short samples; memory and speed at full size were "
        f"not tested (npd doctor estimates them); start the run with {start}"
    )


def _reason_lines(layout: RunLayout) -> Iterator[str]:
    """Why samples left before they were trained out, most frequent first, one line per outcome."""
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
    """`section.key: value  # origin`, one line per value; the lines form a valid config file.

    Where the config decides what `auto` is, the origin is followed by it.
    """
    from npd.config.load import dump_config
    from npd.config.sources import as_yaml, flat
    from npd.redaction import masked

    decided = settings.config.decided
    for key, value in flat(masked(dump_config(settings.config))):
        origin, meant = settings.origins.get(key, "default"), decided.get(key)
        why = origin if meant is None else f"{origin}: {meant}"
        yield f"{f'{key}: {as_yaml(value)}':58}  # {why}"

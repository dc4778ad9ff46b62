"""What the command line prints of a run and of a config: lines of text, nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npd.observe.report import ReportData
    from npd.settings import Settings

_QUALITY = (
    ("kl", "held-out KL (nats/token)", "{:.3f}"),
    ("agreement", "agreement with the teacher", "{:.1%}"),
    ("exact_match", "exact match", "{:.1%}"),
)


def result_lines(data: ReportData, directory: Path) -> Iterator[str]:
    """Quality before and after, speed by stage, and what became of each sample."""
    steps = {int(step["step"]) for step in data.steps}
    yield f"{data.title}: {len(steps)} steps in {data.wall_seconds / 60:.1f} min ({directory})"
    yield ""
    if data.evals:
        yield f"{'':28}{'before':>10}{'after':>10}"
        first, last = data.evals[0], data.evals[-1]
        for name, label, form in _QUALITY:
            if last.get(name) is not None:
                before, after = form.format(first[name]), form.format(last[name])
                yield f"{label:28}{before:>10}{after:>10}"
        yield ""
    for stage, rate in data.throughput.items():
        busy = f"{rate.tokens_per_second:,.0f} tokens/s while busy ({rate.busy_seconds:.0f} s)"
        yield f"{stage:10}{rate.samples:>7} samples  {busy}"
    yield conservation_line(data.conservation)
    yield ""


def conservation_line(counts: Any) -> str:
    """`asked 96 = trained out 80 + rejected 14 + stale 0 + failed 0 + live 2`."""
    left = ("trained_out", "rejected", "stale", "failed", "live")
    total = " + ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in left)
    sign = "=" if counts["asked"] == sum(counts[name] for name in left) else "≠"
    return f"samples   asked {counts['asked']} {sign} {total}"


def config_lines(settings: Settings) -> Iterator[str]:
    """`section.key: value  # origin`, one line a value."""
    from npd.settings import dump_config

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", "" if value is None else str(value)

    for key, value in walk(dump_config(settings.config), ""):
        yield f"{f'{key}: {value}':58}  # {settings.origins.get(key, 'default')}"

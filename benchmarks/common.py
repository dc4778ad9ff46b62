"""What the benchmarks share: figures with their bars, taking turns, a random model, the machine.

Promises: light to import (no torch, no transformers), so that a process that measures memory or
start-up starts small. A bar is held against the median; the spread beside it is the least and the
largest value seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

VOCAB = 49_152
ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("npd", "torch", "transformers", "numpy", "pyarrow", "safetensors")


class Spread(NamedTuple):
    """Median, least and largest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`, at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must keep to: its ratio to the baseline, or its own value."""

    of: Literal["ratio", "ours"]
    sign: Literal[">=", "<=", "<"]
    limit: float

    def is_met(self, value: float) -> bool:
        """Whether `value` keeps to it."""
        if self.sign == "<=":
            return value <= self.limit
        return value >= self.limit if self.sign == ">=" else value < self.limit


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `ratio` is of paired repeats, above 1 where npd is the better one.

    `bound` is the best that the machine could do, in the unit of `ours`.
    """

    what: str
    unit: str
    ours: Spread
    against: str = ""
    baseline: Spread | None = None
    ratio: Spread | None = None
    bar: Bar | None = None
    bound: float | None = None

    @property
    def judged(self) -> Spread:
        """The values that the bar, where there is one, is held against."""
        own = self.ratio is None or (self.bar is not None and self.bar.of == "ours")
        return self.ours if own or self.ratio is None else self.ratio

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar is None else self.bar.is_met(self.judged.median)

    def cells(self) -> tuple[str, ...]:
        """The line as texts, in the order of `COLUMNS`."""
        verdict = {None: "", True: "pass", False: "MISS"}[self.is_met]
        bar = self.bar
        return (
            self.what,
            f"{number(self.ours.median)} {self.unit}",
            "" if self.baseline is None else f"{number(self.baseline.median)} {self.unit}",
            self.against,
            "" if self.ratio is None else f"{number(self.ratio.median)}",
            self._bound(),
            f"{number(self.judged.low)} to {number(self.judged.high)}",
            "" if bar is None else f"{'ratio ' * (bar.of == 'ratio')}{bar.sign} {bar.limit:g}",
            verdict,
        )

    def _bound(self) -> str:
        if self.bound is None:
            return ""
        share = min(self.ours.median, self.bound) / max(self.ours.median, self.bound)
        return f"{number(self.bound)} {self.unit} ({share:.0%} reached)"


COLUMNS = (
    "what", "npd", "baseline", "baseline is", "ratio", "bound", "spread", "bar", "result"
)  # fmt: skip


def number(value: float) -> str:
    """Three or four figures: 1,234 or 12.3 or 0.987."""
    return (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if value < 0.9 else f"{value:.4g}"
    )


def markdown(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(figure.cells() for figure in figures)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -- Measuring ---------------------------------------------------------------------------------


def timed(run: Callable[[], object], clock: str) -> float:
    """Seconds of one call, by `seconds(clock)`."""
    gc.collect()
    started = seconds(clock)
    run()
    return seconds(clock) - started


def seconds(clock: str) -> float:
    """A time, in seconds: `cpu` is this process's own work, which neighbours on the machine hardly
    change; `wall` includes what a device was asked to do until now."""
    if clock == "cpu":
        return time.process_time()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def free() -> None:
    """Give back the memory of a GPU that nothing holds any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def clock_of(device: str) -> str:
    """The clock for what `device` does."""
    return "cpu" if device == "cpu" else "wall"


def take_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: str, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order turns, and with `warm_up` a first round is
    thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(rounds + warm_up):
        place = index % len(names)
        for name in names[place:] + names[:place]:
            taken = timed(runs[name], clock)
            if index >= warm_up:
                seconds[name].append(taken)
    return seconds


def speeds(amount: float, seconds: Sequence[float]) -> Spread:
    """`amount` a second."""
    return Spread.of([amount / taken for taken in seconds])


def faster(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast ours is, round by round."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def peak_mib() -> float:
    """The most memory this process ever held (resident set)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# -- A model to measure on ---------------------------------------------------------------------


# Name: vocabulary, width, MLP width, heads, key-value heads, whether the head is tied.
SHAPES = {
    "smollm2-135m": (VOCAB, 576, 1536, 9, 3, True),  # 30 layers
    "qwen2.5-1.5b": (151_936, 1536, 8960, 12, 2, True),  # 28
    "qwen2.5-7b": (151_936, 3584, 18_944, 28, 4, False),  # 28
}
SMALL = "smollm2-135m"


def llama_config(layers: int, *, shape: str = SMALL, **options: Any) -> Any:
    """A Llama of one of `SHAPES`, with as many layers as wanted."""
    from transformers import LlamaConfig

    vocab, width, inner, heads, kv_heads, is_tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=is_tied,
        **options,
    )


def random_model(
    layers: int, dtype: str, *, shape: str = SMALL, device: str = "cpu", **options: Any
) -> Any:
    """A Llama of that shape with random weights, in eval mode."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = llama_config(layers, shape=shape, dtype=getattr(torch, dtype), **options)
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


# -- The command line and what is left of a benchmark ------------------------------------------


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short: only to see it run")
    parser.add_argument("--json", type=Path, help="write figures and details there")
    return parser


def parse(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The command line; with `--quick`, the defaults are those of `quick`."""
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args()
    return args


def publish(
    args: argparse.Namespace,
    figures: Sequence[Figure],
    details: Any,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print the figures, and the details under them; write both to `args.json` if it is given.

    `notes` are paragraphs for the page of results. Quick figures are too short to be held against a
    bar.
    """
    if args.quick:
        figures = [replace(figure, bar=None) for figure in figures]
    print(markdown(figures))
    print(json.dumps(details, indent=2))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {
            "figures": [figure_record(figure) for figure in figures],
            "notes": list(notes),
            "settings": settings,
            "details": details,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def figure_record(figure: Figure) -> dict[str, Any]:
    """A figure as plain JSON values; `read_figure` gives it back."""
    return asdict(figure) | {"is_met": figure.is_met}


def read_figure(record: Mapping[str, Any]) -> Figure:
    """The figure that `figure_record` gave `record` for, also after a way through JSON."""
    values = {name: value for name, value in record.items() if name != "is_met"}
    for name in ("ours", "baseline", "ratio"):
        values[name] = values[name] and Spread(*values[name])
    return Figure(**values | {"bar": values["bar"] and Bar(**values["bar"])})


# -- Where it was measured ---------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The processor, its cores, memory, load averages of now, the system, and a GPU if used."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu": torch.cuda.get_device_name()}


def versions() -> dict[str, str]:
    """Python and the packages that the figures depend on."""
    found = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    with suppress(PackageNotFoundError):  # only where the `bench` extra is installed
        found["trl"] = version("trl")
    return found


def commit() -> str:
    """The commit measured, marked where files beside the results have changed since."""
    if not (found := _git("rev-parse", "HEAD")):
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return found + (" with uncommitted changes" if changed else "")


def _git(*arguments: str) -> str:
    # Without optional locks `git status` only looks.
    command = ["git", "-C", str(ROOT), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

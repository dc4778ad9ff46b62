"""Every benchmark, one after another, each in a process of its own; one table of all figures.

    make bench                              # all, to benchmarks/results/bench.json and bench.md
    python benchmarks/run.py --quick        # only whether they run; judges and writes nothing
    python benchmarks/run.py --only pack startup

Exits with 1 when a benchmark fails or a bar is missed. A GPU is not used; the figures of models are
from one thread and of CPU time, so that other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import COLUMNS, ROOT, Figure, commit, machine, markdown, read_figure, versions

HERE = Path(__file__).resolve().parent
NAMES = (
    "startup",
    "pack",
    "controller",
    "train",
    "peers",
    "score",
    "loss",
    "generate",
    "scale",
    "vllm",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only to see them run")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.md")
    args = parser.parse_args()
    if args.out is None and not args.quick and set(args.only) == set(NAMES):
        args.out = HERE / "results"
    return args


def run_one(name: str, *, quick: bool) -> dict[str, Any]:
    """What a benchmark measured, or under "error" the end of what it said."""
    started, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--json", str(path)]
        done = subprocess.run(
            command + ["--quick"] * quick,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        failed = done.returncode != 0
        found = {"error": done.stderr[-2000:]} if failed else json.loads(path.read_text())
    seconds = round(time.monotonic() - started, 1)
    return {"name": name, "seconds": seconds, "load_before": round(load, 2), **found}


def figures_of(results: Sequence[dict[str, Any]]) -> list[Figure]:
    """All figures, in order."""
    return [read_figure(record) for result in results for record in result.get("figures", ())]


def show(figures: Sequence[Figure]) -> None:
    """The table, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for figure in figures:
        style = {True: "green", False: "bold red", None: None}[figure.is_met]
        table.add_row(*figure.cells(), style=style)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def write(directory: Path, results: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """`bench.json` with all that was measured, `bench.md` with the table."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {**about, "benchmarks": list(results)}
    (directory / "bench.json").write_text(json.dumps(record, indent=2) + "\n")
    (directory / "bench.md").write_text(as_page(results, about))


def as_page(results: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table and where it was measured."""
    where, load = about["machine"], about["machine"]["load"]
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    times = ", ".join(f"{result['name']} {result['seconds']:.0f} s" for result in results)
    failed = [f"{result['name']} failed: see bench.json" for result in results if "error" in result]
    lines = [
        "# Benchmarks",
        "Made by `make bench`; do not edit. Values are medians. The spread is from the least to "
        "the largest of the repeats: of what the bar is on; without a bar, of the ratio where "
        "there is one. A ratio is of paired repeats, above 1 where npd is the better one. The "
        "bound is what this machine could do at most. Bars are held against medians. What limits "
        "each figure is said in `docs/performance.md`. Figures of models: a random model of "
        "SmolLM2-135M's shape in bfloat16, CPU time, one thread. What each benchmark does, and how "
        "its baseline is kept fair, is said at the top of `benchmarks/bench_*.py`.",
        markdown(figures_of(results)) + "".join(f"\n**{line}**\n" for line in failed),
        *(note for result in results for note in result.get("notes", ())),
        f"- command: `{about['command']}`, {about['date']}\n"
        f"- duration: {about['seconds']:.0f} s ({times})\n"
        f"- commit: {about['commit']}\n"
        f"- machine: {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, "
        f"{where['system']}, load {load[0]} before and {about['load_after']} after\n"
        f"- versions: {packages}",
    ]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"


def main() -> int:
    """Run, show, write; the exit status."""
    args, started = parse_args(), time.monotonic()
    about = {
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    results = []
    for name in args.only:
        print(f"{name} ...", end=" ", flush=True)
        results.append(run_one(name, quick=args.quick))
        print(f"{results[-1]['seconds']} s" + results[-1].get("error", ""), flush=True)
    figures = figures_of(results)
    show(figures)
    about["seconds"] = round(time.monotonic() - started, 1)
    about["load_after"] = machine()["load"][0]
    if args.out is not None:
        write(args.out, results, about)
        print(f"written to {os.path.relpath(args.out, ROOT)}/bench.json and bench.md")
    is_bad = any("error" in result for result in results)
    return int(is_bad or any(figure.is_met is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks on a GPU, in one process; what time there is goes to the first of them first.

    python benchmarks/gpu.py --out benchmarks/results/gpu
    python benchmarks/gpu.py --minutes 5 --only peers loss

Models have the shape of Qwen2.5-1.5B and random weights, their teacher in `peers` that of the 7B;
`train` holds three of the former, and has run on an H200 (139 GiB). Each benchmark is as its own
`bench_*.py --device cuda` says, with the options below (`--quick`: without). Wall time to the
device's end. One is left out when it would not fit the minutes left; each is written to the page
when it ends. Tests for GPUs: `pytest tests/test_cuda.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import commit, free, machine, markdown, read_figure, versions

STUDENT = "--shape qwen2.5-1.5b --layers 28"
TEACHER = "--teacher-shape qwen2.5-7b --teacher-layers 28"
ROWS = "--row-tokens 8192"


@dataclass(frozen=True)
class Job:
    """A benchmark, its options, and about how many minutes it takes on an H200 (an estimate)."""

    bench: str
    options: str
    minutes: float


JOBS = {
    "peers": Job(
        "bench_peers", f"{STUDENT} {TEACHER} {ROWS} --samples 128 --batch 16 --accumulate 8", 3.0
    ),
    "train": Job("bench_train", f"{STUDENT} {ROWS} --samples 256 --rounds 3", 1.5),
    "loss": Job("bench_loss", "--rounds 3", 0.5),
    "score": Job("bench_score", f"{STUDENT} {ROWS} --samples 256 --rounds 3", 0.6),
    "generate": Job(
        "bench_generate", f"{STUDENT} --batch 128 --asks 256 --rounds 2 --work log-normal", 1.5
    ),
    "compile": Job("bench_train", f"{STUDENT} {ROWS} --samples 256 --rounds 3 --compile", 3.0),
    "score-small": Job("bench_score", "--row-tokens 16384 --samples 256 --rounds 3", 0.4),
}


def run(name: str, job: Job, options: Sequence[str]) -> dict[str, Any]:
    """What a benchmark measured, or under "error" why it did not."""
    before, started = sys.argv, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        sys.argv = [f"{job.bench}.py", *options, "--json", str(path)]
        try:
            importlib.import_module(job.bench).main()
            found = json.loads(path.read_text())
        except (Exception, SystemExit) as error:  # noqa: BLE001 the others go on
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        finally:
            sys.argv = before
    free()
    seconds = round(time.monotonic() - started, 1)
    command = " ".join([f"{job.bench}.py", *options])
    return {"name": name, "command": command, "seconds": seconds, **found}


def as_page(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Each benchmark's table, and where it was measured."""
    lines = [
        "# On a GPU",
        "",
        "Made by `benchmarks/gpu.py`; do not edit. Wall time to the device's end; values are "
        "medians, the spread is from the least to the largest. What each benchmark does, and how "
        "its baseline is kept fair, is said at the top of its file.",
        *(["", about["note"]] if about.get("note") else []),
    ]
    for result in results:
        lines += [
            "",
            f"## {result['name']}",
            "",
            f"`{result['command']}`, {result['seconds']} s",
            "",
        ]
        if "error" in result:
            lines.append(f"**Not measured:** {result['error']}")
        else:
            figures = [read_figure(record) for record in result["figures"]]
            lines.append(markdown(figures).rstrip("\n"))
    host = about["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines += [
        "",
        f"- {about['date']}, commit {about['commit']}",
        f"- machine: {host.get('gpu', 'no GPU')}, {host['cpu']}, {host['cores']} cores, "
        f"{host['memory_gib']} GiB",
        f"- versions: {packages}",
        *(f"- left out for lack of time: {name}" for name in about.get("left_out", ())),
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """`gpu.json` with all that was measured, `gpu.md` with the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps({**about, "benchmarks": results}, indent=1) + "\n")
    (out / "gpu.md").write_text(as_page(results, about))


def main() -> int:
    """The benchmarks in order; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small: only to see them run")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    args, started = parser.parse_args(), time.monotonic()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use here (gpu.py --device cpu --quick shows that it runs)")
    common = ["--device", args.device, *(["--quick"] if args.quick else [])]
    if find_spec("liger_kernel") is None:
        print("loss: not against Liger (pip install liger-kernel)")
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in args.only:
        if (time.monotonic() - started) / 60 + JOBS[name].minutes > args.minutes:
            left_out.append(name)
            continue
        print(f"== {name}", flush=True)
        own = [] if args.quick else JOBS[name].options.split()
        results.append(run(name, JOBS[name], [*own, *common]))
        now = {**about, "machine": machine(), "versions": versions(), "left_out": left_out}
        if args.out is not None:
            write(args.out, results, now)
    print(as_page(results, now) if results else f"no time for any of {', '.join(left_out)}")
    return int(not results or any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""How long a person waits for `npd --help`: `python benchmarks/bench_startup.py`.

Wall time of fresh processes, warm and cold: for cold ones the page cache is told to forget every
file that the command loads (Linux only; it may keep what other processes use). The baseline is a
bare interpreter, `python -c pass`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import Bar, Figure, Spread, make_parser, parse, publish, take_turns, timed

HELP = [str(Path(sys.executable).with_name("npd")), "--help"]
BARE = [sys.executable, "-c", "pass"]
LIST_FILES = """
import sys
sys.argv = ["npd", "--help"]
from npd.__main__ import main
try:
    main()
except SystemExit:
    pass
for module in list(sys.modules.values()):
    for name in ("__file__", "__cached__"):
        print("FILE", getattr(module, name, None) or "")
"""


def run(command: Sequence[str]) -> None:
    """Run a command to its end, unseen."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def loaded_files() -> list[Path]:
    """Every file that `npd --help` imports."""
    done = subprocess.run(
        [sys.executable, "-c", LIST_FILES], check=True, capture_output=True, text=True
    )
    lines = (line.removeprefix("FILE ") for line in done.stdout.splitlines() if "FILE " in line)
    return sorted({Path(line) for line in lines if line and Path(line).is_file()})


def forget(files: Sequence[Path]) -> None:
    """Ask the system to drop these files from its cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_cold(files: Sequence[Path], rounds: int) -> list[float]:
    """Seconds of `npd --help` after its files were forgotten."""
    seconds = []
    for _ in range(rounds):
        forget(files)
        seconds.append(timed(lambda: run(HELP), "wall"))
    return seconds


def main() -> None:
    """Warm turns with the bare interpreter, then cold ones."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser, {"rounds": 2})
    seconds = take_turns(
        {"help": lambda: run(HELP), "bare": lambda: run(BARE)}, args.rounds, "wall"
    )
    files = loaded_files()
    cold = measure_cold(files, args.rounds)
    bar, bare = Bar("ours", "<", 0.5), "python -c pass"
    figures = [
        Figure("npd --help, files not cached", "s", Spread.of(cold), bar=bar),
        Figure(
            "npd --help, files cached",
            "s",
            Spread.of(seconds["help"]),
            bare,
            Spread.of(seconds["bare"]),
            bar=bar,
        ),
    ]
    publish(args, figures, {"files": len(files), "cold": cold, "warm": seconds})


if __name__ == "__main__":
    main()

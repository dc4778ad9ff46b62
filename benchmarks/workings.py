"""What goes wrong in the workings of a ladder's sums, a row for each student.

    python benchmarks/workings.py --folder runs/ladder --seeds 5

The ladder's page has the share of right workings (`steps.py`); this says what is wrong first in the
others. Needs the folder of a ladder that was run; trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ladder_bench import Bench, one_thread
from ladder_setting import SETTINGS
from steps import KINDS, answers, kind_of
from tables import head, row
from tasks import MARK, is_right, read_problems


def main() -> int:
    """Print a table, a row for each student there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a ladder that was run")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    args = parser.parse_args()
    one_thread()
    setting = SETTINGS["sum"]
    bench = Bench(setting, args.folder)
    problems = read_problems(bench.heldout)
    lines = head("seed", "rung", "right number, %", *(f"{kind}, %" for kind in KINDS))
    for seed in range(args.seeds):
        for home in sorted((bench.folder / f"seed-{seed}").glob("*/student")):
            texts = answers(home, problems, setting.max_response)
            lines.append(row(str(seed), home.parent.name, *shares(problems, texts)))
    if len(lines) == 2:
        sys.exit(f"--folder {args.folder}: no student of a ladder on sums: run make ladder first")
    print("\n".join(lines))
    return 0


def shares(problems: Sequence[dict[str, str]], texts: Sequence[str]) -> list[str]:
    """Right final numbers, then each of `KINDS`, in per cent."""
    pairs = list(zip(problems, texts, strict=True))
    final = sum(is_right(text, p["answer"].removeprefix(MARK)) for p, text in pairs)
    kinds = Counter(kind_of(p["prompt"], text) for p, text in pairs)
    return [f"{100 * n / len(pairs):.1f}" for n in (final, *(kinds[kind] for kind in KINDS))]


if __name__ == "__main__":
    sys.exit(main())

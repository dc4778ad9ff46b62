"""How full rows get and how long packing takes: `python benchmarks/bench_pack.py`.

Lengths are log-normal with mean 454 tokens and at most 4,096, as of long-answer instruction data.
The baseline of the fill is next fit: documents in order, a new row when one does not fit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import Bar, Figure, Spread, make_parser, parse, publish
from npd.pack import balance, efficiency, pack

MEAN, SIGMA, LONGEST = 454.0, 0.8, 4096
ROW = 32_768


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths whose mean after clipping is MEAN to about 1 %."""
    location = math.log(MEAN) - SIGMA**2 / 2
    draws = np.random.default_rng(seed).lognormal(location, SIGMA, count)
    lengths: list[int] = np.clip(draws, 1, LONGEST).astype(int).tolist()
    return lengths


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The naive packer: in order of arrival, only the last row stays open."""
    rows: list[list[int]] = [[]]
    room = capacity
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(index)
        room -= length
    return rows


def measure(count: int, capacity: int, repeats: int) -> dict[str, Any]:
    """Fill and seconds of one size."""
    lengths = draw_lengths(count)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows = pack(lengths, capacity)
        seconds.append(time.perf_counter() - start)
    return {
        "documents": count,
        "capacity": capacity,
        "rows": len(rows),
        "fewest": math.ceil(sum(lengths) / capacity),
        "fill": efficiency(rows, lengths, capacity),
        "next_fit": efficiency(next_fit(lengths, capacity), lengths, capacity),
        "seconds": seconds,
    }


def measure_balance(num_rows: int, ranks: int) -> float:
    """How even the ranks' attention costs are: the heaviest over the mean."""
    lengths = draw_lengths(num_rows * 64)
    rows = pack(lengths, ROW)
    costs = [float(sum(lengths[i] ** 2 for i in row)) for row in rows]
    loads = [sum(costs[i] for i in share) for share in balance(costs, ranks)]
    return max(loads) * ranks / sum(loads)


def figures_of(sizes: Sequence[dict[str, Any]], most: dict[str, Any]) -> list[Figure]:
    """How full rows of 32k tokens are over the sizes above 10,000, and the time of the largest."""
    full = [size for size in sizes if size["capacity"] == ROW and size["documents"] >= 10_000]
    count = f"{most['documents']:,}"
    return [
        Figure(
            what=f"packing, fill of {ROW:,}-token rows (10,000 documents and more)",
            unit="%",
            ours=Spread.of([100 * size["fill"] for size in full]),
            against="next fit",
            baseline=Spread.of([100 * size["next_fit"] for size in full]),
            ratio=Spread.of([size["fill"] / size["next_fit"] for size in full]),
            bar=Bar("ours", ">=", 99.0),
        ),
        Figure(
            what=f"packing, time for {count} documents",
            unit="s",
            ours=Spread.of(most["seconds"]),
            bar=Bar("ours", "<", 5.0),
        ),
    ]


def main() -> None:
    """Measure every size."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=1_000_000, help="documents of the largest size")
    args = parse(parser, {"repeats": 1, "most": 20_000})
    counts = [n for n in (64, 1_000, 10_000, 100_000) if n < args.most]
    sizes = [measure(count, ROW, args.repeats) for count in (*counts, args.most)]
    others = [
        measure(counts[-1], capacity, args.repeats) for capacity in (4_096, 8_192, 16_384, 131_072)
    ]
    sample = draw_lengths(args.most)
    details = {
        "lengths": {"mean": statistics.fmean(sample), "longest": max(sample)},
        "sizes": sizes + others,
        "balance_64_rows_8_ranks": measure_balance(64, 8),
    }
    publish(args, figures_of(sizes, sizes[-1]), details)


if __name__ == "__main__":
    main()

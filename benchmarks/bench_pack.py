"""How full rows get and how long packing takes: `python benchmarks/bench_pack.py`.

Lengths are log-normal with mean 454 tokens and at most 4,096, as of long-answer instruction data.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time

import numpy as np

from npd.pack import balance, efficiency, pack

MEAN, SIGMA, LONGEST = 454.0, 0.8, 4096


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths whose mean after clipping is MEAN to about 1 %."""
    location = math.log(MEAN) - SIGMA**2 / 2
    draws = np.random.default_rng(seed).lognormal(location, SIGMA, count)
    lengths: list[int] = np.clip(draws, 1, LONGEST).astype(int).tolist()
    return lengths


def measure(count: int, capacity: int, repeats: int) -> None:
    """Print fill and seconds of one size."""
    lengths = draw_lengths(count)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows = pack(lengths, capacity)
        seconds.append(time.perf_counter() - start)
    fill = efficiency(rows, lengths, capacity)
    fewest = math.ceil(sum(lengths) / capacity)
    print(
        f"{count:>9,} {capacity:>9,} {len(rows):>8,} {fewest:>8,} {fill:>8.4f} "
        f"{statistics.median(seconds):>9.3f} {min(seconds):>7.3f}-{max(seconds):.3f}"
    )


def measure_balance(num_rows: int, ranks: int) -> None:
    """Print how even the ranks' attention costs are."""
    lengths = draw_lengths(num_rows * 64)
    rows = pack(lengths, 32_768)
    costs = [float(sum(lengths[i] ** 2 for i in row)) for row in rows]
    loads = [sum(costs[i] for i in share) for share in balance(costs, ranks)]
    excess = max(loads) * ranks / sum(loads)
    print(f"balance: {len(rows)} rows on {ranks} ranks, heaviest / mean {excess:.4f}")


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    sample = draw_lengths(1_000_000)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"lengths: mean {statistics.fmean(sample):.0f}, longest {max(sample)}")
    print("documents  capacity     rows   fewest     fill  median s  range s")
    for count in (64, 1_000, 10_000, 100_000, 1_000_000):
        measure(count, 32_768, repeats)
    for capacity in (4_096, 8_192, 16_384, 131_072):
        measure(100_000, capacity, repeats)
    measure_balance(64, 8)


if __name__ == "__main__":
    main()

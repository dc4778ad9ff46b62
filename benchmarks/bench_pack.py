"""How full rows get and how long packing takes: `python benchmarks/bench_pack.py`.

Lengths are log-normal with mean 454 tokens and at most 4,096, as of long-answer instruction data.
The baseline of the fill is next fit: documents in order, a new row when one does not fit.

Against TRL's `bfd`, where trl and datasets are installed, by turns, CPU time of this one process:
its packing alone (`_pack_bfd`, on a table whose tokens are one bit each, so that hardly anything is
copied) against `pack`; and `pack_dataset` on a data set of int32 tokens, as its users call it,
against `pack` and the same copy of the tokens into rows. `pack_dataset` packs each thousand
documents by themselves unless it is told otherwise: both ways are measured. The bars are on the
packing alone: at 100,000 documents the copy, the same in both, is most of the rest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from common import Bar, Figure, Spread, faster, make_parser, parse, publish, take_turns
from npd.pack import balance, efficiency, pack, pack_stream

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


def measure_stream(count: int, capacity: int) -> dict[str, Any]:
    """Fill of rows made as documents come, and seconds."""
    lengths, start = draw_lengths(count), time.perf_counter()
    rows = list(pack_stream(lengths, capacity))
    seconds = time.perf_counter() - start
    return {
        "documents": count,
        "capacity": capacity,
        "fill": efficiency(rows, lengths, capacity),
        "seconds": seconds,
    }


# -- Against TRL -------------------------------------------------------------------------------


def table_of(lengths: Sequence[int], kind: pa.DataType) -> pa.Table:
    """Documents of these lengths as one list column, as TRL takes them."""
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    values = pa.array(np.zeros(offsets[-1], kind.to_pandas_dtype()), kind)
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})


def pack_table(table: pa.Table, capacity: int) -> pa.Table:
    """What TRL's `bfd` makes of a table of one chunk, by our packer: rows and their lengths."""
    column = table["input_ids"].chunk(0)
    lengths = column.value_lengths().to_numpy()
    rows = pack(lengths, capacity)
    order = np.concatenate([np.asarray(row) for row in rows])
    counts = np.cumsum([0, *map(len, rows)])
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    tokens = column.take(pa.array(order)).flatten()
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(pa.array(ends[counts].astype(np.int32)), tokens),
            "seq_lengths": pa.ListArray.from_arrays(
                pa.array(counts.astype(np.int32)), pa.array(lengths[order])
            ),
        }
    )


def against_trl(count: int, capacity: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of ours and of TRL's in turn, and the rows each makes."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import _pack_bfd, pack_dataset

    disable_progress_bars()
    lengths = draw_lengths(count)
    bits, ids = table_of(lengths, pa.bool_()), table_of(lengths, pa.int32())
    dataset, made = Dataset(ids), {}

    def keep(name: str, rows: Sequence[Any] | pa.Table) -> None:
        made[name] = len(rows)

    whole = {"batch_size": None, "load_from_cache_file": False}
    runs = {
        "npd": lambda: keep("npd", pack(lengths, capacity)),
        "trl": lambda: keep("trl", _pack_bfd(bits, capacity)),
        "npd_table": lambda: keep("npd_table", pack_table(ids, capacity)),
        "trl_whole": lambda: keep(
            "trl_whole", pack_dataset(dataset, capacity, "bfd", map_kwargs=whole)
        ),
        "trl_thousands": lambda: keep(
            "trl_thousands",
            pack_dataset(dataset, capacity, "bfd", map_kwargs={"load_from_cache_file": False}),
        ),
    }
    seconds = take_turns(runs, rounds, "cpu")
    fill = {name: sum(lengths) / (rows * capacity) for name, rows in made.items()}
    return {"documents": count, "capacity": capacity, "seconds": seconds, "fill": fill}


def trl_figures(sizes: Sequence[dict[str, Any]]) -> list[Figure]:
    """Speed at each size, packing alone and as users call it; the fill over all sizes."""
    bar = Bar("ratio", ">=", 3.0)
    pairs = (
        ("packing alone", "npd", "trl", "TRL's bfd, its packing alone", bar),
        ("to packed tokens", "npd_table", "trl_whole", "TRL's pack_dataset, all at once", None),
        ("to packed tokens", "npd_table", "trl_thousands", "TRL's pack_dataset as it comes", None),
    )
    figures = [
        Figure(
            what=f"{what}, {size['documents']:,} documents to rows of {size['capacity']:,}",
            unit="s",
            ours=Spread.of(size["seconds"][ours]),
            against=against,
            baseline=Spread.of(size["seconds"][theirs]),
            ratio=faster(size["seconds"][ours], size["seconds"][theirs]),
            bar=bar,
        )
        for size in sizes
        for what, ours, theirs, against, bar in pairs
    ]
    fills = [
        Figure(
            what="packing, fill at those sizes",
            unit="%",
            ours=Spread.of([100 * size["fill"]["npd"] for size in sizes]),
            against=against,
            baseline=Spread.of([100 * size["fill"][theirs] for size in sizes]),
            ratio=Spread.of([size["fill"]["npd"] / size["fill"][theirs] for size in sizes]),
            bar=Bar("ratio", ">=", 1.0),
        )
        for _, _, theirs, against, _ in pairs
    ]
    return figures + fills


def figures_of(
    sizes: Sequence[dict[str, Any]], streams: Sequence[dict[str, Any]], most: dict[str, Any]
) -> list[Figure]:
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
            bar=Bar("ours", "<", 3.0),
        ),
        Figure(
            what=f"packing of a stream, fill of {ROW:,}-token rows (1,024 documents at hand)",
            unit="%",
            ours=Spread.of([100 * size["fill"] for size in streams]),
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
    streams = [measure_stream(count, ROW) for count in (*counts, args.most) if count >= 10_000]
    trl, notes = [], []
    try:
        for count in [n for n in (20_000, 100_000) if n <= args.most]:
            trl += [against_trl(count, capacity, min(args.repeats, 3)) for capacity in (8_192, ROW)]
    except ModuleNotFoundError as error:
        notes.append(f"Packing was not compared with TRL ({error}): pip install trl datasets.")
        print(notes[0])
    sample = draw_lengths(args.most)
    details = {
        "lengths": {"mean": statistics.fmean(sample), "longest": max(sample)},
        "sizes": sizes + others,
        "streams": streams,
        "trl": trl,
        "balance_64_rows_8_ranks": measure_balance(64, 8),
    }
    figures = figures_of(sizes, streams, sizes[-1])
    publish(args, figures + (trl_figures(trl) if trl else []), details, notes=notes)


if __name__ == "__main__":
    main()

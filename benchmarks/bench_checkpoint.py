"""How long training waits for a checkpoint, and how much slower it is while one is written.

A random Llama of SmolLM2-135M's shape (`--layers` of its 30) with AdamW's moments, 12 bytes a
parameter. Three take turns: `waits` copies, hashes while it writes, and waits for the disk; `twice`
is what npd did before it had threads for this: safetensors writes the file, then every byte is read
again to be hashed, and training waits for it all; `beside` is what a run does now: training waits
for the copy alone. Wall time, of which the disk is a part, so other work on the machine counts.

Then optimiser steps alone, and steps that run while a checkpoint is written, in turn.

    OMP_NUM_THREADS=1 python benchmarks/bench_checkpoint.py --folder /a/real/disk
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import (
    Bar,
    Figure,
    Spread,
    faster,
    machine,
    make_parser,
    parse,
    publish,
    random_model,
    timed,
)
from npd.config import LossConfig, TrainConfig
from npd.store import snapshots
from npd.store.files import remove
from npd.train.trainer import Trainer
from training import Shards, make_segment, random_samples


def parse_args() -> Any:
    """The command line."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 30), ("rounds", 5), ("threads", 1), ("samples", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    return parse(parser, {"layers": 1, "rounds": 1, "samples": 2})


def write_twice(directory: Path, trainer: Trainer) -> None:
    """The state in safetensors files, published by reading them again."""
    state = trainer.optimizer.state
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    moments = {
        f"{kind}/{name}": value
        for name, p in trainer.model.named_parameters()
        for kind, value in state[p].items()
    }

    def write(into: Path) -> None:
        save_file(trained, into / "model.safetensors")
        save_file(moments, into / "optimizer.safetensors")

    snapshots.publish(directory, write)


def until_saved(trainer: Trainer, directory: Path) -> None:
    """Wait for the thread."""
    while not trainer.is_saved(directory):
        time.sleep(0.001)


def measure_stalls(trainer: Trainer, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds that training waits, by way of saving; each finds the disk as a run does."""
    ways: dict[str, Callable[[Path], object]] = {
        "twice": lambda directory: write_twice(directory, trainer),
        "waits": trainer.save_checkpoint,
        "beside": trainer.start_checkpoint,
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "in the thread")}
    for index in range(rounds + 1):  # the first is thrown away: it takes memory from the system
        for name in [*ways][index % 3 :] + [*ways][: index % 3]:
            directory = folder / f"step-{index:06d}"
            taken = {name: timed(partial(ways[name], directory), "wall")}
            if name == "beside":
                taken["in the thread"] = timed(partial(until_saved, trainer, directory), "wall")
            for what, value in taken.items() if index else ():
                seconds[what].append(value)
            remove(directory)
    return seconds


def main() -> None:
    """Stalls, then steps beside a write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    samples = random_samples(args.samples, 32, 96)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        random_model(args.layers, "bfloat16").save_pretrained(folder / "student")
        shards = Shards(folder, samples)
        config = TrainConfig(row_tokens=512)
        trainer = Trainer(config, LossConfig(), student=folder / "student", read=shards.read)
        segment = make_segment(samples, config.row_tokens)
        trainer.train(segment)  # AdamW's moments are made by a step
        seconds = measure_stalls(trainer, folder, args.rounds)

        def step() -> None:
            trainer.train(segment)

        turns: dict[str, list[float]] = {"alone": [], "beside": []}
        for _ in range(args.rounds):
            turns["alone"].append(timed(step, "wall"))
            trainer.start_checkpoint(folder / "c")
            turns["beside"].append(timed(step, "wall"))
            until_saved(trainer, folder / "c")
            remove(folder / "c")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    publish(
        args,
        [
            Figure(
                "training waits for a checkpoint, written beside it",
                "s",
                Spread.of(seconds["beside"]),
                "written, read again and hashed first",
                Spread.of(seconds["twice"]),
                faster(seconds["beside"], seconds["twice"]),
                Bar("ratio", ">=", 3.0),
            ),
            Figure(
                "the same, if it waited for the thread",
                "s",
                Spread.of(seconds["waits"]),
                "written, read again and hashed first",
                Spread.of(seconds["twice"]),
                faster(seconds["waits"], seconds["twice"]),
            ),
            Figure(
                "a step while a checkpoint is written",
                "s",
                Spread.of(turns["beside"]),
                "a step alone",
                Spread.of(turns["alone"]),
                faster(turns["beside"], turns["alone"]),
            ),
        ],
        {"parameters": parameters, "seconds": seconds, "steps": turns, "machine": machine()},
    )


if __name__ == "__main__":
    main()

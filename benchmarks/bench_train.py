"""Near-policy training against a bare packed-SFT loop: tokens per second, same model and rows.

Both train a random Llama of SmolLM2-135M's shape (`--layers` of its 30) with float32 weights, fused
AdamW and clipping, through the same packed attention, on the same rows. npd's Trainer does all it
does in a run: it opens Arrow shards anew for each step and reads them (checksums included), builds
the rows, takes CE + top-10 KD, drift and the other metrics, and checks that all is finite.
The bare loops find their rows ready in memory and do cross-entropy and nothing else: `lean` takes
logits at response positions only (all of them at once), `full` at all positions with the others'
labels ignored, as Hugging Face models do. With `--compile` npd's Trainer runs a second time, its
layers compiled, against itself without. They take turns, in changing order; the ratio is of
paired rounds, by default of CPU time, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --layers 30 --rounds 5
    python benchmarks/bench_train.py --device cuda --samples 128 --response 512 --row-tokens 32768
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from common import (
    VOCAB,
    Bar,
    Figure,
    faster,
    make_parser,
    parse,
    publish,
    random_model,
    speeds,
    take_turns,
    timed,
)
from npd.config import LossConfig, TrainConfig
from npd.head import head_of
from npd.modeling import hidden_states, load_model
from npd.pack import pack
from npd.store.shards import ShardReader, write_scored
from npd.train.batch import TrainRow, build_row
from npd.train.trainer import Trainer, build_optimizer
from npd.types import FinishReason, Rollout, Row, SampleRef, Scored, Segment, Step

TOP_K = 10
SHARD_SIZE = 32  # as many samples as npd writes into one


def random_samples(count: int, prompt: int, response: int) -> list[Scored]:
    """Random text of half to full these lengths, each token with a random top-10 of mass 0.9."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(1, VOCAB, shape).astype(np.int32)

    samples = []
    for i in range(count):
        before, length = rng.integers((prompt // 2, response // 2), (prompt + 1, response + 1))
        shares = np.sort(rng.dirichlet(np.ones(TOP_K), length), axis=-1)[:, ::-1]
        logprobs = np.log(0.9 * shares + 1e-9).astype(np.float32)
        own = np.full(length, -np.log(VOCAB), np.float32)
        # Spread over the vocabulary and distinct, as a teacher's ids are.
        support = (ids(length, 1) + 4_801 * np.arange(TOP_K, dtype=np.int32)) % VOCAB
        rollout = Rollout(i, i, 0, ids(before), ids(1), ids(length), own, FinishReason.STOP, i)
        samples.append(Scored(rollout, support, logprobs, own, 1.0))
    return samples


class Shards:
    """The samples in Arrow files, read through npd's reader."""

    def __init__(self, directory: Path, samples: Sequence[Scored]) -> None:
        self._directory = directory
        for shard, start in enumerate(range(0, len(samples), SHARD_SIZE)):
            write_scored(self._path(shard), samples[start : start + SHARD_SIZE])
        self.open_anew()

    def open_anew(self) -> None:
        """Forget what is open, so that files are opened and verified again."""
        self._reader = ShardReader(self._path, "scored")

    def read(self, ref: SampleRef) -> Scored:
        """One sample."""
        return self._reader.scored(ref)

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:06d}.arrow"


def make_segment(samples: Sequence[Scored], capacity: int) -> Segment:
    """One step over all samples, packed."""
    refs = [
        SampleRef(i, i // SHARD_SIZE, 0, sample.rollout.num_tokens)
        for i, sample in enumerate(samples)
    ]
    rows = pack([ref.num_tokens for ref in refs], capacity)
    packed = tuple(Row(tuple(refs[i] for i in row)) for row in rows)
    return Segment(0, 0, (Step(0, 1e-5, (packed,)),))


def build_rows(
    segment: Segment, read: Callable[[SampleRef], Scored], device: str
) -> list[TrainRow]:
    """The rows as the Trainer builds them."""
    rows = segment.steps[0].ranks[0]
    return [build_row([read(ref) for ref in row.samples], version=0, device=device) for row in rows]


def bare_loop(
    model: Any, rows: Sequence[TrainRow], config: TrainConfig, *, full: bool
) -> Callable[[], None]:
    """A step of plain packed SFT: forward, cross-entropy on full logits, backward, clip, AdamW."""
    optimizer = build_optimizer(model, config)
    tokens = sum(len(row.labels_N) for row in rows)
    device = model.device

    def loss_of(row: TrainRow) -> torch.Tensor:
        hidden, labels = hidden_states(model, row.packed), row.labels_N
        if full:
            labels = torch.full((len(hidden),), -100, device=device)
            labels[row.positions_N] = row.labels_N
        else:
            hidden = hidden[row.positions_N]
        logits = F.linear(hidden, head_of(model).weight).float()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / tokens

    def step() -> None:
        total = torch.zeros((), device=device)
        for row in rows:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = loss_of(row)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def make_loops(
    args: Any, shards: Shards, segment: Segment, directory: Path
) -> tuple[Trainer, dict[str, Callable[[], Any]]]:
    """npd's trainer, and a step of each contestant."""
    config = TrainConfig(dtype=args.dtype, row_tokens=args.row_tokens)
    loss = LossConfig(chunk=args.chunk)

    def make(config: TrainConfig) -> tuple[Trainer, Callable[[], None]]:
        trainer = Trainer(config, loss, student=directory, read=shards.read, device=args.device)

        def own() -> None:
            shards.open_anew()
            trainer.train(segment)

        return trainer, own

    trainer, own = make(config)
    loops: dict[str, Callable[[], Any]] = {"npd": own}
    if args.compile:
        loops["compiled"] = make(config.model_copy(update={"compile": True}))[1]
    rows = build_rows(segment, shards.read, args.device)
    for name in ("lean",) if args.no_full else ("lean", "full"):
        model = load_model(directory, device=args.device).train()
        loops[name] = bare_loop(model, rows, config, full=name == "full")
    return trainer, loops


def figures_of(seconds: dict[str, list[float]], tokens: int) -> list[Figure]:
    """npd against each bare loop."""
    against = {
        "lean": ("bare packed SFT, logits at responses", Bar("ratio", ">=", 0.90)),
        "full": ("bare packed SFT, logits everywhere", None),
    }
    compiled = seconds.get("compiled")
    own = [] if compiled is None else [
        Figure(
            "the same, layers compiled",
            "tokens/s",
            speeds(tokens, compiled),
            *("not compiled", speeds(tokens, seconds["npd"]), faster(compiled, seconds["npd"])),
        )
    ]  # fmt: skip
    return own + [
        Figure(
            "near-policy training, CE + top-10 KD",
            "tokens/s",
            speeds(tokens, seconds["npd"]),
            *(against[name][0], speeds(tokens, taken), faster(seconds["npd"], taken)),
            against[name][1],
        )
        for name, taken in seconds.items()
        if name in against
    ]


def parse_args() -> Any:
    """The command line."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 30), ("samples", 16), ("prompt", 64), ("response", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("row-tokens", 1024), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], help="default: cpu on a CPU")
    parser.add_argument("--no-full", action="store_true", help="leave out the `full` bare loop")
    parser.add_argument("--compile", action="store_true", help="train.compile too")
    args = parse(parser, {"layers": 2, "samples": 4, "rounds": 1})
    args.clock = args.clock or ("cpu" if args.device == "cpu" else "wall")
    return args


def main() -> None:
    """The loops in turn, and what reading and building rows takes of a step."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    samples = random_samples(args.samples, args.prompt, args.response)
    segment = make_segment(samples, args.row_tokens)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        random_model(args.layers, "float32").save_pretrained(directory)
        shards = Shards(directory, samples)
        trainer, loops = make_loops(args, shards, segment, directory)
        report = trainer.train(segment).steps[0]
        seconds = take_turns(loops, args.rounds, args.clock)
        shards.open_anew()
        rows = timed(lambda: build_rows(segment, shards.read, args.device), args.clock)
    details = {
        "seconds": seconds,
        "read_and_build_share": rows / statistics.median(seconds["npd"]),
        "tokens": report.total_tokens,
        "response_tokens": report.response_tokens,
        "rows": report.num_rows,
        "fill": report.fill,
    }
    publish(args, figures_of(seconds, report.total_tokens), details)


if __name__ == "__main__":
    main()

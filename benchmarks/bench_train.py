"""Near-policy training against a bare packed-SFT loop, and a padded one: tokens per second.

All train a random Llama of `--shape` (SmolLM2-135M's; `--layers` of its 30) with float32 weights,
fused AdamW and clipping, on the same samples: responses of log-normal length, `--response` at most.
No padding is counted. npd's Trainer does all it does in a run: it opens Arrow shards anew for each
step and reads them (checksums included), builds the rows, takes CE + top-10 KD, drift and the other
metrics, and checks that all is finite. The others find their tensors ready in memory:

- `lean` does cross-entropy and nothing else, on npd's rows and through its attention, with logits
  at response positions only, all of them at once; `full` (`--full`) has them at all positions, the
  others' labels ignored, as Hugging Face models do.
- `padded` is npd's own loss on batches of `--batch` as they come, padded to their longest, through
  transformers' SDPA with a mask; its logits too are at responses only, so that padding is all that
  differs. How much of such a batch is real depends on luck: the details say what it is here and on
  average over shuffles.

With `--compile` npd's Trainer runs a second time, its layers compiled, against itself without; with
`--deterministic` once more, with `train.deterministic`. They take turns, in changing order; the
ratio is of paired rounds, by default of CPU time, on one thread.
The bound is the matrix products the model needs (no padding, head at responses only) at the rate of
the best matrix product measured beside them: its share is what GPU people call MFU.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --layers 30 --rounds 4
    python benchmarks/bench_train.py --device cuda --shape qwen2.5-1.5b --layers 28 --samples 256
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common import (
    SHAPES,
    SMALL,
    Bar,
    Figure,
    faster,
    llama_config,
    make_parser,
    parse,
    publish,
    random_model,
    speeds,
    take_turns,
    timed,
)
from npd.config import LossConfig, TrainConfig
from npd.models.loading import load_model
from npd.train.trainer import Trainer
from npd.types import Scored, Segment
from training import (
    Shards,
    bare_loop,
    build_rows,
    make_segment,
    matmul_rate,
    padded,
    padded_fill,
    padded_loop,
    random_samples,
    step_flops,
)


def make_loops(
    args: Any, samples: Sequence[Scored], shards: Shards, segment: Segment, directory: Path
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
    if args.deterministic:
        loops["deterministic"] = make(config.model_copy(update={"deterministic": True}))[1]
    rows = build_rows(segment, shards.read, args.device)
    for name in ("lean", "full") if args.full else ("lean",):
        model = load_model(directory, device=args.device).train()
        loops[name] = bare_loop(model, rows, config, full=name == "full")
    model = load_model(directory, device=args.device, packed=False).train()
    loops["padded"] = padded_loop(model, padded(samples, args.batch, args.device), config, loss)
    return trainer, loops


def figures_of(seconds: dict[str, list[float]], tokens: int, bound: float) -> list[Figure]:
    """npd against each of the others."""
    against = {
        "lean": ("bare packed SFT, logits at responses", Bar("ratio", ">=", 0.95)),
        "full": ("bare packed SFT, logits everywhere", None),
        "padded": ("npd's loss on padded batches", Bar("ratio", ">=", 2.0)),
    }
    variants = {
        "compiled": ("the same, layers compiled", "not compiled"),
        "deterministic": ("the same, deterministic algorithms", "without"),
    }
    own = [
        Figure(
            what,
            "tokens/s",
            speeds(tokens, seconds[name]),
            *(without, speeds(tokens, seconds["npd"]), faster(seconds[name], seconds["npd"])),
            bound=bound,
        )
        for name, (what, without) in variants.items()
        if name in seconds
    ]
    return own + [
        Figure(
            "near-policy training, CE + top-10 KD",
            "tokens/s",
            speeds(tokens, seconds["npd"]),
            *(against[name][0], speeds(tokens, taken), faster(seconds["npd"], taken)),
            against[name][1],
            bound,
        )
        for name, taken in seconds.items()
        if name in against
    ]


def parse_args() -> Any:
    """The command line."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 30), ("samples", 24), ("prompt", 64), ("response", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("batch", 8), ("row-tokens", 2048), ("rounds", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), default=SMALL)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], help="default: cpu on a CPU")
    parser.add_argument("--full", action="store_true", help="the `full` bare loop too")
    parser.add_argument("--compile", action="store_true", help="train.compile too")
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic too")
    args = parse(parser, {"layers": 2, "samples": 4, "response": 128, "rounds": 1})
    args.clock = args.clock or ("cpu" if args.device == "cpu" else "wall")
    return args


def main() -> None:
    """The loops in turn, matrix products before and after, and what reading rows takes."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    samples = random_samples(args.samples, args.prompt, args.response)
    segment = make_segment(samples, args.row_tokens)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = random_model(args.layers, "float32", shape=args.shape, device=args.device)
        model.save_pretrained(directory)
        del model
        shards = Shards(directory, samples)
        trainer, loops = make_loops(args, samples, shards, segment, directory)
        report = trainer.train(segment).steps[0]
        rates = [matmul_rate(args.device, args.dtype, args.clock)]
        seconds = take_turns(loops, args.rounds, args.clock)
        rates.append(matmul_rate(args.device, args.dtype, args.clock))
        shards.open_anew()
        rows = timed(lambda: build_rows(segment, shards.read, args.device), args.clock)
    flops = step_flops(llama_config(args.layers, shape=args.shape), samples)
    details = {
        "seconds": seconds,
        "read_and_build_share": rows / statistics.median(seconds["npd"]),
        "tokens": report.total_tokens,
        "response_tokens": report.response_tokens,
        "rows": report.num_rows,
        "fill": report.fill,
        "padded_fill": padded_fill(samples, args.batch),
        "padded_fill_of_1000_shuffles": padded_fill(samples, args.batch, 1000),
        "step_gflop": flops / 1e9,
        "matmul_gflop_per_s": [rate / 1e9 for rate in rates],
    }
    bound = report.total_tokens * max(rates) / flops
    publish(args, figures_of(seconds, report.total_tokens, bound), details)


if __name__ == "__main__":
    main()

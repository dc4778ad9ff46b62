"""Time and peak memory of the near-policy loss, forward and backward: chunked beside reference.

    python benchmarks/bench_loss.py [--tokens 2048] [--vocab 49152] [--dtype bfloat16] [--threads 1]

Each variant of each round runs in a process of its own, in turns; "peak" is how far that process
grew (resident set) beyond what it held with its inputs in place, weight and hidden gradients
included. Time is CPU time. Runs on CPU; figures of other machines differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from common import Figure, Spread, faster, make_parser, parse, peak_mib, publish, timed

REFERENCE, CHUNKED = ("reference", "topk", 0), ("chunked", "topk", 1024)
VARIANTS = (
    REFERENCE,
    CHUNKED,
    ("chunked", "topk", 256),
    ("chunked", "tail", 1024),
    ("chunked", "ce only", 1024),
)


def measure_apart(variant: tuple[str, str, int]) -> list[float]:
    """Seconds and peak of one variant, in a process of its own with these options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", json.dumps(variant)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: list[float] = json.loads(done.stdout)
    return values


def measure(args: argparse.Namespace, impl: str, target: str, chunk: int) -> tuple[float, float]:
    """CPU seconds and growth in MiB of one forward and backward, in this process."""
    import torch

    from npd.train.loss import near_policy_loss

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width).to(getattr(torch, args.dtype))
    weight = torch.randn(args.vocab, args.width) / args.width**0.5
    labels = torch.randint(args.vocab, (args.tokens,))
    ids = torch.rand(args.tokens, args.vocab // 8).topk(args.k, dim=-1).indices
    logprobs = torch.randn(args.tokens, args.k).log_softmax(-1) - 0.05
    options = {"kd_weight": 0.0, "target": "topk"} if target == "ce only" else {"target": target}

    def step(hidden: torch.Tensor, weight: torch.Tensor, *targets: torch.Tensor) -> None:
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        out = near_policy_loss(hidden, weight, *targets, impl=impl, chunk=chunk or 1, **options)
        out.loss.backward()

    # A tiny step first, so that what the libraries load once is not counted.
    step(hidden[:8], weight[:64], labels[:8] % 64, torch.arange(args.k).expand(8, -1), logprobs[:8])
    before = peak_mib()
    seconds = [
        timed(lambda: step(hidden, weight, labels, ids, logprobs), "cpu")
        for _ in range(args.repeats)
    ]
    return min(seconds), peak_mib() - before


def figures_of(found: dict[tuple[str, str, int], list[list[float]]]) -> list[Figure]:
    """Chunked against reference, in time and in memory."""
    own, reference = found[CHUNKED], found[REFERENCE]
    figures = []
    for place, (what, unit) in enumerate((("time", "s"), ("peak memory", "MiB"))):
        ours, theirs = ([values[place] for values in each] for each in (own, reference))
        figures.append(
            Figure(
                f"loss, CE + top-10 KD, {what}",
                unit,
                Spread.of(ours),
                "reference, all logits at once",
                Spread.of(theirs),
                faster(ours, theirs),
            )
        )
    return figures


def main() -> None:
    """Run every variant in turn."""
    parser = make_parser(__doc__)
    for name, value in (("tokens", 2048), ("width", 576), ("vocab", 49152), ("k", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="steps a process, the best counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    args = parse(parser, {"tokens": 128, "repeats": 1, "rounds": 1})
    if args.only:
        print(json.dumps(measure(args, *args.only)))
        return
    variants = VARIANTS[:2] if args.quick else VARIANTS
    found: dict[tuple[str, str, int], list[list[float]]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            found[variant].append(measure_apart(variant))
    details: list[dict[str, Any]] = [
        {
            "impl": impl,
            "target": target,
            "chunk": chunk or None,
            "seconds": [seconds for seconds, _ in values],
            "peak_mib": [peak for _, peak in values],
        }
        for (impl, target, chunk), values in found.items()
    ]
    publish(args, figures_of(found), details)


if __name__ == "__main__":
    main()

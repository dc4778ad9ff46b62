"""Time and peak memory of the near-policy loss, forward and backward: chunked beside reference.

    python benchmarks/bench_loss.py [--tokens 2048] [--vocab 49152] [--dtype bfloat16] [--threads 1]

Prints one row a variant. Each runs in a process of its own; "peak" is how far the process grew
(resident set) beyond what it held with its inputs in place, weight and hidden gradients included.
Times are the best of `--repeats`. Runs on CPU; figures of other machines differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

VARIANTS = (
    ("reference", "topk", 0),
    ("chunked", "topk", 256),
    ("chunked", "topk", 1024),
    ("chunked", "tail", 1024),
    ("chunked", "ce only", 1024),
)


def main() -> None:
    """Run every variant and print the table."""
    args = _parse()
    if args.only:
        print(json.dumps(_measure(args, *json.loads(args.only))))
        return
    print(f"N={args.tokens} d={args.width} V={args.vocab} k={args.k} {args.dtype}", end=" ")
    print(f"{args.threads} thread(s), forward + backward")
    print("| impl | target | chunk | seconds | peak MiB |\n|---|---|---|---|---|")
    for impl, target, chunk in VARIANTS:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--only",
            json.dumps([impl, target, chunk]),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak = json.loads(done.stdout)
        print(f"| {impl} | {target} | {chunk or '-'} | {seconds:.2f} | {peak:.0f} |", flush=True)


def _measure(args: argparse.Namespace, impl: str, target: str, chunk: int) -> tuple[float, float]:
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

    def step(hidden: torch.Tensor, weight: torch.Tensor, *targets: torch.Tensor) -> float:
        start = time.perf_counter()
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        out = near_policy_loss(hidden, weight, *targets, impl=impl, chunk=chunk or 1, **options)
        out.loss.backward()
        return time.perf_counter() - start

    # A tiny step first, so that what the libraries load once is not counted.
    step(hidden[:8], weight[:64], labels[:8] % 64, torch.arange(args.k).expand(8, -1), logprobs[:8])
    before = _peak_mib()
    seconds = min(step(hidden, weight, labels, ids, logprobs) for _ in range(args.repeats))
    return seconds, _peak_mib() - before


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 2048), ("width", 576), ("vocab", 49152), ("k", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

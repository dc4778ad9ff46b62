"""Time and peak memory of the near-policy loss, forward and backward: npd's beside its reference.

    python benchmarks/bench_loss.py [--tokens 2048] [--vocab 49152] [--dtype bfloat16] [--threads 1]
    python benchmarks/bench_loss.py --device cuda       # N 16,384, d 2,048, V 151,936 by default

Hidden states are in `--dtype`, the head's weight is a float32 master, as in npd's trainer. Variants
take turns, on a CPU each in a process of its own. "Memory" is what the process needed at its peak
beyond its inputs and their gradients: on CPU the growth of its resident set from where the inputs
were in place, on CUDA the allocator's peak minus what it held then; from both the bytes of both
gradients are taken off. Time is CPU time (CUDA: wall time to the device's end).
"matmul" is the bound: the head's product (N x d x V, in `--dtype`) three times, nothing else; the
share of it is its time over the loss's. Where Liger is installed (CUDA only), its fused linear
cross-entropy runs on the same inputs, the weight cast inside as here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from common import Bar, Figure, Spread, faster, make_parser, parse, peak_mib, publish, timed

Variant = tuple[str, str, int]  # who, target, chunk (0: chosen by npd)
REFERENCE, MATMUL, LIGER = ("reference", "topk", 0), ("matmul", "", 0), ("liger", "ce only", 0)
SIZES = {"cpu": (2048, 576, 49_152), "cuda": (16_384, 2048, 151_936)}
MIB = 2**20


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """The one that is judged, what it is held against, and others."""
    own = "triton" if args.device == "cuda" else "chunked"
    some: list[Variant] = [(own, "topk", 0), REFERENCE, MATMUL]
    if args.device == "cuda":
        some += [("chunked", "topk", 0), (own, "ce only", 0)]
        some += [LIGER] * (find_spec("liger_kernel") is not None)
    if not args.quick:
        some += [(own, "topk", chunk) for chunk in (128, 1024)]
        some += [(own, "tail", 0), (own, "ce only", 0)] if args.device == "cpu" else []
    return some


def measure_apart(variant: Variant) -> list[float]:
    """Seconds and MiB of one variant, in a process of its own with these options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", json.dumps(variant)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: list[float] = json.loads(done.stdout)
    return values


def measure(args: argparse.Namespace, variant: Variant) -> tuple[float, float]:
    """Seconds of one forward and backward, and MiB beyond inputs and gradients, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    inputs = make_inputs(args, args.tokens, args.vocab)
    # A tiny step first, so that what the libraries load once is not counted.
    step_of(variant)(*make_inputs(args, 8, 64))
    step, is_cuda = step_of(variant), args.device == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    else:
        before = peak_mib()
    clock = "wall" if is_cuda else "cpu"
    seconds = [timed(lambda: step(*inputs), clock) for _ in range(args.repeats)]
    peak = torch.cuda.max_memory_allocated() / MIB if is_cuda else peak_mib()
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in inputs[:2]) / MIB
    return min(seconds), peak - before - gradients


def make_inputs(args: argparse.Namespace, tokens: int, vocab: int) -> tuple[Any, ...]:
    """Hidden states, weight, labels, and a teacher's top-k; nothing larger exists on the way."""
    import torch

    options: dict[str, Any] = {"device": args.device}
    hidden = torch.randn(tokens, args.width, dtype=getattr(torch, args.dtype), **options)
    weight = torch.randn(vocab, args.width, **options).div_(args.width**0.5)
    labels = torch.randint(vocab, (tokens,), **options)
    # Distinct ids, spread over the vocabulary from a random first one.
    ids = labels[:, None] + torch.arange(args.k, **options) * (vocab // args.k)
    logprobs = torch.randn(tokens, args.k, **options).log_softmax(-1) - 0.05
    return hidden, weight, labels, ids % vocab, logprobs


def step_of(variant: Variant) -> Callable[..., None]:
    """Forward and backward of a variant."""
    who, target, chunk = variant

    def step(hidden: Any, weight: Any, labels: Any, *teacher: Any) -> None:
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        if who == "liger":
            from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

            out = LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight.to(hidden.dtype), labels
            )
            (out[0] if isinstance(out, tuple) else out).backward()
            return
        from npd import near_policy_loss

        options: dict[str, Any] = {"target": target} if target != "ce only" else {"kd_weight": 0.0}
        near_policy_loss(
            hidden, weight, labels, *teacher, impl=who, chunk=chunk or None, **options
        ).loss.backward()

    def matmul(hidden: Any, weight: Any, *_: Any) -> None:
        narrow = weight.to(hidden.dtype)
        for start in range(0, len(hidden), 2048):
            for _ in range(3):
                hidden[start : start + 2048] @ narrow.t()

    return matmul if who == "matmul" else step


def figures_of(found: dict[Variant, list[list[float]]], *, device: str) -> list[Figure]:
    """npd's against its reference, the bound and (if there) Liger, with the bars of the device."""
    judged = next(iter(found))

    def column(variant: Variant, place: int) -> list[float]:
        return [values[place] for values in found[variant]]

    def figure(what: str, place: int, against: str, other: Variant, bar: float | None) -> Figure:
        own = judged if other[1] != "ce only" else (judged[0], "ce only", 0)
        ours, theirs = column(own, place), column(other, place)
        return Figure(
            f"loss, {'CE' if other is LIGER else 'CE + top-k KD'}, {what}",
            ("s", "MiB")[place],
            Spread.of(ours),
            against,
            Spread.of(theirs),
            faster(ours, theirs),
            None if bar is None else Bar("ratio", ">=", bar),
        )

    whole, less = "reference, all logits at once", "memory beyond inputs and gradients"
    figures = [
        figure("time", 0, whole, REFERENCE, 1.0),
        figure(less, 1, whole, REFERENCE, 37.0 if device == "cuda" else 10.0),
        figure("time", 0, "its three matmuls alone", MATMUL, None),
    ]
    if LIGER in found:
        figures.append(figure("time", 0, "Liger fused linear CE", LIGER, 1 / 1.1))
    return figures


def main() -> None:
    """Run every variant in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name in ("tokens", "width", "vocab"):
        parser.add_argument(f"--{name}", type=int, help=f"{SIZES['cpu']} or {SIZES['cuda']}")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="steps a process, the best counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    args = parse(parser, {"tokens": 128, "repeats": 1, "rounds": 1})
    for name, value in zip(("tokens", "width", "vocab"), SIZES[args.device], strict=True):
        setattr(args, name, getattr(args, name) or value)
    if args.only:
        print(json.dumps(measure(args, tuple(args.only))))
        return
    found: dict[Variant, list[list[float]]] = {variant: [] for variant in variants_of(args)}
    for _ in range(args.rounds):
        for variant in found:
            is_apart = args.device == "cpu"
            one = measure_apart(variant) if is_apart else list(measure(args, variant))
            found[variant].append(one)
    details = [
        {
            "who": who,
            "target": target,
            "chunk": chunk or None,
            "seconds": [seconds for seconds, _ in values],
            "memory_mib": [memory for _, memory in values],
        }
        for (who, target, chunk), values in found.items()
    ]
    publish(args, figures_of(found, device=args.device), details)


if __name__ == "__main__":
    main()

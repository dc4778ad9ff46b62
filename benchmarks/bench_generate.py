"""Own decode loop against `model.generate`: tokens per second at the same batch size.

A random Llama of `--shape` (SmolLM2-135M's) in bfloat16, sampling at temperature 1, no stop ids,
log-probabilities on our side only. Three workloads, in each of which both write exactly the same
number of tokens for each prompt: responses of one length; lengths drawn from a log-normal (a limit
of its own for each row, on both sides), as real ones spread; and such lengths with several samples
of each long prompt. `model.generate` is given batch by batch in the order asked and keeps a row
until its batch is done: that is how its users meet it, but for cuDNN's attention on a GPU, which is
off on both sides. The two take turns, and the ratio is of paired rounds; by default of CPU time, on
one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --batch 32 --asks 64 --rounds 2
    python benchmarks/bench_generate.py --device cuda --shape qwen2.5-1.5b --layers 28 --batch 128
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common import (
    SHAPES,
    SMALL,
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
)
from npd.generate.decoding import without_cudnn_attention
from npd.generate.in_process import generate_with
from npd.generate.sampling import Sampling
from npd.types import EncodedPrompt, SampleRequest

# Of the logarithm of response lengths: chat data sets lie between 0.7 and 1.
SIGMA = 0.8
BAR = Bar("ratio", ">=", 2.0)


@dataclass(frozen=True, slots=True)
class Work:
    """What both sides do: `limits` are the tokens written for each ask."""

    what: str
    asks: list[SampleRequest]
    limits: list[int]
    batch: int
    bar: Bar | None = None

    def batches(self) -> Iterator[slice]:
        """The asks in the order asked, batch by batch."""
        for start in range(0, len(self.asks), self.batch):
            yield slice(start, start + self.batch)


def build_asks(count: int, low: int, high: int, group: int = 1) -> list[SampleRequest]:
    """`count` asks for `group` samples a prompt; random prompts of `low` to `high` tokens."""
    rng = np.random.default_rng(0)
    asks: list[SampleRequest] = []
    for index, length in enumerate(rng.integers(low, high + 1, count // group)):
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        prompt = EncodedPrompt(index, ids, ids[:1])
        asks += [SampleRequest(len(asks) + i, len(asks) + i, prompt) for i in range(group)]
    return asks


def log_normal_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Lengths of `mean` tokens before those above `longest` are cut to it."""
    normal = np.random.default_rng(1).normal(np.log(mean) - SIGMA**2 / 2, SIGMA, count)
    return [int(n) for n in np.exp(normal).round().clip(1, longest)]


def works(args: argparse.Namespace) -> dict[str, Work]:
    """The workloads by name."""
    count, batch = args.asks, args.batch
    lengths = log_normal_lengths(count, args.mean, args.longest)
    short = build_asks(count, args.prompt // 2, args.prompt)
    grouped = build_asks(count, 2 * args.prompt, 4 * args.prompt, args.group)
    return {
        "equal": Work(f"batch of {batch}", short[:batch], [args.new] * batch, batch),
        "log-normal": Work(
            f"{count} asks by {batch} rows, log-normal lengths", short, lengths, batch, BAR
        ),
        "groups": Work(
            f"{count} asks by {batch} rows, log-normal lengths, {args.group} a long prompt",
            grouped,
            lengths,
            batch,
            BAR,
        ),
    }


def own(model: Any, work: Work) -> int:
    """Decode with npd, log-probabilities and all; the tokens written."""
    sampling = Sampling(max(work.limits), frozenset(), 0, batch_size=work.batch)
    rollouts = generate_with(model, work.asks, sampling, limits=work.limits)
    assert [len(rollout.response_ids) for rollout in rollouts] == work.limits
    return sum(work.limits)


def reference(model: Any, work: Work) -> int:
    """Decode with transformers' own loop; the tokens written."""
    return sum(_generate(model, work.asks[part], work.limits[part]) for part in work.batches())


def _generate(model: Any, asks: list[SampleRequest], limits: list[int]) -> int:
    from transformers import StoppingCriteriaList

    width = max(len(ask.prompt.prompt_ids) for ask in asks)
    ids = torch.zeros(len(asks), width, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, ask in enumerate(asks):
        length = len(ask.prompt.prompt_ids)
        ids[row, width - length :] = torch.from_numpy(ask.prompt.prompt_ids.astype(np.int64))
        mask[row, width - length :] = 1
    most = torch.tensor(limits, device=model.device)
    written = torch.zeros_like(most)

    def is_done(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        written.copy_(most.clamp(max=ids.shape[1] - width))
        return written == most

    with without_cudnn_attention():
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([is_done]),
        )
    assert written.tolist() == limits
    return sum(limits)


def compare(model: Any, work: Work, rounds: int, clock: str) -> tuple[Figure, dict[str, Any]]:
    """Both engines in turn."""
    tokens, few = sum(work.limits), min(work.batch, len(work.asks))
    # Minutes a round, so two tokens a row have to do to warm up.
    warm = replace(work, asks=work.asks[:few], limits=[2] * few)
    own(model, warm)
    reference(model, warm)
    runs = {"own": lambda: own(model, work), "generate": lambda: reference(model, work)}
    seconds = take_turns(runs, rounds, clock, warm_up=False)
    figure = Figure(
        f"generation, {work.what}, with log-probs",
        "tokens/s",
        speeds(tokens, seconds["own"]),
        "model.generate",
        speeds(tokens, seconds["generate"]),
        faster(seconds["own"], seconds["generate"]),
        work.bar,
    )
    prompts = sum(len(ask.prompt.prompt_ids) for ask in work.asks)
    return figure, {"tokens": tokens, "prompt_tokens": prompts, "seconds": seconds}


def main() -> None:
    """Each workload in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--asks", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="longest; in groups 4 times that")
    parser.add_argument("--group", type=int, default=8, help="samples of each long prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens where all write as many")
    parser.add_argument("--mean", type=float, default=110, help="of log-normal lengths, uncut")
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", nargs="+", choices=["equal", "log-normal", "groups"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), default=SMALL)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], help="default: cpu on a CPU")
    quick = {"layers": 2, "batch": 4, "asks": 16, "new": 8, "mean": 10, "longest": 30, "rounds": 1}
    args = parse(parser, quick)
    args.clock = args.clock or ("cpu" if args.device == "cpu" else "wall")
    torch.set_num_threads(1)
    model = random_model(
        *(args.layers, args.dtype),
        **{"shape": args.shape, "device": args.device, "eos_token_id": None, "pad_token_id": 0},
    )
    chosen = works(args)
    found = {
        name: compare(model, chosen[name], args.rounds, args.clock) for name in args.work or chosen
    }
    figures = [figure for figure, _ in found.values()]
    publish(args, figures, {name: details for name, (_, details) in found.items()})


if __name__ == "__main__":
    main()

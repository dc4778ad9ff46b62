"""Own decode loop against `model.generate`: tokens per second at the same batch size.

A random 135M-shape Llama in bfloat16, prompts of mixed lengths, sampling at temperature 1, and no
stop ids, so that both write exactly the same number of tokens. The two take turns, and the ratio is
of paired rounds; by default of CPU time, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --batch 32 --new 32 --rounds 3
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from common import (
    VOCAB,
    Figure,
    faster,
    make_parser,
    parse,
    publish,
    random_model,
    speeds,
    take_turns,
)
from npd.generate.sampling import Sampling
from npd.generate.transformers import generate_with
from npd.types import Ask, EncodedPrompt


def build_asks(count: int, prompt: int, same: bool) -> list[Ask]:
    """Random prompts of `prompt` tokens, or of half as many up to `prompt`."""
    rng = np.random.default_rng(0)
    lengths = np.full(count, prompt) if same else rng.integers(prompt // 2, prompt + 1, count)
    asks = []
    for i, length in enumerate(lengths):
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        asks.append(Ask(i, i, EncodedPrompt(i, ids, ids[:1])))
    return asks


def own(model: Any, asks: list[Ask], new: int) -> int:
    """Decode with npd, log-probabilities and all; the tokens written."""
    sampling = Sampling(new, frozenset(), 0, batch_size=len(asks))
    return sum(len(rollout.response_ids) for rollout in generate_with(model, asks, sampling))


def reference(model: Any, asks: list[Ask], new: int) -> int:
    """Decode with transformers' own loop; the tokens written."""
    width = max(len(ask.prompt.prompt_ids) for ask in asks)
    ids = torch.zeros(len(asks), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, ask in enumerate(asks):
        length = len(ask.prompt.prompt_ids)
        ids[row, width - length :] = torch.from_numpy(ask.prompt.prompt_ids.astype(np.int64))
        mask[row, width - length :] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0
    )
    return int(out.shape[0] * (out.shape[1] - width))


def main() -> None:
    """Both engines in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same", action="store_true", help="prompts of one length (no padding)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    args = parse(parser, {"layers": 2, "batch": 4, "new": 8, "rounds": 1})
    torch.set_num_threads(1)
    model = random_model(args.layers, args.dtype, eos_token_id=None, pad_token_id=0)
    asks = build_asks(args.batch, args.prompt, args.same)
    tokens = own(model, asks, args.new)
    assert tokens == reference(model, asks, args.new) == args.batch * args.new
    runs = {
        "own": lambda: own(model, asks, args.new),
        "generate": lambda: reference(model, asks, args.new),
    }
    seconds = take_turns(runs, args.rounds, args.clock)
    figure = Figure(
        f"generation, batch of {args.batch}, with log-probs",
        "tokens/s",
        speeds(tokens, seconds["own"]),
        "model.generate",
        speeds(tokens, seconds["generate"]),
        faster(seconds["own"], seconds["generate"]),
    )
    publish(args, [figure], {"tokens": tokens, "seconds": seconds})


if __name__ == "__main__":
    main()

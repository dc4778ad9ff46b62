"""Own decode loop against `model.generate`: tokens per second at the same batch size.

A random 135M-shape Llama in bfloat16, prompts of mixed lengths, sampling at temperature 1, and no
stop ids, so that both write exactly the same number of tokens. The two take turns and the best of
the rounds counts: other load on the machine only ever slows a round down.

    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --batch 32 --new 32 --rounds 2
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from npd.generate.sampling import Sampling
from npd.generate.transformers import generate_with
from npd.types import Ask, EncodedPrompt

VOCAB = 49_152


def build_model(dtype: torch.dtype) -> Any:
    """The shape of SmolLM2-135M with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


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
    """Decode with npd; the tokens written."""
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
    """Print one line per engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--same", action="store_true", help="prompts of one length (no padding)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(getattr(torch, args.dtype))
    asks = build_asks(args.batch, args.prompt, args.same)
    best = {"own": 0.0, "generate": 0.0}
    for _ in range(args.rounds):
        for name, engine in (("own", own), ("generate", reference)):
            start = time.perf_counter()
            tokens = engine(model, asks, args.new)
            best[name] = max(best[name], tokens / (time.perf_counter() - start))
    for name, speed in best.items():
        print(f"{name:9s} {speed:7.1f} tokens/s  batch {args.batch}, prompt {args.prompt}")


if __name__ == "__main__":
    main()

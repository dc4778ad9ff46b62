"""Teacher scoring against the bare forward pass of the same rows, in tokens per second.

A randomly initialised Llama of SmolLM2-135M's shape scores synthetic samples: packed prefill, LM
head on the responses, top-k, log-sum-exp. The bare pass is `model(**row)` with logits at every
position and nothing done with them; the lean one has logits at response positions only, the least
that any scorer must compute. All see the same tokens (a response's last one predicts nothing and is
not fed), except `score_ifd`, which reads every response twice more: alone by the teacher and by the
student. They take turns; the ratio is of paired times, so a value above 1 says that the scorer is
faster than the bare pass. On a CPU, time is CPU time. Nothing is downloaded.

    python benchmarks/bench_score.py --threads 1 --rounds 4
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
)
from npd.attention import Boundaries
from npd.config import ScoreConfig
from npd.head import head_of
from npd.modeling import PackedBatch, hidden_states, load_model, pack_documents, resolve_device
from npd.pack import pack
from npd.score import build_scorer
from npd.types import FinishReason, Rollout


def make_rollouts(count: int, prompt: int, response: int) -> list[Rollout]:
    """Samples whose lengths vary by half around the given means."""
    rng = np.random.default_rng(0)

    def ids(mean: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(mean // 2, 3 * mean // 2 + 1)).astype(np.int32)

    header = np.arange(5, dtype=np.int32)
    return [
        Rollout(i, i, 0, ids(prompt), header, (y := ids(response)), -np.ones(len(y), np.float32),
                FinishReason.STOP, i)
        for i in range(count)
    ]  # fmt: skip


def packed_rows(
    rollouts: Sequence[Rollout], row_tokens: int, device: str
) -> list[tuple[PackedBatch, torch.Tensor]]:
    """Rows of the tokens that the scorer reads too, and the positions that predict responses."""
    rows = []
    lengths = [rollout.num_tokens - 1 for rollout in rollouts]
    for row in pack(lengths, row_tokens):
        members = [rollouts[i] for i in row]
        batch = pack_documents(
            [np.concatenate([r.prompt_ids, r.response_ids[:-1]]) for r in members], device
        )
        ends = zip(batch.cu_seqlens[1:], members, strict=True)
        positions = [torch.arange(end - len(r.response_ids), end) for end, r in ends]
        rows.append((batch, torch.cat(positions).to(device)))
    return rows


def bare_pass(model: Any, rows: Sequence[tuple[PackedBatch, torch.Tensor]]) -> None:
    """The forward pass with the model's own head at every position."""
    with torch.inference_mode():
        for batch, _ in rows:
            model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                cu_seqlens=Boundaries(batch.cu_seqlens),
            )


def lean_pass(
    model: Any, rows: Sequence[tuple[PackedBatch, torch.Tensor]], head_chunk: int
) -> None:
    """The forward pass with the head at response positions, in npd's chunks."""
    head = head_of(model)
    with torch.inference_mode():
        for batch, positions in rows:
            hidden = hidden_states(model, batch)[positions]
            for part in head.slices(len(hidden), head_chunk):
                head.logits(hidden[part])


def measure(args: argparse.Namespace, directory: Path) -> tuple[dict[str, list[float]], int]:
    """Seconds of each pass in turn, and the tokens of the samples."""
    device = resolve_device(args.device)
    config = ScoreConfig(
        top_k=args.top_k, row_tokens=args.row_tokens, head_chunk=args.head_chunk, dtype=args.dtype
    )
    common = {
        "teacher": directory, "vocab_size": VOCAB, "needs_student_pass": False, "support": "topk",
        "device": device, "trust_remote_code": False, "seed": 0,
    }  # fmt: skip
    plain = build_scorer(config, needs_ifd=False, **common)
    with_ifd = build_scorer(config, needs_ifd=True, **common)
    with_ifd.load_student(directory, 0)
    model = load_model(directory, dtype=args.dtype, device=device)
    rollouts = make_rollouts(args.samples, args.prompt, args.response)
    rows = packed_rows(rollouts, args.row_tokens, device)
    runs = {
        "score": lambda: plain.score(rollouts),
        "bare": lambda: bare_pass(model, rows),
        "lean": lambda: lean_pass(model, rows, args.head_chunk),
        "score_ifd": lambda: with_ifd.score(rollouts),
    }
    clock = "cpu" if device == "cpu" else "wall"
    return take_turns(runs, args.rounds, clock), sum(r.num_tokens for r in rollouts)


def figures_of(seconds: dict[str, list[float]], tokens: int) -> list[Figure]:
    """The scorer against the two passes."""
    pairs = (
        ("teacher scoring, top-10", "score", "bare", Bar("ratio", ">=", 0.85)),
        ("teacher scoring, top-10", "score", "lean", None),
        ("teacher scoring with Δ-IFD's answer-alone passes", "score_ifd", "bare", None),
    )
    names = {
        "bare": "teacher forward, logits everywhere",
        "lean": "teacher forward, logits at responses",
    }
    return [
        Figure(
            what,
            "tokens/s",
            speeds(tokens, seconds[ours]),
            names[theirs],
            speeds(tokens, seconds[theirs]),
            faster(seconds[ours], seconds[theirs]),
            bar,
        )
        for what, ours, theirs, bar in pairs
    ]


def main() -> None:
    """Score in turn with the bare passes."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 30), ("samples", 16), ("prompt", 64), ("response", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rounds", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("top-k", 10), ("row-tokens", 4096), ("head-chunk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    args = parse(parser, {"layers": 2, "samples": 4, "rounds": 1})
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        random_model(args.layers, "bfloat16").save_pretrained(directory)
        seconds, tokens = measure(args, Path(directory))
    publish(args, figures_of(seconds, tokens), {"tokens": tokens, "seconds": seconds})


if __name__ == "__main__":
    main()

"""Teacher scoring against the bare forward pass of the same rows, in tokens per second.

A random Llama of `--shape` (SmolLM2-135M's) scores synthetic samples: packed prefill, LM head on
the responses, top-k, log-sum-exp. It is held against forward passes of the same model over
exactly the tokens that the scorer feeds it (a response's last one predicts nothing and is not fed):

- logits everywhere: `model(**row)`, and nothing done with them;
- logits at responses: `model(**row, logits_to_keep=positions)`;
- the same in chunks that stay in the processor's caches, the least that any scorer must compute.

`score` reads each response after its prompt; `score_ifd`, as Δ-IFD needs it, after its prompt and
alone, in the same rows, and alone by the student too, a model of the same shape here. All take
turns; the ratio is of paired times, so a value above 1 says that the scorer is faster than the
forward pass. On a CPU, time is CPU time. Nothing is downloaded.

Prompts that samples share are fed once: `--per-prompt` samples of one prompt, with responses of 256
tokens, against samples of as many different prompts of that length.

Storage is the size of whole scored shards, uncompressed: per token of prompts and responses, where
the bar is 6 bytes x k + 16, and per response token, which pays for the prompts too.

    python benchmarks/bench_score.py --threads 1 --rounds 4
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from common import (
    SHAPES,
    SMALL,
    VOCAB,
    Bar,
    Figure,
    Spread,
    faster,
    make_parser,
    parse,
    publish,
    random_model,
    speeds,
    take_turns,
)
from npd.config import ScoreConfig
from npd.models.device import resolve_device
from npd.models.lm_head import head_of
from npd.models.loading import (
    PackedBatch,
    hidden_states,
    load_model,
    pack_documents,
)
from npd.models.packed_attention import Boundaries, row_of
from npd.pack import pack
from npd.score import build_scorer
from npd.store.shards import write_scored
from npd.types import FinishReason, IntArray, Rollout, Scored

Pair: TypeAlias = tuple[IntArray, IntArray]
Rows: TypeAlias = list[tuple[PackedBatch, torch.Tensor]]


def grouped(rollouts: Sequence[Rollout], size: int) -> tuple[list[Rollout], list[Rollout]]:
    """The samples with one prompt for each `size` of them, and with different ones as long."""
    rng, apart, shared = np.random.default_rng(1), [], []
    for place, rollout in enumerate(rollouts):
        prompt = rollouts[place - place % size].prompt_ids
        other = rng.integers(0, VOCAB, len(prompt)).astype(np.int32)
        shared.append(replace(rollout, prompt_ids=prompt))
        apart.append(replace(rollout, prompt_ids=other))
    return shared, apart


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


def packed_rows(pairs: Sequence[Pair], row_tokens: int, device: str) -> Rows:
    """Rows of the tokens that the scorer feeds, and the positions that predict responses."""
    rows = []
    lengths = [len(context) + len(response) - 1 for context, response in pairs]
    for row in pack(lengths, row_tokens):
        members = [pairs[i] for i in row]
        batch = pack_documents([np.concatenate([c, y[:-1]]) for c, y in members], device)
        ends = zip(batch.cu_seqlens[1:], members, strict=True)
        positions = [torch.arange(end - len(response), end) for end, (_, response) in ends]
        rows.append((batch, torch.cat(positions).to(device)))
    return rows


def bare_pass(model: Any, rows: Rows, *, everywhere: bool) -> None:
    """The model's own forward pass, with logits at every position or at responses."""
    with torch.inference_mode():
        for batch, positions in rows:
            with row_of(Boundaries(batch.cu_seqlens)):
                model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    logits_to_keep=0 if everywhere else positions,
                )


def chunked_pass(model: Any, rows: Rows, head_chunk: int) -> None:
    """The forward pass with the head at response positions, in npd's chunks."""
    head = head_of(model)
    with torch.inference_mode():
        for batch, positions in rows:
            hidden = hidden_states(model, batch)[positions]
            for part in head.slices(len(hidden), head_chunk):
                head.logits(hidden[part])


def measure(
    args: argparse.Namespace, directory: Path
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each pass in turn, and the tokens that each scorer feeds to its models."""
    device = resolve_device(args.device)
    config = ScoreConfig(
        top_k=args.top_k, row_tokens=args.row_tokens, head_chunk=args.head_chunk, dtype=args.dtype
    )
    common = {
        "teacher": directory, "vocab_size": SHAPES[args.shape][0], "needs_student_pass": False,
        "support": "topk", "device": device, "trust_remote_code": False, "seed": 0,
    }  # fmt: skip
    plain = build_scorer(config, needs_ifd=False, **common)
    with_ifd = build_scorer(config, needs_ifd=True, **common)
    with_ifd.load_student(directory, 0)
    model = load_model(directory, dtype=args.dtype, device=device)
    rollouts = make_rollouts(args.samples, args.prompt, args.response)
    whole = [(r.prompt_ids, r.response_ids) for r in rollouts]
    alone = [(r.header_ids, r.response_ids) for r in rollouts]
    rows = packed_rows(whole, args.row_tokens, device)
    # The teacher's rows and the student's: one model serves for both.
    ifd_rows = packed_rows(whole + alone, args.row_tokens, device)
    ifd_rows += packed_rows(alone, args.row_tokens, device)
    runs: dict[str, Callable[[], object]] = {
        "score": lambda: plain.score(rollouts),
        "score_ifd": lambda: with_ifd.score(rollouts),
    }
    longer = make_rollouts(2 * args.per_prompt, args.prompt, 256)
    for name, samples in zip(("shared", "apart"), grouped(longer, args.per_prompt), strict=True):
        runs[name] = partial(plain.score, samples)
    for name, fed in (("", rows), ("_ifd", ifd_rows)):
        runs |= {
            f"bare{name}": partial(bare_pass, model, fed, everywhere=True),
            f"lean{name}": partial(bare_pass, model, fed, everywhere=False),
            f"chunked{name}": partial(chunked_pass, model, fed, args.head_chunk),
        }
    tokens = {
        name: sum(batch.cu_seqlens[-1] for batch, _ in fed)
        for name, fed in (("score", rows), ("score_ifd", ifd_rows))
    }
    tokens["shared"] = sum(rollout.num_tokens for rollout in longer)
    clock = "cpu" if device == "cpu" else "wall"
    return take_turns(runs, args.rounds, clock), tokens


def figures_of(seconds: dict[str, list[float]], tokens: dict[str, int]) -> list[Figure]:
    """The scorer against the forward passes over its tokens, and Δ-IFD against scoring alone."""
    bar = Bar("ratio", ">=", 0.90)
    passes = (
        ("bare", "forward, logits everywhere", bar),
        ("lean", "forward, logits at responses", bar),
        ("chunked", "the same in chunks", bar),
    )
    kinds = (
        ("", "teacher scoring, top-10"),
        ("_ifd", "scoring for Δ-IFD, prompts and alone"),
    )
    figures = [
        Figure(
            what,
            "tokens/s",
            speeds(tokens[f"score{kind}"], seconds[f"score{kind}"]),
            against,
            speeds(tokens[f"score{kind}"], seconds[f"{theirs}{kind}"]),
            faster(seconds[f"score{kind}"], seconds[f"{theirs}{kind}"]),
            limit,
        )
        for kind, what in kinds
        for theirs, against, limit in passes
    ]
    return [
        *figures,
        Figure(
            "what Δ-IFD costs: samples scored for it",
            "tokens/s",
            speeds(tokens["score"], seconds["score_ifd"]),
            "without it",
            speeds(tokens["score"], seconds["score"]),
            faster(seconds["score_ifd"], seconds["score"]),
        ),
        Figure(
            "teacher scoring, samples that share prompts",
            "tokens/s",
            speeds(tokens["shared"], seconds["shared"]),
            "each with a prompt of its own",
            speeds(tokens["shared"], seconds["apart"]),
            faster(seconds["shared"], seconds["apart"]),
        ),
    ]


def storage(directory: Path, prompt: int, response: int) -> dict[int, dict[str, float]]:
    """Bytes of a scored shard by k: per response token, the whole file; and what one more of those
    adds to its columns (in the file each is padded to a multiple of 64 bytes)."""
    found = {}
    whole = make_rollouts(64, prompt, response)
    halves = [shortened(rollout) for rollout in whole]  # of the same prompts
    for k in (10, 32, 64):
        columns, files, tokens = [], [], []
        for rollouts in (halves, whole):
            path = directory / f"{k}-{len(files)}.arrow"
            write_scored(path, [scored_of(rollout, k) for rollout in rollouts])
            files.append(path.stat().st_size)
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                columns.append(reader.read_next_batch().nbytes)
            tokens.append(sum(len(rollout.response_ids) for rollout in rollouts))
        added = (columns[1] - columns[0]) / (tokens[1] - tokens[0])
        found[k] = {"added": added, "whole": files[1] / tokens[1]}
    return found


def shortened(rollout: Rollout) -> Rollout:
    """The first half of a response."""
    size = len(rollout.response_ids) // 2
    assert rollout.logprobs is not None
    return replace(
        rollout, response_ids=rollout.response_ids[:size], logprobs=rollout.logprobs[:size]
    )


def scored_of(rollout: Rollout, k: int) -> Scored:
    """A record of that width; what it says does not change its size."""
    size = len(rollout.response_ids)
    ids = np.tile(np.arange(k, dtype=np.int32), (size, 1))
    nll = (1.0, 2.0, 1.0, 2.0)
    return Scored(rollout, ids, np.full((size, k), -5, np.float32), rollout.logprobs, *nll)


def storage_figures(found: dict[int, dict[str, float]]) -> list[Figure]:
    """Bytes a token for each k, and the bar."""
    return [
        Figure(
            f"scored shard, top-{k}, {what}",
            "bytes",
            Spread.of([sizes[name]]),
            bar=Bar("ours", "<=", 6 * k + 16) if name == "added" else None,
        )
        for k, sizes in found.items()
        for name, what in (
            ("added", "a response token more"),
            ("whole", "a response token, all in"),
        )
    ]


def main() -> None:
    """Score in turn with the forward passes."""
    parser = make_parser(__doc__)
    for name, default in (("layers", 30), ("samples", 16), ("prompt", 64), ("response", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rounds", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("top-k", 10), ("row-tokens", 4096), ("per-prompt", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-chunk", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), default=SMALL)
    parser.add_argument("--device", default="auto")
    args = parse(parser, {"layers": 2, "samples": 4, "rounds": 1})
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        device = resolve_device(args.device)
        model = random_model(args.layers, "bfloat16", shape=args.shape, device=device)
        model.save_pretrained(directory)
        del model
        seconds, tokens = measure(args, Path(directory))
        sizes = storage(Path(directory), args.prompt, args.response)
    figures = figures_of(seconds, tokens) + storage_figures(sizes)
    publish(args, figures, {"tokens": tokens, "seconds": seconds, "bytes": sizes})


if __name__ == "__main__":
    main()

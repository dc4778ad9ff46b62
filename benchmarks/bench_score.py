"""Teacher scoring against the bare forward pass of the same rows, in tokens per second.

A randomly initialised Llama of SmolLM2-135M's shape scores synthetic samples: packed prefill, LM
head on the responses, top-k, log-sum-exp. The bare pass is `model(**row)` with logits at every
position and nothing done with them. Both are run alternately; the ratio is of paired times, so a
value above 1 says that the scorer is faster than the bare pass. On a CPU, time is CPU time (all
threads together). Nothing is downloaded.

    python benchmarks/bench_score.py --threads 1 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from npd.config import ScoreConfig
from npd.modeling import hidden_states, load_model, pack_documents, resolve_device
from npd.score.transformers import TransformersScorer
from npd.types import FinishReason, Rollout

VOCAB = 49152


def save_teacher(directory: Path) -> None:
    """Save the random teacher, in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)


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


def documents_of(rollouts: Sequence[Rollout], row_tokens: int) -> list[list[np.ndarray]]:
    """The scorer's own rows of conditional documents, whole."""
    rows: list[list[np.ndarray]] = [[]]
    for r in sorted(rollouts, key=lambda r: -r.num_tokens):
        document = np.concatenate([r.prompt_ids, r.response_ids])
        fits = (row for row in rows if sum(map(len, row)) + len(document) <= row_tokens)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(document)
    return [row for row in rows if row]


def bare_pass(model: object, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """The forward pass with the model's own head at every position."""
    with torch.inference_mode():
        for row in rows:
            batch = pack_documents(row, model.device)
            model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                cu_seqlens=batch.cu_seqlens,
            )


def backbone_pass(model: object, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """The forward pass without any head: what no scorer can be faster than."""
    with torch.inference_mode():
        for row in rows:
            hidden_states(model, pack_documents(row, model.device))


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call: the process's CPU time on a CPU, so that neighbours on the machine do not
    count, wall time (device included) elsewhere."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    found = (statistics.median(values), min(values), max(values))
    return dict(zip(("median", "min", "max"), (round(x, 3) for x in found), strict=True))


def measure(args: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Alternate the passes `repeats` times after one warm-up."""
    device = resolve_device(args.device)
    config = ScoreConfig(
        top_k=args.top_k, row_tokens=args.row_tokens, head_chunk=args.head_chunk, dtype=args.dtype
    )
    common = {"teacher": directory, "vocab_size": VOCAB, "device": device}
    plain = TransformersScorer(config, needs_ifd=False, needs_student_pass=False, **common)
    with_ifd = TransformersScorer(config, needs_ifd=True, needs_student_pass=False, **common)
    with_ifd.load_student(directory, 0)
    model = load_model(directory, dtype=args.dtype, device=device)
    rollouts = make_rollouts(args.samples, args.prompt, args.response)
    rows = documents_of(rollouts, args.row_tokens)
    runs = {
        "bare": lambda: bare_pass(model, rows),
        "backbone": lambda: backbone_pass(model, rows),
        "score": lambda: plain.score(rollouts),
        "score_ifd": lambda: with_ifd.score(rollouts),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            took = seconds(run, device)
            if repeat:
                times[name].append(took)
    tokens = sum(r.num_tokens for r in rollouts)
    return {
        "tokens": tokens,
        "response_tokens": sum(len(r.response_ids) for r in rollouts),
        "rows": len(rows),
        "tokens_per_second": {n: summary([tokens / t for t in ts]) for n, ts in times.items()},
        "speed_over_bare": {
            n: summary([b / t for b, t in zip(times["bare"], ts, strict=True)])
            for n, ts in times.items()
        },
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("samples", 24), ("prompt", 64), ("response", 96), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("top-k", 10), ("row-tokens", 4096), ("head-chunk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        save_teacher(Path(directory))
        result = measure(args, Path(directory))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"machine": platform.processor() or platform.machine(), **versions}
    print(json.dumps({"settings": vars(args), **machine, **result}, indent=2))


if __name__ == "__main__":
    main()

"""Near-policy training against a bare packed-SFT loop: tokens per second, same model and rows.

Both train a random Llama of SmolLM2-135M's shape (`--layers` of its 30) with float32 weights, fused
AdamW and clipping, through the same packed attention, on the same rows. The trainer does all it
does in a run: reading samples, CE + top-k KD, drift and the other metrics, the finiteness check.
The bare loops do cross-entropy and nothing else: `lean` takes logits at response positions only,
`full` at all positions with the others' labels ignored, as Hugging Face models do. They take turns,
in changing order; the ratio is of paired rounds, its median and range are printed, and written as
JSON with `--out`.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --layers 6 --rounds 7 --clock cpu
    python benchmarks/bench_train.py --device cuda --samples 128 --response 512 --row-tokens 32768
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from npd.config import LossConfig, TrainConfig
from npd.modeling import head_of, hidden_states, load_model, pack_documents
from npd.pack import pack
from npd.train.batch import build_row
from npd.train.trainer import Trainer, build_optimizer
from npd.types import FinishReason, Rollout, Row, SampleRef, Scored, Segment, Step

VOCAB, TOP_K = 49_152, 10


def save_random_model(directory: Path, layers: int) -> None:
    """The shape of SmolLM2-135M with random weights and `layers` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def random_samples(count: int, prompt: int, response: int) -> list[Scored]:
    """Random text of half to full these lengths, each token with a random top-10 of mass 0.9."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(1, VOCAB, shape).astype(np.int32)

    samples = []
    for i in range(count):
        before, length = rng.integers((prompt // 2, response // 2), (prompt + 1, response + 1))
        shares = np.sort(rng.dirichlet(np.ones(TOP_K), length), axis=-1)[:, ::-1]
        logprobs = np.log(0.9 * shares + 1e-9).astype(np.float32)
        own = np.full(length, -np.log(VOCAB), np.float32)
        # Spread over the vocabulary and distinct, as a teacher's ids are.
        support = (ids(length, 1) + 4_801 * np.arange(TOP_K, dtype=np.int32)) % VOCAB
        rollout = Rollout(i, i, 0, ids(before), ids(1), ids(length), own, FinishReason.STOP, i)
        samples.append(Scored(rollout, support, logprobs, own, 1.0))
    return samples


def make_segment(samples: list[Scored], capacity: int) -> Segment:
    """One step over all samples, packed."""
    refs = [SampleRef(i, 0, 0, s.rollout.num_tokens) for i, s in enumerate(samples)]
    rows = pack([ref.num_tokens for ref in refs], capacity)
    packed = tuple(Row(tuple(refs[i] for i in row)) for row in rows)
    return Segment(0, 0, (Step(0, 1e-5, (packed,)),))


def bare_loop(
    model: Any, samples: list[Scored], segment: Segment, config: TrainConfig, *, full: bool
) -> Callable[[], None]:
    """A step of plain packed SFT: forward, cross-entropy on full logits, backward, clip, AdamW."""
    optimizer = build_optimizer(model, config)
    rows = [
        [samples[ref.sample_id].rollout for ref in row.samples] for row in segment.steps[0].ranks[0]
    ]
    tokens = sum(len(r.response_ids) for row in rows for r in row)
    device = model.device

    def loss_of(rollouts: list[Rollout]) -> torch.Tensor:
        documents = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        labels = [
            np.concatenate([np.full(len(r.prompt_ids), -100), r.response_ids]) for r in rollouts
        ]
        packed = pack_documents(documents, device)
        shifted = torch.from_numpy(np.concatenate(labels)).long().roll(-1).to(device)
        hidden = hidden_states(model, packed)
        if not full:
            kept = (shifted != -100).nonzero()[:, 0]
            hidden, shifted = hidden[kept], shifted[kept]
        logits = F.linear(hidden, head_of(model).weight).float()
        return F.cross_entropy(logits, shifted, ignore_index=-100, reduction="sum") / tokens

    def step() -> None:
        total = 0.0
        for rollouts in rows:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = loss_of(rollouts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], Any], clock: str) -> float:
    """Seconds of one step, the device's work included; `cpu` leaves out waiting for a core."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    started = now()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - started


def compare(loops: dict[str, Callable[[], Any]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds per round of each loop; the order turns, and the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for index in range(rounds + 1):
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned:
            taken = timed(loops[name], clock)
            if index > 0:
                seconds[name].append(taken)
    return seconds


def summary(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Median tokens per second of each, and npd's ratio to each bare loop over paired rounds."""
    out: dict[str, Any] = {
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()}
    }
    for name in seconds.keys() - {"npd"}:
        ratios = [b / a for a, b in zip(seconds["npd"], seconds[name], strict=True)]
        out[f"ratio_to_{name}"] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }
    return out


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: on a busy machine, one thread",
    )
    parser.add_argument("--no-full", action="store_true", help="leave out the `full` bare loop")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


def main() -> None:
    """Print the speeds, the ratios, and where they were measured."""
    args = parse()
    torch.set_num_threads(args.threads)
    samples = random_samples(args.samples, args.prompt, args.response)
    segment = make_segment(samples, args.row_tokens)
    config = TrainConfig(dtype=args.dtype, row_tokens=args.row_tokens)
    with tempfile.TemporaryDirectory() as directory:
        save_random_model(Path(directory), args.layers)
        trainer = Trainer(
            config,
            LossConfig(chunk=args.chunk),
            student=directory,
            read=lambda ref: samples[ref.sample_id],
            device=args.device,
        )
        loops: dict[str, Callable[[], Any]] = {"npd": lambda: trainer.train(segment)}
        for name in ("lean",) if args.no_full else ("lean", "full"):
            model = load_model(directory, device=args.device).train()
            loops[name] = bare_loop(model, samples, segment, config, full=name == "full")
    report = trainer.train(segment).steps[0]
    seconds = compare(loops, args.rounds, args.clock)
    rows = [[samples[ref.sample_id] for ref in row.samples] for row in segment.steps[0].ranks[0]]
    building = timed(
        lambda: [build_row(row, version=0, device=args.device) for row in rows], args.clock
    )
    result = {
        "npd": summary(seconds, report.total_tokens),
        "build_rows_share": building / statistics.median(seconds["npd"]),
        "step": {
            "tokens": report.total_tokens,
            "response_tokens": report.response_tokens,
            "rows": report.num_rows,
            "fill": report.fill,
        },
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

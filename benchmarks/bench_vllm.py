"""Generation by a vLLM server against the transformers engine, and what the client itself costs.

The real SmolLM2-135M-Instruct in bfloat16 on CPU, the same 128 prompts, sampling at temperature 1,
responses as long as they come out (at most `--new` tokens). The server computes on one thread, the
engine in process too; they take turns, and the ratio is of paired rounds of wall time. The client's
share is its CPU time from the first request to the stored shard over that wall time, with all
requests in flight at once. Needs `make vllm`.

    OMP_NUM_THREADS=1 python benchmarks/bench_vllm.py --requests 128 --new 128 --rounds 3
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from common import ROOT, Bar, Figure, Spread, make_parser, parse, publish
from npd.chat import Chat
from npd.config import GenerateConfig, LaunchConfig
from npd.generate.base import Generator, build_generator
from npd.generate.served import Surroundings
from npd.modeling import load_model
from npd.prepare import import_gguf, smollm2_gguf
from npd.store.shards import write_rollouts
from npd.train.checkpoint import save_pretrained
from npd.types import Ask, Prompt, Rollout

# The in-process engine drops finished rows once an eighth of its batch is done.
COMPACT_SHARE = 0.125


def make_model(folder: Path) -> Path:
    """The 135M model as a snapshot for a server: its LM head written out."""
    tied = import_gguf(smollm2_gguf(), folder / "tied")
    model, out = load_model(tied, dtype="bfloat16"), folder / "model"
    save_pretrained(
        model, out, dtype="bfloat16", source=str(tied), trust_remote_code=False, untie=True
    )
    return out


def make_asks(chat: Chat, count: int) -> list[Ask]:
    """Prompts of the demo, each with a seed."""
    lines = (ROOT / "examples" / "demo" / "prompts.jsonl").read_text().splitlines()
    texts = [str(json.loads(line)["prompt"]) for line in lines]
    prompts = [Prompt(i, text=texts[i % len(texts)]) for i in range(count)]
    return [Ask(i, 31 * i + 1, prompt) for i, prompt in enumerate(chat.encode_all(prompts))]


def padding_waste(lengths: Sequence[int], batch: int, *, compacts: bool) -> float:
    """Share of the decoded tokens that nobody keeps, in static batches of `batch`."""
    decoded = 0
    for start in range(0, len(lengths), batch):
        rows = live = sorted(lengths[start : start + batch])
        for step in range(1, rows[-1] + 1):
            decoded += len(rows)
            live = [length for length in live if length > step]
            if compacts and len(rows) - len(live) >= COMPACT_SHARE * len(rows):
                rows = live
    return 1 - sum(lengths) / decoded


def timed(engine: Generator, asks: list[Ask], path: Path) -> tuple[list[Rollout], float, float]:
    """Generate and store a shard: the rollouts, seconds by the clock, seconds of our own CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = engine.generate(asks)
    rollouts = [item for item in found if isinstance(item, Rollout)]
    assert len(rollouts) == len(asks), found
    write_rollouts(path, rollouts)
    return rollouts, time.perf_counter() - wall, time.process_time() - cpu


def launch(args_more: tuple[str, ...]) -> LaunchConfig:
    """A server of one thread from the environment that `make vllm` made."""
    venv = os.environ.get("NPD_VLLM_VENV", str(ROOT / ".venv-vllm"))
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    return LaunchConfig(venv=venv, args=("--max-num-seqs", "128", *args_more), env=env)


def main() -> None:
    """Both engines in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64, help="rows of the in-process engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile: a slow start")
    args = parse(parser, {"requests": 8, "new": 8, "rounds": 1})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = make_model(folder)
        chat = Chat.load(model)
        asks = make_asks(chat, args.requests)

        def build(batch: int, **options: object) -> Generator:
            settings = {"max_new_tokens": args.new, "batch_size": batch, **options}
            engine = build_generator(
                GenerateConfig(**settings),
                stop_ids=chat.stop_ids,
                pad_id=chat.pad_id,
                vocab_size=chat.vocab_size,
                surroundings=Surroundings(folder / "server.log", 1024, tell=print),
            )
            engine.load(model, 0)
            return engine

        more = () if args.compiled else ("--enforce-eager",)
        engines: dict[str, Generator] = {"transformers": build(args.batch)}
        engines["vllm"] = build(args.requests, engine="vllm", launch=launch(more))
        try:
            measured = measure(engines, args.rounds, lambda e: timed(e, asks, folder / "shard"))
        finally:
            for engine in engines.values():
                engine.close()
    publish(args, figures(measured, args.requests, args.batch), details(measured, args.batch))


Measured = dict[str, list[tuple[list[Rollout], float, float]]]


def measure(
    engines: dict[str, Generator],
    rounds: int,
    run: Callable[[Generator], tuple[list[Rollout], float, float]],
) -> Measured:
    """Rounds in turn; the first is thrown away."""
    measured: Measured = {name: [] for name in engines}
    for index in range(rounds + 1):
        names = list(engines) if index % 2 else list(engines)[::-1]
        for name in names:
            result = run(engines[name])
            if index > 0:
                measured[name].append(result)
    return measured


def tokens(rollouts: Sequence[Rollout]) -> int:
    """Response tokens written."""
    return sum(len(rollout.response_ids) for rollout in rollouts)


def figures(measured: Measured, requests: int, batch: int) -> list[Figure]:
    """Speed side by side, and the client's share."""
    rates = {
        name: [tokens(rollouts) / wall for rollouts, wall, _ in found]
        for name, found in measured.items()
    }
    pairs = zip(rates["vllm"], rates["transformers"], strict=True)
    share = [100 * cpu / wall for _, wall, cpu in measured["vllm"]]
    return [
        Figure(
            f"generation by a vLLM server, {requests} requests at once, with log-probs",
            "tokens/s",
            Spread.of(rates["vllm"]),
            f"the transformers engine, batches of {batch}",
            Spread.of(rates["transformers"]),
            Spread.of([ours / theirs for ours, theirs in pairs]),
        ),
        Figure(
            f"client of a server, request to stored shard, {requests} in flight: share of the time",
            "%",
            Spread.of(share),
            bar=Bar("ours", "<", 5),
        ),
    ]


def details(measured: Measured, batch: int) -> dict[str, object]:
    """Lengths, padding waste, and every round."""
    lengths = [len(rollout.response_ids) for rollout in measured["transformers"][0][0]]
    return {
        "response_tokens": {
            "mean": sum(lengths) / len(lengths),
            "longest": max(lengths),
        },
        "padding_waste": {
            "static batches": padding_waste(lengths, batch, compacts=False),
            "transformers engine (drops finished rows)": padding_waste(
                lengths, batch, compacts=True
            ),
            "vLLM (continuous batching)": 0.0,
        },
        "rounds": {
            name: [
                {"tokens": tokens(rollouts), "wall": wall, "client_cpu": cpu}
                for rollouts, wall, cpu in found
            ]
            for name, found in measured.items()
        },
    }


if __name__ == "__main__":
    main()

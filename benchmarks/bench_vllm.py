"""Generation by a vLLM server against the transformers engine, and what the client itself costs.

The real SmolLM2-135M-Instruct in bfloat16 on CPU, the same 128 prompts, sampling at temperature 1,
responses as long as they come out (at most `--new` tokens), then of lengths drawn from a log-normal
(on both sides each ask ends at its own). The server computes on one thread, the
engine in process too; they take turns, and the ratio is of paired rounds of wall time. The client's
share is its CPU time from the first request to the stored shard over that wall time, with all
requests in flight at once. Needs `make vllm`.

    OMP_NUM_THREADS=1 python benchmarks/bench_vllm.py --requests 128 --new 128 --rounds 3
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch

from bench_generate import log_normal_lengths
from common import ROOT, Bar, Figure, Spread, make_parser, parse, publish
from npd.config import GenerateConfig, LaunchConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.engines import EngineServer
from npd.generate.base import Generator, build_generator
from npd.generate.in_process import TransformersGenerator, generate_with
from npd.generate.served import InFlightRequests, ServedGenerator, ServingContext
from npd.models.loading import load_model
from npd.models.saving import save_pretrained
from npd.store.shards import write_rollouts
from npd.types import Failed, Prompt, Rollout, SampleRequest

sys.path.insert(0, str(ROOT / "examples" / "demo"))

from prepare import import_gguf, smollm2_gguf


def make_model(folder: Path) -> Path:
    """The 135M model as a snapshot for a server: its LM head written out."""
    tied = import_gguf(smollm2_gguf(), folder / "tied")
    model, out = load_model(tied, dtype="bfloat16"), folder / "model"
    save_pretrained(model, out, dtype="bfloat16", source=tied, untie=True)
    return out


def make_requests(chat: ChatTokenizer, count: int) -> list[SampleRequest]:
    """Requests about topics, each with a seed."""
    lines = (ROOT / "benchmarks" / "topics.jsonl").read_text().splitlines()
    texts = [str(json.loads(line)["prompt"]) for line in lines]
    prompts = [Prompt(i, text=texts[i % len(texts)]) for i in range(count)]
    return [
        SampleRequest(i, 31 * i + 1, prompt) for i, prompt in enumerate(chat.encode_all(prompts))
    ]


def padding_waste(lengths: Sequence[int], batch: int) -> float:
    """Share of the decoded tokens that nobody keeps, in static batches of `batch`."""
    batches = (lengths[start : start + batch] for start in range(0, len(lengths), batch))
    return 1 - sum(lengths) / sum(len(rows) * max(rows) for rows in batches)


class Writer(Protocol):
    """What is measured: rollouts for asks."""

    def generate(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout | Failed]:
        """One rollout per ask, in their order."""


@dataclass(frozen=True)
class LimitedServer:
    """A generator by a server with a length of its own for each ask, by sample id."""

    engine: ServedGenerator
    limits: Sequence[int]

    def generate(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout | Failed]:
        """Responses of exactly those lengths."""
        engine = self.engine

        async def write(server: EngineServer, ask: SampleRequest) -> Rollout:
            limit = self.limits[ask.sample_id]
            sampling = replace(engine._sampling(), max_new_tokens=limit, stop_ids=())
            return await InFlightRequests(engine._weights, sampling, "finish", True).write(
                server, ask
            )

        found = engine._pool.run_jobs(requests, write, at_once=len(requests))
        return engine._run(found)  # type: ignore[return-value]


@dataclass(frozen=True)
class LimitedModel:
    """The same in process."""

    engine: TransformersGenerator
    limits: Sequence[int]

    def generate(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout | Failed]:
        """Responses of exactly those lengths."""
        sampling = replace(self.engine._sampling, stop_ids=frozenset())
        limits = [self.limits[ask.sample_id] for ask in requests]
        return generate_with(self.engine._model, requests, sampling, limits=limits)


def timed(
    engine: Writer, requests: list[SampleRequest], path: Path
) -> tuple[list[Rollout], float, float]:
    """Generate and store a shard: the rollouts, seconds by the clock, seconds of our own CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = engine.generate(requests)
    rollouts = [item for item in found if isinstance(item, Rollout)]
    assert len(rollouts) == len(requests), found
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
        chat = ChatTokenizer.load(model)
        requests = make_requests(chat, args.requests)

        def build(batch: int, **options: object) -> Generator:
            settings = {"max_new_tokens": args.new, "batch_size": batch, **options}
            engine = build_generator(
                GenerateConfig(**settings),
                stop_ids=chat.stop_ids,
                pad_id=chat.pad_id,
                vocab_size=chat.vocab_size,
                serving=ServingContext(folder / "server.log", 1024, notify=print),
            )
            engine.load(model, 0)
            return engine

        more = () if args.compiled else ("--enforce-eager",)
        in_process = build(args.batch)
        server = build(args.requests, engine="vllm", launch=launch(more))
        limits = log_normal_lengths(args.requests, args.new / 2, args.new)
        limited: dict[str, Writer] = {
            "transformers": LimitedModel(cast(TransformersGenerator, in_process), limits),
            "vllm": LimitedServer(cast(ServedGenerator, server), limits),
        }
        engines: dict[str, Writer] = {"transformers": in_process, "vllm": server}
        run = partial(timed, requests=requests, path=folder / "shard")
        try:
            measured = measure(engines, args.rounds, run)
            even = measure(limited, args.rounds, run)
        finally:
            in_process.close()
            server.close()
    found = [*figures(measured, args.requests, args.batch), log_normal_figure(even, args.batch)]
    publish(args, found, details(measured, args.batch) | {"log_normal": rounds_of(even)})


Measured = dict[str, list[tuple[list[Rollout], float, float]]]


def measure(
    engines: dict[str, Writer],
    rounds: int,
    run: Callable[[Writer], tuple[list[Rollout], float, float]],
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


def rates(found: Sequence[tuple[list[Rollout], float, float]]) -> list[float]:
    """Tokens per second, by the clock, of each round."""
    return [tokens(rollouts) / wall for rollouts, wall, _ in found]


def log_normal_figure(measured: Measured, batch: int) -> Figure:
    """The engine in process against the server, where both write as many tokens for each ask."""
    ours, theirs = rates(measured["transformers"]), rates(measured["vllm"])
    return Figure(
        f"generation in process, {batch} rows, log-normal lengths, with log-probs",
        "tokens/s",
        Spread.of(ours),
        "a vLLM server, all requests at once",
        Spread.of(theirs),
        Spread.of([a / b for a, b in zip(ours, theirs, strict=True)]),
    )


def figures(measured: Measured, requests: int, batch: int) -> list[Figure]:
    """Speed side by side, and the client's share."""
    served, in_process = rates(measured["vllm"]), rates(measured["transformers"])
    pairs = zip(served, in_process, strict=True)
    share = [100 * cpu / wall for _, wall, cpu in measured["vllm"]]
    return [
        Figure(
            f"generation by a vLLM server, {requests} requests at once, with log-probs",
            "tokens/s",
            Spread.of(served),
            f"the transformers engine, batches of {batch}",
            Spread.of(in_process),
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
        "padding_waste_of_static_batches": padding_waste(lengths, batch),
        "rounds": rounds_of(measured),
    }


def rounds_of(measured: Measured) -> dict[str, object]:
    """Every round."""
    return {
        name: [
            {"tokens": tokens(rollouts), "wall": wall, "client_cpu": cpu}
            for rollouts, wall, cpu in found
        ]
        for name, found in measured.items()
    }


if __name__ == "__main__":
    main()

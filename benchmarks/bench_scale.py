"""Bookkeeping at scale: a million samples in one run, and 1 to 64 workers of each kind.

The real Plan, Controller, Dispatcher, Ledger (on disk) and Monitor, with workers that answer at
once, over preset `npd` with a bounded window: each sample is asked for, generated, scored, judged,
used five times and let go. Each case runs in a process of its own, so that memory is its own.
Bookkeeping is the CPU time of that process without what the fakes did: they unpack a request, make
up an answer and pack it. Packing requests and unpacking answers is the controller's own work and is
in it. Then the run is resumed in a fresh process: every event is replayed through a fresh plan.

With the store in, generators and scorers write real Arrow shards of short texts and read them back,
and the trainer reads each sample it uses, as the real workers do; what this takes is a figure of
its own, because it is theirs. Shard files stay: nothing in a run removes them.

    python benchmarks/bench_scale.py --samples 1000000 --small 30000 --repeats 3
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_controller import FakeRuntime, FakeWorker, fake_stats
from common import Bar, Figure, Spread, make_parser, parse, peak_mib, publish
from npd.config import RunConfig
from npd.config.load import load_config
from npd.control.controller import Controller
from npd.control.devices.placement import WorkerSet, start_generators, start_scorers, start_trainer
from npd.control.dispatcher import Dispatcher
from npd.control.monitor import Monitor
from npd.control.run_directory import OpenRun
from npd.data.inputs import RunInputs
from npd.observe.live import PlainView
from npd.runtime import CallResult
from npd.schedule.plan import Plan
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.shards import ShardReader, read_rollouts, read_scored, write_rollouts, write_scored
from npd.types import (
    EncodedPrompt,
    FinishReason,
    Rollout,
    SampleRequest,
    Scored,
    Segment,
    SegmentReport,
)
from npd.workers import GenerateTask, ScoreTask
from npd.workers.tasks import ShardResult, generated_stats, scored_stats

SHARD, TOP_K = 64, 10
# Of the made-up samples so many pass the pre-filter and the filter.
KEPT = 0.948


@dataclass(frozen=True)
class Case:
    """One run: about so many samples, workers of each kind, and how many may be live."""

    samples: int
    workers: int = 4
    window: int | str = 8192
    prompts: int = 10_000
    has_store: bool = False
    root: str = ""


class Course:
    """What a run costs as it goes: CPU seconds of fakes and store, and a curve of memory."""

    def __init__(self, samples: int) -> None:
        self.fakes, self.store = 0.0, 0.0
        self.curve: list[tuple[int, float]] = []
        self._every = max(1, samples // 100)

    def at(self, samples: int) -> None:
        """So many samples were asked for by now."""
        if samples >= self._every * (len(self.curve) + 1):
            self.curve.append((samples, resident_mib()))


class Fake(FakeWorker):
    """Answers at once; its own work is charged to the fakes, what it stores to the store."""

    def __init__(self, name: str, course: Course, layout: RunLayout, case: Case) -> None:
        self.name, self.pid = name, None
        self._course, self._layout, self._case = course, layout, case
        self._reader = ShardReader(layout.scored, "scored")

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> CallResult:  # noqa: ASYNC109
        """Answer at once."""
        started, request = time.time(), pickle.dumps((method, args))
        began = time.process_time()
        method, args = pickle.loads(request)
        answer = pickle.dumps(CallResult(getattr(self, method)(*args), started, time.time()))
        self._course.fakes += time.process_time() - began
        return pickle.loads(answer)

    def generate(self, task: GenerateTask) -> ShardResult:
        """Texts that nobody wrote, on disk where the store is in."""
        self._course.at(task.requests[-1].sample_id)
        if not self._case.has_store:
            return super().generate(task)
        path, made = (
            self._layout.rollouts(task.shard),
            [fake_text(ask, task) for ask in task.requests],
        )
        read = self._stored(lambda: write_rollouts(path, made), lambda: read_rollouts(path))
        return ShardResult(tuple(generated_stats(rollout) for rollout in read))

    def score(self, task: ScoreTask) -> ShardResult:
        """Scores that no teacher gave, of the rollouts on disk where the store is in."""
        if not self._case.has_store:
            return super().score(task)
        source, path = self._layout.rollouts(task.shard), self._layout.scored(task.shard)
        wanted = set(task.sample_ids)
        rollouts = self._stored(lambda: None, lambda: read_rollouts(source))
        made = [fake_scores(rollout) for rollout in rollouts if rollout.sample_id in wanted]
        read = self._stored(lambda: write_scored(path, made), lambda: read_scored(path))
        return ShardResult(tuple(scored_stats(item) for item in read))

    def train(self, segment: Segment) -> SegmentReport:
        """Read every sample that is used, where the store is in."""
        if self._case.has_store:
            refs = [
                ref
                for step in segment.steps
                for rows in step.ranks
                for row in rows
                for ref in row.samples
            ]
            self._stored(lambda: None, lambda: [self._reader.read(ref) for ref in refs])
        return super().train(segment)

    def _stored(self, write: Callable[[], None], read: Callable[[], Any]) -> Any:
        began = time.process_time()
        write()
        found = read()
        self._course.store += time.process_time() - began
        return found


def fake_text(ask: SampleRequest, task: GenerateTask) -> Rollout:
    """A response of 8 to 31 tokens."""
    length = 8 + ask.sample_id % 24
    ids = np.arange(ask.sample_id, ask.sample_id + length, dtype=np.int32) % 50_000
    return Rollout(
        sample_id=ask.sample_id,
        prompt_index=ask.prompt.index,
        version=task.version,
        prompt_ids=ask.prompt.prompt_ids,
        header_ids=ask.prompt.header_ids,
        response_ids=ids,
        logprobs=np.full(length, -0.5, np.float32),
        finish=FinishReason.LENGTH if ask.sample_id % 20 == 0 else FinishReason.STOP,
        seed=ask.seed,
    )


def fake_scores(rollout: Rollout) -> Scored:
    """A top-10 support; Δ-IFD as of the samples that are not stored."""
    length, known = len(rollout.response_ids), fake_stats(rollout.sample_id, 0, 0, is_scored=True)
    return Scored(
        rollout=rollout,
        topk_ids=np.tile(np.arange(TOP_K, dtype=np.int32), (length, 1)),
        topk_logprobs=np.full((length, TOP_K), -2.5, np.float32),
        teacher_logprobs=np.full(length, -0.6, np.float32),
        nll_teacher=known.nll_teacher or 0.0,
        nll_teacher_alone=known.nll_teacher_alone,
        nll_student=known.nll_student,
        nll_student_alone=known.nll_student_alone,
        overlap=known.overlap,
    )


def make_config(case: Case) -> RunConfig:
    """Preset `npd` with shards of 64 and a window; over as many steps as the samples are good for.

    With `window: all` it is the preset as published: ten epochs, one refresh.
    """
    values = {
        "run_dir": case.root,
        "student": "none",
        "teacher": "none",
        "runtime.kind": "local",
        "runtime.device": "cpu",
        "generate.shard_size": SHARD,
        "generate.workers": case.workers,
        "score.workers": case.workers,
    }
    if case.window != "all":
        uses = case.samples * 5 * KEPT
        values |= {
            "schedule.epochs": "null",
            "schedule.steps": round(uses / 64),
            "schedule.window": case.window,
            "schedule.refresh": "{every_steps: 2000}",
            "checkpoint.every_steps": 1000,
        }
    return load_config("npd", [f"{name}={value}" for name, value in values.items()]).config


def run_case(case: Case) -> dict[str, Any]:
    """Drive one run, or resume it once it is over, in this process; what it cost."""
    config, layout = make_config(case), RunLayout(Path(case.root))
    layout.create()
    ids = np.arange(60, dtype=np.int32)
    prompts = [EncodedPrompt(i, ids, ids[:5]) for i in range(case.prompts)]
    plan, monitor = Plan(config), Monitor(config, layout, PlainView())
    course, before = Course(case.samples), resident_mib()
    runtime = FakeRuntime(lambda name, layout: Fake(name, course, layout, case))
    began, wall = time.process_time(), time.perf_counter()
    with Ledger(layout.ledger_db) as ledger:
        run = OpenRun(config, RunInputs(prompts, [], {}), layout, ledger, monitor)
        workers = WorkerSet(
            start_generators(run, runtime), start_scorers(run, runtime), start_trainer(run, runtime)
        )
        ending = asyncio.run(Controller(run, plan, Dispatcher(run, workers)).run())
        cpu, wall = time.process_time() - began, time.perf_counter() - wall
        books = ledger.conservation()
        monitor.close()
    assert ending.is_done
    assert books.holds
    files = [path for kind in ("rollouts", "scored") for path in (layout.root / kind).iterdir()]
    return {
        "case": asdict(case) | {"root": ""},
        "books": asdict(books),
        "steps": ending.step,
        "cpu_s": cpu - course.fakes,
        "fakes_s": course.fakes - course.store,
        "store_s": course.store,
        "wall_s": wall,
        "samples_per_s": books.asked / (cpu - course.fakes),
        "ledger_bytes_per_sample": layout.ledger_db.stat().st_size / books.asked,
        "shard_files": len(files),
        "shard_bytes_per_sample": sum(path.stat().st_size for path in files) / books.asked,
        "before_mib": before,
        "peak_mib": peak_mib(),
        "curve": course.curve,
    }


def resident_mib() -> float:
    """Memory that this process holds now (resident set); its peak where /proc is not there."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_mib()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(case: Case) -> dict[str, Any]:
    """The case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def measure_anew(case: Case) -> dict[str, Any]:
    """The case in a directory of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        return measure(Case(**asdict(case) | {"root": f"{directory}/run"}))


def measure_resumed(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case, and then its resumption once all is over."""
    with tempfile.TemporaryDirectory() as directory:
        there = Case(**asdict(case) | {"root": f"{directory}/run"})
        return measure(there), measure(there)


def growth(found: dict[str, Any]) -> tuple[float, float]:
    """MiB held after a tenth of the samples, and the most held after it above that."""
    curve = found["curve"]
    level = curve[len(curve) // 10][1]
    return level, max(mib for _, mib in curve[len(curve) // 10 :]) - level


def figures_of(
    rounds: dict[int, list[dict[str, Any]]],
    run: dict[str, Any],
    resumed: dict[str, Any],
    stored: dict[str, Any],
    whole: dict[str, Any],
) -> list[Figure]:
    """Speed by number of workers; memory, ledger and resumption of the long run; the store."""

    def one(what: str, value: float, unit: str, bar: Bar | None = None) -> Figure:
        return Figure(what, unit, Spread.of([value]), bar=bar)

    asked, live = run["books"]["asked"], whole["case"]["prompts"]
    level, grown = growth(run)
    of_live = (sum(growth(whole)) - whole["before_mib"]) * 2**20 / live
    return [
        *(
            Figure(
                f"bookkeeping, {workers} generators and {workers} scorers",
                "samples/s",
                Spread.of([each["samples_per_s"] for each in found]),
                bar=Bar("ours", ">=", 20_000),
            )
            for workers, found in rounds.items()
        ),
        one(
            f"bookkeeping, {asked:,} samples in one run",
            run["samples_per_s"],
            "samples/s",
            Bar("ours", ">=", 20_000),
        ),
        one("- memory after a tenth of them", level, "MiB"),
        one("- most memory above that, until the end", grown, "MiB", Bar("ours", "<", 16)),
        one("- ledger on disk, each sample", run["ledger_bytes_per_sample"], "bytes"),
        one("- resuming: replay of each sample", 1e6 * resumed["cpu_s"] / asked, "us"),
        one("- resuming: memory above that of an empty run", _above(resumed), "MiB"),
        one("window of all: memory of each live sample", of_live, "bytes"),
        one(
            "store: shards written and read, each sample",
            1e6 * stored["store_s"] / stored["books"]["asked"],
            "us",
        ),
        one("- shard files on disk, each sample", stored["shard_bytes_per_sample"], "bytes"),
        one("- most memory above that after a tenth", growth(stored)[1], "MiB"),
    ]


def _above(found: dict[str, Any]) -> float:
    return float(found["peak_mib"] - found["before_mib"])


def notes_of(run: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """What the figures say, for the page."""
    curve = run["curve"]
    points = [curve[len(curve) * tenth // 10 - 1] for tenth in range(1, 11)]
    return [
        "Bookkeeping is deciding, recording and showing: the controller's CPU time, without what "
        "the workers do. Each sample is asked for, generated, scored, judged by two filters, used "
        f"five times in packed steps and let go. The long run took {run['wall_s']:.0f} s of wall "
        f"time, {run['fakes_s']:.0f} s of it the fakes'; resuming it took "
        f"{resumed['wall_s']:.0f} s.",
        "Memory does not grow with samples that have left, only with those that are live (the "
        "window), with prompts, and with workers. Resident MiB of the long run, by samples asked "
        "for: " + ", ".join(f"{samples:,}: {mib:.1f}" for samples, mib in points) + ".",
        "The ledger and the shard files do grow: they are the record of the run, from which it is "
        "resumed and reported. Shard files of samples that have left are not removed.",
    ]


def main() -> None:
    """Every case; with `--case` one, in this process."""
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the long run")
    parser.add_argument("--small", type=int, default=30_000, help="samples of the other cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--case", help="one case as JSON, in this process")
    args = parse(parser, {"samples": 3_000, "small": 1_500, "repeats": 1, "workers": [1, 64]})
    if args.case is not None:
        print(json.dumps(run_case(Case(**json.loads(args.case)))))
        return
    rounds: dict[int, list[dict[str, Any]]] = {workers: [] for workers in args.workers}
    for _ in range(args.repeats):
        for workers, found in rounds.items():
            found.append(measure_anew(Case(args.small, workers, window=16_384)))
    run, resumed = measure_resumed(Case(args.samples))
    stored = measure_anew(Case(args.small, has_store=True))
    whole = measure_anew(Case(args.small, window="all", prompts=args.small // 2))
    details = {"workers": rounds, "run": run, "resumed": resumed, "store": stored, "all": whole}
    figures = figures_of(rounds, run, resumed, stored, whole)
    publish(args, figures, details, notes=notes_of(run, resumed))


if __name__ == "__main__":
    main()

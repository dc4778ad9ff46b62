"""What the controller itself costs a sample, with workers that answer at once.

The real Plan, Controller, Dispatcher, Ledger (on disk) and Monitor drive whole runs of presets; the
workers are fakes in this process that make up their answers. Requests and replies are pickled
there and back, as for workers in other processes. Time made up of the fakes' own work is left out;
the rest is parted by a stopwatch into plan, ledger, monitor, messages, and the loop around them
(events encoded, decisions digested, tasks). Then the finished run is replayed, as by `--resume`.

    python benchmarks/bench_controller.py --samples 20000 --presets npd on_policy
"""

from __future__ import annotations

import asyncio
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common import Bar, Figure, Spread, make_parser, parse, publish
from npd.config import RunConfig
from npd.config.load import load_config
from npd.control.controller import Controller
from npd.control.devices.placement import WorkerSet, start_generators, start_scorers, start_trainer
from npd.control.dispatcher import Dispatcher
from npd.control.monitor import Monitor
from npd.control.run_directory import OpenRun
from npd.data.inputs import RunInputs
from npd.observe.live import PlainView
from npd.runtime import CallResult, Factory, Worker
from npd.runtime.base import NOTHING, Resources
from npd.schedule.plan import Plan
from npd.store.layout import RunLayout
from npd.store.ledger import Ledger
from npd.store.snapshots import publish as publish_directory
from npd.types import (
    EncodedPrompt,
    EvalReport,
    FinishReason,
    SampleStats,
    Segment,
    SegmentReport,
    Step,
    StepReport,
)
from npd.workers import GenerateTask, ScoreTask
from npd.workers.tasks import ShardResult

PARTS = ("plan", "ledger", "monitor", "messages", "loop", "fakes")
LEDGER_WRITES = (
    "append_event",
    "add_samples",
    "add_uses",
    "set_outcomes",
    "set_shard",
    "add_segment",
    "add_snapshot",
    "add_checkpoint",
    "checkpoints",
)


class Stopwatch:
    """Parts of the time since it was made; a part inside another is taken out of that one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts = ["loop"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to `name`. The block must not await."""
        self._turn(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, charged to `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    def stop(self) -> dict[str, float]:
        """The seconds of every part."""
        self._charge()
        return self.seconds

    def _turn(self, name: str) -> None:
        self._charge()
        self._parts.append(name)

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class Clocked:
    """`target`, with some of its methods charged to a part of the stopwatch."""

    def __init__(self, target: Any, watch: Stopwatch, part: str, *methods: str) -> None:
        self._target = target
        for name in methods:
            setattr(self, name, watch.around(part, getattr(target, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class ClockedLedger(Clocked):
    """A ledger; of a transaction its beginning and its end are charged."""

    def __init__(self, ledger: Ledger, watch: Stopwatch) -> None:
        super().__init__(ledger, watch, "ledger", *LEDGER_WRITES)
        self._watch = watch

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """As the ledger's own."""
        inner: AbstractContextManager[None] = self._target.transaction()
        with self._watch.part("ledger"):
            inner.__enter__()
        yield  # an error ends the benchmark; there is nothing to roll back for
        with self._watch.part("ledger"):
            inner.__exit__(None, None, None)


class FakeWorker:
    """Every role at once: makes up what a worker would answer, without waiting."""

    def __init__(self, name: str, watch: Stopwatch, layout: RunLayout) -> None:
        self.name, self.pid = name, None
        self._watch, self._layout = watch, layout

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> CallResult:  # noqa: ASYNC109
        """Answer at once."""
        started = time.time()
        with self._watch.part("messages"):
            args = pickle.loads(pickle.dumps(args))
        with self._watch.part("fakes"):
            reply = CallResult(getattr(self, method)(*args), started, time.time())
        with self._watch.part("messages"):
            return pickle.loads(pickle.dumps(reply))

    async def restart(self) -> None:
        """Nothing is lost."""

    async def close(self) -> None:
        """Nothing is open."""

    def ready(self) -> None:
        """Nothing to load."""

    def generate(self, task: GenerateTask) -> ShardResult:
        """One in twenty is truncated, so that the pre-filter has something to do."""
        requests = task.requests
        return ShardResult(
            tuple(fake_stats(a.sample_id, a.prompt.index, task.version) for a in requests)
        )

    def score(self, task: ScoreTask) -> ShardResult:
        """Δ-IFD about 0.1, above 0.8 or below 0 for a few."""
        return ShardResult(
            tuple(fake_stats(i, 0, task.version, is_scored=True) for i in task.sample_ids)
        )

    def train(self, segment: Segment) -> SegmentReport:
        """A report a step."""
        return SegmentReport(segment.index, tuple(fake_report(step) for step in segment.steps))

    def publish(self, version: int) -> str:
        """Nothing is written."""
        return f"checksum of {version}"

    def checkpoint(self, step: int) -> float:
        """A small one, so that a resumed run has a place to start from."""
        # Whole, as a resumed run looks for.
        publish_directory(self._layout.checkpoint(step), lambda into: (into / "state").touch())
        return 0.0

    def is_saved(self, step: int) -> bool:
        """It was written at once."""
        return True

    def restore(self, step: int) -> None:
        """Nothing is read."""

    def export(self) -> str:
        """Nothing is written."""
        return "student"

    def evaluate(self, step: int, prompts: tuple[EncodedPrompt, ...]) -> EvalReport:
        """A report of nothing remarkable."""
        return EvalReport(step, 1.0, 0.5, None, len(prompts), 10, 0.1)


class FakeRuntime:
    """Spawns fakes, made by `make(name, layout)`; nothing to close."""

    def __init__(self, make: Callable[[str, RunLayout], Worker]) -> None:
        self._make = make

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        threads: int,
        environment: dict[str, str] | None = None,
        needs: Resources = NOTHING,
    ) -> Worker:
        """A fake worker; of its factory only the run directory is used."""
        return self._make(name, RunLayout(factory.root))

    async def close(self) -> None:
        """Nothing is open."""


def fake_stats(
    sample_id: int, prompt: int, version: int, *, is_scored: bool = False
) -> SampleStats:
    """Scalars that depend on the sample's id only."""
    draw = random.Random(sample_id)
    is_truncated = draw.random() < 0.05
    known = SampleStats(
        sample_id=sample_id,
        prompt_index=prompt,
        version=version,
        prompt_tokens=draw.randint(20, 100),
        response_tokens=draw.randint(20, 512),
        finish=FinishReason.LENGTH if is_truncated else FinishReason.STOP,
        repeat=0.4 * draw.random(),
    )
    if not is_scored:
        return known
    values = [getattr(known, name) for name in SampleStats._fields[:7]]
    student = draw.uniform(0.3, 0.6)
    return SampleStats(*values, 1.3 * student, 2.0, student, 2.0 + draw.random(), 0.7, 0.95)


def fake_report(step: Step) -> StepReport:
    """A report of nothing remarkable; drift rises, so that adaptive runs refresh now and then."""
    refs = [ref for rank in step.ranks for row in rank for ref in row.samples]
    tokens = sum(ref.num_tokens for ref in refs)
    return StepReport(
        step=step.index, loss=1.0, ce=1.0, kd=1.0, grad_norm=1.0, lr=step.lr,
        num_samples=len(refs), response_tokens=tokens, total_tokens=tokens,
        num_rows=sum(map(len, step.ranks)), fill=0.9, seconds=1.0, teacher_mass=0.9,
        student_mass=0.9, agreement=0.8, entropy=1.0, drift=0.01 * (step.index % 40),
        drift_k3=0.1, ess=0.9,
    )  # fmt: skip


def make_config(preset: str, root: Path) -> RunConfig:
    """A preset as it is, but for its models and place."""
    return load_config(
        preset, [f"run_dir={root}", "student=none", "teacher=none", "runtime.device=cpu"]
    ).config


def make_prompts(config: RunConfig, samples: int) -> list[EncodedPrompt]:
    """As many prompts as make the run ask for about `samples` samples."""
    per_prompt = config.num_requests(1)
    assert per_prompt is not None, "presets are bounded by epochs"
    ids = np.arange(60, dtype=np.int32)
    return [EncodedPrompt(i, ids, ids[:5]) for i in range(samples // per_prompt)]


def drive(config: RunConfig, prompts: list[EncodedPrompt], watch: Stopwatch) -> dict[str, int]:
    """One run, or the replay of one that is done, from and to the ledger in its directory."""
    layout = RunLayout(config.directory)
    layout.create()
    plan = Plan(config)
    runtime = FakeRuntime(lambda name, layout: FakeWorker(name, watch, layout))
    monitor = Monitor(config, layout, PlainView())
    clocked = Clocked(monitor, watch, "monitor", "note", "started", "span", "message")
    with Ledger(layout.ledger_db) as ledger:
        books = ClockedLedger(ledger, watch)
        run = OpenRun(config, RunInputs(prompts, [], {}), layout, books, clocked)
        workers = WorkerSet(
            start_generators(run, runtime), start_scorers(run, runtime), start_trainer(run, runtime)
        )
        planner = Clocked(plan, watch, "plan", "handle")
        ending = asyncio.run(Controller(run, planner, Dispatcher(run, workers)).run())
        found = ledger.conservation()
        monitor.close()
    assert ending.is_done
    return {
        "samples": found.asked,
        "rejected": found.rejected,
        "steps": ending.step,
        "snapshots": plan.version + 1,
    }


def measure(preset: str, samples: int) -> dict[str, Any]:
    """A run and its replay: milliseconds a sample of every part."""
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(preset, Path(directory) / preset)
        prompts = make_prompts(config, samples)
        watch, cpu = Stopwatch(), time.process_time()
        counts = drive(config, prompts, watch)
        parts, cpu = watch.stop(), time.process_time() - cpu
        started = time.perf_counter()
        drive(config, prompts, Stopwatch())
        replay = time.perf_counter() - started
    each = {part: 1e3 * seconds / counts["samples"] for part, seconds in parts.items()}
    fakes = each.pop("fakes")
    return {
        **counts,
        "ms_per_sample": sum(each.values()),
        "parts": each,
        "ms_replay": 1e3 * replay / counts["samples"],
        "ms_fakes_left_out": fakes,
        "ms_cpu_with_fakes": 1e3 * cpu / counts["samples"],
    }


def figure_of(preset: str, found: list[dict[str, Any]]) -> Figure:
    """The cost of a sample over the repeats, and the parts of the middle one."""
    middle = sorted(found, key=lambda each: each["ms_per_sample"])[len(found) // 2]
    parts = " + ".join(f"{name} {ms:.3f}" for name, ms in middle["parts"].items())
    return Figure(
        f"controller, each sample, preset {preset}: {parts}",
        "ms",
        Spread.of([each["ms_per_sample"] for each in found]),
        bar=Bar("ours", "<", 1.0),
    )


def main() -> None:
    """Every preset, several times."""
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["npd", "npd_adaptive", "on_policy"])
    args = parse(parser, {"samples": 1_000, "repeats": 1})
    found: dict[str, list[dict[str, Any]]] = {preset: [] for preset in args.presets}
    for _ in range(args.repeats):
        for preset in args.presets:
            found[preset].append(measure(preset, args.samples))
    publish(args, [figure_of(preset, each) for preset, each in found.items()], found)


if __name__ == "__main__":
    main()

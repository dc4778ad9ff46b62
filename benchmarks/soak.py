"""One run under `kill -9`: random processes of it, at random moments, until it has ended.

    make soak                                 # 100 kills, 10 to 20 minutes on 2 cores
    python benchmarks/soak.py --quick         # 10 kills, as the tests do
    python benchmarks/soak.py --vllm VENV     # vLLM writes; its servers are killed too

The run is a real `npd run` of tiny models with two generators, two scorers and a trainer of two
ranks, each a process. Where the controller was the victim, `--resume` goes on. Afterwards the books
are checked, and the student is held against those of runs that nobody disturbed. Exits with 1 when
anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import ROOT, commit, machine, versions
from victims import CONTROLLER, KINDS, Victim, find_victims

sys.path.insert(0, str(ROOT / "tests"))
from leak_checks import LeakCheck
from npd.errors import NpdError
from npd.store.ledger import Ledger
from npd.store.snapshots import verify
from npd.types import Outcome
from run_process import Run, check_books
from tiny_model import save_model

REUSE = 2
# Student's t for a two-sided 99 % prediction from so many runs.
_T99 = {2: 63.66, 3: 9.925, 4: 5.841, 5: 4.604, 6: 4.032, 7: 3.707, 8: 3.499}
# Of the mean: runs that agree better do so by chance; a spread of 0 would let no other run pass.
_LEAST_SPREAD = 0.01
_SMALL_SERVER = {
    "args": ["--enforce-eager", "--max-num-seqs", "16"],
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
}
# Seconds between kills on average: where the run is ahead of its kills, and where it is behind.
_SOON, _LATER = 1.0, 3.0
_WITHOUT_PROGRESS = 900.0


@dataclass(frozen=True)
class Kill:
    """One `kill -9`: what, when (seconds since the start), and after how many recorded steps."""

    kind: str
    at: float
    step: int


@dataclass
class Soak:
    """What was done to a run and what came of it."""

    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, help="default 100; with --quick 10, with --vllm 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps of the run")
    parser.add_argument(
        "--baselines", type=int, help="undisturbed runs, 2 to 8; default 5; with --quick 3"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="virtual environment of vLLM")
    parser.add_argument("--out", type=Path, help="folder for soak.json and soak.md")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary one")
    args = parser.parse_args()
    args.kills = args.kills or (5 if args.vllm else 10 if args.quick else 100)
    args.baselines = args.baselines or (3 if args.quick else 5)
    args.steps = args.steps or (10 if args.quick or args.vllm else 3) * args.kills
    return args


def main() -> int:
    """Run it all; 1 when something is wrong."""
    args = parse_args()
    # Unlike the signal, an exit lets what was started be ended first.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="npd-soak-") as directory:
        folder = args.folder or Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # vLLM's attention on CPUs takes heads of 32 numbers and more.
        width = {"hidden": 128, "std": 0.1} if args.vllm else {}
        save_model(folder / "student", seed=0, **width)
        save_model(folder / "teacher", seed=1, layers=3, **width)
        undisturbed = _undisturbed(args, folder)
        soak = _disturbed(args, folder / "killed", undisturbed)
    text = _markdown(args, soak)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {**asdict(soak), "seed": args.seed, **_about()}
        (args.out / "soak.json").write_text(json.dumps(record, indent=2) + "\n")
        (args.out / "soak.md").write_text(text)
    return 1 if soak.problems else 0


def _about() -> dict[str, Any]:
    return {"commit": commit(), "machine": machine(), "versions": versions()}


def _make(args: argparse.Namespace, folder: Path, *, kind: str, ranks: int = 2) -> Run:
    """The run, the same for the disturbed and the others but for where workers live."""
    folder.mkdir()
    generate: dict[str, Any] = {"workers": 2}
    if args.vllm and kind != "inline":
        generate = {"engine": "vllm", "launch": {"venv": str(args.vllm), **_SMALL_SERVER}}
    return Run(
        folder,
        folder.parent / "student",
        folder.parent / "teacher",
        num_prompts=120,
        data={"heldout_size": 40},
        generate=generate,
        score={"workers": 2},
        train={"row_tokens": 112, "ranks": ranks},  # two or three rows a step
        schedule={
            "epochs": None, "steps": args.steps, "window": 40, "reuse": REUSE, "max_lag": 2,
            "segment_steps": 2, "overlap": True, "refresh": {"every_steps": 10},
            # A worker that is killed on purpose is not one that keeps dying.
            "max_tries": 1000,
        },
        eval={"every_steps": 20, "num_samples": 0},
        checkpoint={"every_steps": 5},
        runtime={"kind": kind},
    )  # fmt: skip


def _undisturbed(args: argparse.Namespace, folder: Path) -> list[float]:
    """The final held-out KLs of runs that nobody disturbs.

    Their workers are threads, their trainer is one rank and writes without servers, which is
    quicker: the plan is the same, and the numbers agree to float noise (samples of a server, to
    that of sampling).
    """
    runs = [
        _make(args, folder / f"calm-{i}", kind="inline", ranks=1) for i in range(args.baselines)
    ]
    with ExitStack() as stack:
        for run, process in [(stack.enter_context(run), run.start()) for run in runs]:
            if process.wait() != 0:
                raise RuntimeError(f"an undisturbed run failed: {run.log.read_text()[-3000:]}")
    found = [_final_kl(run) for run in runs]
    print("undisturbed: held-out KL", ", ".join(f"{kl:.4f}" for kl in found), flush=True)
    return found


def _disturbed(args: argparse.Namespace, folder: Path, undisturbed: Sequence[float]) -> Soak:
    run = _make(args, folder, kind="local")
    around = LeakCheck(folder)
    # What torch compiled it keeps for good.
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "torch")}
    run.environment = around.environment | kept
    soak = Soak()
    try:
        Killer(args, run, around, soak).drive()
        _check(args, run, around, soak, undisturbed)
    except RuntimeError as error:
        soak.problems.append(str(error))
    finally:
        run.end()
        _end(around)
    return soak


def _end(around: LeakCheck) -> None:
    """Kill what is left of a run, until nothing is: its folder is removed next."""
    while processes := around.processes():
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


class Killer:
    """Starts the run, kills, starts it again where that is due, until it ends by itself.

    Kills come at random moments of the clock, so while workers start and load too, and more slowly
    where they are ahead of the run's progress: what is killed for ever faster never ends.
    """

    def __init__(self, args: argparse.Namespace, run: Run, around: LeakCheck, soak: Soak) -> None:
        self._args, self._run, self._around, self._soak = args, run, around, soak
        self._random = random.Random(args.seed)
        self._kinds = [CONTROLLER, *KINDS]
        self._step, self._moved = 0, time.monotonic()

    def drive(self) -> None:
        """Until the run has ended; raises RuntimeError when it ends otherwise than by a kill."""
        started = time.monotonic()
        process = self._run.start()
        while True:
            status = self._wait(process, self._gap())
            if status == 0:
                break
            if status == -signal.SIGKILL:
                process = self._run.start()
            elif status is not None:
                raise RuntimeError(f"exit code {status}: {self._run.log.read_text()[-3000:]}")
            elif self._is_due():
                self._kill(process.pid, started)
            elif time.monotonic() > self._moved + _WITHOUT_PROGRESS:
                process.send_signal(signal.SIGABRT)
                raise RuntimeError(f"no progress: {self._run.log.read_text()[-3000:]}")
        self._soak.seconds = time.monotonic() - started
        if len(self._soak.kills) < self._args.kills:
            self._soak.problems.append("the run ended before all kills: give it more --steps")

    def _gap(self) -> float:
        """Seconds until the next kill."""
        done = len(self._soak.kills) / self._args.kills
        is_behind = done < self._progress() / self._args.steps
        return self._random.expovariate(1 / (_SOON if is_behind else _LATER))

    def _is_due(self) -> bool:
        """Whether there are kills left, and they are not far ahead of the run."""
        done = len(self._soak.kills)
        ahead = done / self._args.kills - self._progress() / self._args.steps
        return done < self._args.kills and ahead <= 0.15

    def _kill(self, controller: int, started: float) -> None:
        self._around.look()
        processes = self._around.processes()
        victims = find_victims(controller, processes, self._kinds)
        if self._args.vllm:  # few kills, and the server is what they are for
            victims = [v for v in victims if v.kind == self._next_kind()]
        if not victims:
            return
        victim: Victim = self._random.choice(victims)
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        at = time.monotonic() - started
        self._soak.kills.append(Kill(victim.kind, round(at, 2), self._step))
        print(f"{at:7.1f} s  step {self._step:4d}  killed {victim.kind}", flush=True)

    def _next_kind(self) -> str:
        """With servers: those and the controller in turns."""
        last = self._soak.kills[-1].kind if self._soak.kills else CONTROLLER
        return "server" if last == CONTROLLER else CONTROLLER

    def _progress(self) -> int:
        """Steps recorded as trained."""
        for step in _steps(self._run, after=self._step):
            self._step, self._moved = step, time.monotonic()
        return self._step

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def _steps(run: Run, after: int) -> list[int]:
    """The recorded steps after `after`; none where there is no ledger yet."""
    try:
        with Ledger.reader(run.layout.ledger_db) as ledger:
            segments = list(ledger.segments_after(after))
    except NpdError:
        return []
    return [step.index for segment in segments for step in segment.steps if step.index > after]


def _final_kl(run: Run) -> float:
    with Ledger.reader(run.layout.ledger_db) as ledger:
        reports = [payload["report"] for _, kind, payload in ledger.events() if kind == "Evaluated"]
    return float(reports[-1]["kl"])


def _check(
    args: argparse.Namespace, run: Run, around: LeakCheck, soak: Soak, calm: Sequence[float]
) -> None:
    """The books, the files, the student, the machine."""
    problems = soak.problems
    try:
        outcomes = check_books(run.layout, reuse=REUSE)
        soak.facts["samples"] = {str(k or "live"): n for k, n in sorted(outcomes.items(), key=str)}
        if outcomes[Outcome.FAILED]:
            problems.append(f"{outcomes[Outcome.FAILED]} samples failed")
    except AssertionError as error:
        problems.append(f"the books: {error}")
    if _steps(run, after=-1) != list(range(1, args.steps + 1)):
        problems.append("not every step counts exactly once")
    published = [*run.layout.snapshots.glob("v*"), *run.layout.checkpoints.glob("step-*")]
    for directory in (*published, run.layout.student):
        try:
            verify(directory)
        except NpdError as error:
            problems.append(str(error))
    problems += [f"left behind: {what}" for what in around.left(run.layout.root)]
    soak.facts |= _repeated(run)
    _judge(_final_kl(run), calm, soak)


def _judge(kl: float, calm: Sequence[float], soak: Soak) -> None:
    """Whether the held-out KL is one that the undisturbed runs foretell (99 %)."""
    spread = max(stdev(calm), _LEAST_SPREAD * mean(calm))
    room = _T99[len(calm)] * spread * (1 + 1 / len(calm)) ** 0.5
    low, high = mean(calm) - room, mean(calm) + room
    soak.facts["kl"] = {"killed": kl, "undisturbed": list(calm), "expected": [low, high]}
    if not low <= kl <= high:
        soak.problems.append(f"held-out KL {kl:.4f}, expected {low:.4f} to {high:.4f}")


def _repeated(run: Run) -> dict[str, Any]:
    """What had to be done again: tries at shards, segments of the trainer."""
    with Ledger.reader(run.layout.ledger_db) as ledger:
        failed = Counter(
            payload["stage"] for _, kind, payload in ledger.events() if kind == "ShardFailed"
        )
        events = sum(1 for _ in ledger.events())
    spans = [json.loads(line) for line in run.layout.trace_jsonl.read_text().splitlines()]
    redone = sum(span["name"] == "redo" for span in spans)
    return {"events": events, "tries": dict(failed), "segments_redone": redone}


def _markdown(args: argparse.Namespace, soak: Soak) -> str:
    kinds = Counter(kill.kind for kill in soak.kills)
    about, steps = _about(), max((kill.step for kill in soak.kills), default=0)
    host = about["machine"]
    lines = [
        "# A run under `kill -9`",
        "",
        "Made by `benchmarks/soak.py`; do not edit. What each line rests on is said there.",
        "",
        "| killed | how often | what was lost |",
        "| --- | --- | --- |",
        *(f"| {kind} | {kinds[kind]} | {_lost(kind, soak.facts)} |" for kind in sorted(kinds)),
        "",
        f"{len(soak.kills)} kills, the last after step {steps} of {args.steps}; the run took "
        f"{soak.seconds:.0f} s.",
        *_told(soak.facts),
        "",
        *([f"- PROBLEM: {problem}" for problem in soak.problems] or ["Nothing was wrong."]),
        "",
        f"- command: `python benchmarks/soak.py --kills {args.kills} --seed {args.seed} --steps "
        f"{args.steps} --baselines {args.baselines}"
        f"{' --vllm VENV' if args.vllm else ''}`",
        f"- commit: {about['commit']}",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, load "
        f"{host['load'][0]} at the end",
        f"- versions: {', '.join(f'{name} {found}' for name, found in about['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


def _told(facts: dict[str, Any]) -> list[str]:
    if "kl" not in facts:
        return []
    kl = facts["kl"]
    samples = ", ".join(f"{count} {what}" for what, count in facts.get("samples", {}).items())
    return [
        f"Samples: {samples}. Each was trained on at most {REUSE} times, each step counts once, "
        "every file matches its checksum.",
        f"Held-out KL {kl['killed']:.4f}; of undisturbed runs "
        f"{', '.join(f'{value:.4f}' for value in kl['undisturbed'])}, which foretell "
        f"{kl['expected'][0]:.4f} to {kl['expected'][1]:.4f} (99 %, Student's t).",
    ]


def _lost(kind: str, facts: dict[str, Any]) -> str:
    tries = facts.get("tries", {})
    return {
        CONTROLLER: "nothing recorded; workers started again",
        "generator": f"{tries.get('generate', 0)} tries at a shard, made again; no sample",
        "scorer": f"{tries.get('score', 0)} tries at a shard, made again; no sample",
        "trainer rank": f"{facts.get('segments_redone', 0)} segments repeated (controller's kills "
        "included); no step",
    }.get(kind, "in the tries above; no sample")


if __name__ == "__main__":
    sys.exit(main())

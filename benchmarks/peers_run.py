"""Whole runs of npd against TRL's `DistillationTrainer` and `GKDTrainer`, on one pair.

    make peers DATA=gsm8k_train.jsonl
    python benchmarks/peers_run.py --data FILE [--seeds N] [--folder DIR] [--out DIR]
    python benchmarks/peers_run.py --task sum    # a pair of the ladder's; needs no data

All start from the same student (`pair.py`), with the same teacher, prompts, longest response,
temperature, optimiser and learning rate (constant; `TUNED` has what was tried), and minimise a
forward KL. TRL is strictly on-policy; its weights and optimiser state are of the kind that it is
fastest with (`TRIED`; float32 on a task of the ladder), npd's weights are float32. npd runs its
`npd` preset (each response is trained on `npd_reuse` times, one refresh half way, top-10 KD with a
tenth of CE, Δ-IFD), and a second time with `SECOND`, made after the preset had been seen: KD alone,
on the top 32 and the mass outside, which is closer to TRL's full KL; on a task of the ladder: new
text in each epoch (`TASKS`, also for the sizes there). `make peers` has a start of 96 prompts
instead of `pair.py`'s 480, after which hardly anything that follows lowers held-out KL. One thread
each, one after another, CPU time of the process (with `--set-pair device=cuda` wall time, the
device's included; so below). Counted on no side: imports, loading, saving what is exported,
evaluation. Counted of npd: writing, scoring, training, publishing snapshots.

Three numbers, each with its name:

1. trainer tokens/s: real tokens trained on over the CPU time of the trainer (TRL: whole steps;
   npd: its train stage alone);
2. samples an hour: samples trained on (with reuse), and apart from it fresh ones (written), over
   the CPU time of everything counted;
3. CPU time to a KL: for each peer and seed, the lowest that this peer has at any of its
   evaluations, and when; for npd, its first evaluation at or below that. Of two KLs, on held-out
   prompts: on the teacher's text, and on what the student writes itself (`judging.py`), which is
   what on-policy text trains. On a task also to the smallest share of wrong workings. The same
   evaluator for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import judging
import pair
import pair_out
import task_pair
from common import clock_of, seconds
from ladder_bench import one_thread
from ladder_setting import SETTINGS, digest, with_values
from npd.__main__ import outcome
from npd.errors import InputError
from npd.observe.live import LiveState
from npd.workers.trainer import TrainerWorker
from peers_page import KLS, NAMES, OURS, page
from task_pair import TaskPair

Point: TypeAlias = Mapping[str, float]
Look: TypeAlias = Callable[[Path], dict[str, float]]

# Two steps each, before any run: (side, weights, batch, samples a CPU second). Float32 is slower
# mostly in `generate`; under bfloat16 autocast float32 weights are cast anew for every token.
TRIED = (
    ("distillation", "bfloat16", 8, 0.793),
    ("distillation", "float32", 8, 0.599),
    ("distillation", "bfloat16", 16, 0.923),
    ("gkd", "bfloat16", 8, 1.089),
    ("gkd", "bfloat16", 16, 1.177),
)
# One run each (`--first-seed 9 --seeds 1`, other prompts, the same held-out ones), responses of at
# most 64 tokens: side, prompts of the start, rate, TRL's weights, then what it ends with: CPU
# seconds, held-out KL, KL on own text. Rates were chosen by the last, before the page's runs.
TUNED = (
    ("start", 480, 0.0, "", 0, 1.030, 0.828),
    ("start", 96, 0.0, "", 0, 1.573, 0.891),
    ("npd_tail", 480, 1e-4, "", 116, 1.045, 0.720),
    ("npd_tail", 480, 2e-4, "", 115, 1.042, 0.699),
    ("npd", 480, 5e-5, "", 108, 1.016, 0.873),
    ("gkd", 480, 1e-4, "bfloat16", 155, 1.140, 0.760),
    ("gkd", 480, 2e-4, "bfloat16", 158, 1.250, 0.689),
    ("gkd", 480, 4e-4, "bfloat16", 155, 1.257, 0.699),
    ("npd_tail", 96, 2e-4, "", 129, 1.285, 0.669),
    ("gkd", 96, 5e-5, "bfloat16", 102, 1.583, 0.806),
    ("gkd", 96, 2e-4, "bfloat16", 107, 1.831, 0.778),
    ("gkd", 96, 2e-4, "float32", 163, 1.778, 0.719),
)
# npd's second setting on the real pair.
SECOND: Mapping[str, Any] = {"loss.target": "tail", "loss.kd_weight": 1.0, "score.top_k": 32}
COUNTED = ("generate", "score", "train", "publish")


@dataclass(frozen=True)
class Setting:
    """Sizes and rates of all sides, npd's own schedule, what TRL is fastest with (`TRIED`)."""

    num_prompts: int = 64
    npd_lr: float = 2e-4
    second_lr: float = 2e-4
    peer_lr: float = 2e-4
    budget: float = 150.0
    npd_epochs: int = 6
    npd_reuse: int = 3
    npd_batch: int = 16
    npd_segment: int = 2
    eval_steps: int = 4
    peer_batch: int = 16
    peer_dtype: str = "bfloat16"
    peer_most_steps: int = 1000
    every: float = 50.0


# On a task of the ladder: its batch, and for TRL as many samples as the ladder's rungs train on, 8
# epochs. npd gets twice as many, which takes it about as long.
TASKS = Setting(
    num_prompts=1536, npd_lr=1e-3, second_lr=1e-3, peer_lr=1e-3, budget=600.0, npd_epochs=16,
    npd_reuse=4, npd_batch=64, npd_segment=16, eval_steps=16, peer_batch=64, peer_dtype="float32",
    peer_most_steps=192, every=3.0,
)  # fmt: skip
# One run each (`--first-seed 9 --seeds 1`), of sums: side, rate, CPU seconds, then the lowest that
# it has: held-out KL, KL on own text, share of wrong workings.
TUNED_TASK = (
    ("npd", 5e-4, 44, 0.0179, 0.0259, 0.084),
    ("npd", 1e-3, 41, 0.0163, 0.0225, 0.080),
    ("npd", 2e-3, 39, 0.0174, 0.0314, 0.126),
    ("distillation", 5e-4, 47, 0.0188, 0.0282, 0.090),
    ("distillation", 1e-3, 42, 0.0189, 0.0244, 0.078),
    ("distillation", 2e-3, 43, 0.0223, 0.0305, 0.138),
    ("gkd", 5e-4, 42, 0.0210, 0.0279, 0.090),
    ("gkd", 1e-3, 41, 0.0190, 0.0267, 0.108),
    ("gkd", 2e-3, 38, 0.0221, 0.0288, 0.146),
)


class CpuView:
    """A view of a run that shows nothing: it keeps the time of each worker's calls, by `clock`.

    Of this process, so of all threads; with stages in turn that is the call's own.
    """

    def __init__(self, clock: str = "cpu") -> None:
        self._clock = clock
        self.calls: list[tuple[str, float]] = []
        self._doing: dict[str, tuple[str, float]] = {}

    def update(self, state: LiveState) -> None:
        """Note which calls began and ended."""
        now = seconds(self._clock)
        for worker in state.workers:
            doing, since = self._doing.get(worker.name, ("idle", 0.0))
            if doing != worker.doing:
                if doing != "idle":
                    self.calls.append((doing, now - since))
                self._doing[worker.name] = (worker.doing, now)

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def seconds(self) -> dict[str, float]:
        """Seconds by what was done."""
        found: dict[str, float] = {}
        for doing, taken in self.calls:
            found[doing] = found.get(doing, 0.0) + taken
        return found

    def before_evaluations(self) -> list[float]:
        """Seconds of what is counted before each evaluation."""
        found, spent = [], 0.0
        for doing, taken in self.calls:
            if doing == "evaluate":
                found.append(spent)
            spent += taken if doing in COUNTED else 0.0
        return found


@contextmanager
def looked_at(look: Look) -> Iterator[list[dict[str, float]]]:
    """What `look` says of each student that a run evaluates but the first, in that same call."""
    # A run has no hook there, and what it keeps on disk is not a student at each evaluation.
    plain, found = TrainerWorker.evaluate, []

    def evaluate(worker: TrainerWorker, step: int, prompts: Any) -> Any:
        report = plain(worker, step, prompts)
        if step > 0:
            with tempfile.TemporaryDirectory() as folder:
                worker._trainer.save_pretrained(folder)
                found.append(look(Path(folder)))
        return report

    with patch.object(TrainerWorker, "evaluate", evaluate):
        yield found


def second_of(made: pair.Pair, setting: Setting) -> Mapping[str, Any]:
    """npd's second setting: on a task the ladder's row "refresh every epoch"."""
    if not isinstance(made, TaskPair):
        return SECOND
    often = {"at_epochs": list(range(1, setting.npd_epochs))}
    return {"schedule.reuse": 1, "schedule.refresh": often}


def npd_values(made: pair.Pair, setting: Setting, seed: int, *, is_second: bool) -> dict[str, Any]:
    """What a run of npd is told on top of its preset."""
    lr = setting.second_lr if is_second else setting.npd_lr
    return {
        "data.train": made.prompts(seed, setting.num_prompts),
        "train.lr": lr,
        "train.min_lr": lr,
        "train.batch_size": setting.npd_batch,
        "schedule.epochs": setting.npd_epochs,
        "schedule.reuse": setting.npd_reuse,
        "schedule.refresh": {"at_epochs": [setting.npd_epochs // 2]},
        "schedule.segment_steps": setting.npd_segment,
        "eval.every_steps": setting.eval_steps,
        "eval.num_samples": 0,
        **(second_of(made, setting) if is_second else {}),
    }


def run_npd(
    made: pair.Pair, setting: Setting, seed: int, home: Path, first: Point, *, is_second: bool
) -> dict[str, Any]:
    """A whole run of npd: what it trained, and the CPU time of its stages; `first`: the start."""
    view = CpuView(clock_of(made.setting.device))
    values = npd_values(made, setting, seed, is_second=is_second)
    with looked_at(lambda student: judging.glance(made, student)) as looks:
        data = made.run(home, "npd", seed, values, view).data
    steps, evals = data.steps, data.evals
    spent = view.seconds()
    sofar = [sum(s["num_samples"] for s in steps if s["step"] <= e["step"]) for e in evals]
    moments = view.before_evaluations()
    return {
        "seconds": {
            "step": sum(spent.get(name, 0.0) for name in COUNTED),
            **{name: spent.get(name, 0.0) for name in COUNTED},
        },
        "uncounted": {name: s for name, s in spent.items() if name not in COUNTED},
        "trainer_seconds": spent["train"],
        "steps": len(steps),
        "samples": sum(step["num_samples"] for step in steps),
        "fresh": data.throughput["generate"].samples,
        "tokens": sum(step["total_tokens"] for step in steps),
        "response_tokens": sum(step["response_tokens"] for step in steps),
        "fill": sum(step["fill"] for step in steps) / len(steps),
        "run_kl": [e["kl"] for e in evals],
        "drift": [step["drift"] for step in steps],
        "curve": [
            {"seconds": at, "samples": n, **look}
            for at, n, look in zip(moments, sofar, [first, *looks], strict=True)
        ],
    }


def run_peer(
    made: pair.Pair, setting: Setting, seed: int, name: str, home: Path, first: Point
) -> dict[str, Any]:
    """TRL's trainer until its budget is spent; `first`: what was found of the start."""
    from peers_trl import PeerSetting
    from peers_trl import run_peer as train

    count = train(
        name,
        PeerSetting(
            student=made.start,
            teacher=made.teacher,
            prompts=made.prompts(seed, setting.num_prompts),
            system=made.system,
            seed=seed,
            lr=setting.peer_lr,
            batch=setting.peer_batch,
            max_response=made.setting.max_response,
            budget=setting.budget,
            most_steps=setting.peer_most_steps,
            dtype=setting.peer_dtype,
            teacher_dtype=made.dtype,
            every=setting.every,
            device=made.setting.device,
        ),
        lambda student: judging.glance(made, student),
        home / "student",
    )
    found = asdict(count)
    found["curve"].insert(0, {"seconds": 0.0, "samples": 0, **first})
    return found | {"trainer_seconds": count.seconds["step"], "fresh": count.samples}


SIDES = tuple(NAMES)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = pair_out.make_parser(__doc__, needs_data=False)
    parser.add_argument("--task", choices=sorted(SETTINGS), help="a pair of the ladder's instead")
    parser.add_argument(
        "--set-task", nargs="+", default=[], metavar="NAME=VALUE", help="of the ladder's Setting"
    )
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Setting")
    return parser.parse_args()


def open_pair(args: argparse.Namespace, folder: Path) -> pair.Pair:
    """The pair that the command line names."""
    if args.task is None:
        return pair_out.open_pair(args, folder)
    sizes = pair_out.changed(task_pair.SETTING, args.set_pair)
    return TaskPair(with_values(SETTINGS[args.task], args.set_task), sizes, folder)


def bench(args: argparse.Namespace) -> int:
    """Run what is missing, side by side for each seed, and write the page."""
    if importlib.util.find_spec("trl") is None:
        raise InputError("this needs TRL: pip install 'trl>=1.16' (the `bench` extra)")
    one_thread()
    setting = pair_out.changed(TASKS if args.task else Setting(), args.set)
    with pair_out.place(args) as folder:
        made = open_pair(args, folder)
        start = made.make_start()
        look = pair.cell(
            made.root / "start" / "look", lambda: judging.glance(made, made.start), dict
        )
        first = {name: look[name] for name in (*KLS, "agreement") if name in look}
        home = made.root / f"peers-{digest(asdict(setting))}"
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for side in args.sides:
                _cell(made, setting, seed, side, home / f"{side}-{seed}", first)
        cells = pair_out.finished(home)
    start |= first
    sides = [side for side in SIDES if any(cell["side"] == side for cell in cells)]
    about = pair_out.about("peers_run.py", args, cells, {"sides": sides})
    about["setting"] = {**asdict(made.setting), **asdict(setting)}
    about |= {"second": second_of(made, setting), "task": args.task}
    if args.task is None:
        about |= {"tried": TRIED, "tuned": TUNED}
    else:
        about["tuned_task"] = TUNED_TASK
    record = {"start": start, "cells": cells, **about}
    pair_out.publish(args.out, "peers", page(start, cells, about), record)
    return 0


def _cell(
    made: pair.Pair, setting: Setting, seed: int, side: str, home: Path, first: Point
) -> None:
    def work() -> dict[str, Any]:
        if side in OURS:
            found = run_npd(made, setting, seed, home, first, is_second=side == "npd_tail")
        else:
            found = run_peer(made, setting, seed, side, home, first)
        last = {name: found["curve"][-1][name] for name in KLS if name in first}
        return {"side": side, "seed": seed, **last, **found}

    pair.cell(home, work, lambda found: found)


def main() -> int:
    """The benchmark; a wrong input ends it in one line."""
    args = parse_args()
    return outcome(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())

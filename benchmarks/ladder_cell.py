"""What one run of the ladder measured, as plain JSON values, and what is kept of its files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import npd
from ladder_page import Cell
from npd.data.chat_tokenizer import ChatTokenizer
from npd.filters import delta_ifd
from npd.store.layout import RunLayout
from npd.store.shards import read_rollouts
from npd.types import Outcome
from tasks import MARK, is_right, read_problems

# Where Δ-IFD's distribution is read off.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measured(result: npd.RunResult, name: str, seed: int, heldout: Path) -> dict[str, Any]:
    """The figures of a finished run; means over all its steps, or over its last tenth."""
    if not result.is_done:
        sys.exit("interrupted: the same command with the same --folder goes on")
    data = result.data
    first, last, steps = data.evals[0], data.evals[-1], data.steps
    answers = {row["prompt"]: row["answer"].removeprefix(MARK) for row in read_problems(heldout)}
    tail = steps[-max(1, len(steps) // 10) :]
    drifts = [step["drift"] for step in steps if step["drift"] is not None]
    deltas = sorted(delta for s in data.samples if (delta := delta_ifd(s.stats)) == delta)
    rejected = {why: n for (what, why), n in data.reasons.items() if what is Outcome.REJECTED}
    return {
        "rung": name,
        "seed": seed,
        "start_accuracy": _accuracy(first["samples"], answers),
        "accuracy": _accuracy(last["samples"], answers),
        "start_kl": first["kl"],
        "kl": last["kl"],
        "agreement": last["agreement"],
        "steps": len(steps),
        "response_tokens": sum(step["response_tokens"] for step in steps),
        "total_tokens": sum(step["total_tokens"] for step in steps),
        "asked": data.conservation["asked"],
        "rejected": rejected,
        "drift": sum(drifts) / len(drifts) if drifts else None,
        "drift_end": _mean(tail, "drift"),
        "entropy": _mean(tail, "entropy"),
        "ce": _mean(tail, "ce"),
        "kd": _mean(tail, "kd"),
        "delta_quantiles": [deltas[int(q * (len(deltas) - 1))] for q in QUANTILES if deltas],
        "stage_seconds": {stage: rate.busy_seconds for stage, rate in data.throughput.items()},
    }


def right_shares(result: npd.RunResult, config: npd.RunConfig) -> dict[str, float]:
    """Share of right answers among the samples that were kept, and among those left out, by reason.

    What a filter should keep need not be right; but one that leaves out what is shows itself here.
    """
    chat, layout = ChatTokenizer.load(config.student), RunLayout(result.directory)
    answers = [row["answer"].removeprefix(MARK) for row in read_problems(Path(config.data.train))]
    why = {
        sample.stats.sample_id: sample.reason if sample.outcome is Outcome.REJECTED else "kept"
        for sample in result.data.samples
    }
    found: dict[str, list[bool]] = {}
    for path in sorted(layout.root.glob("rollouts/*.arrow")):
        for rollout in read_rollouts(path):
            if rollout.sample_id not in why:  # of very many, a run gives account of every k-th
                continue
            is_so = is_right(chat.decode(rollout.response_ids), answers[rollout.prompt_index])
            found.setdefault(why[rollout.sample_id], []).append(is_so)
    return {reason: sum(values) / len(values) for reason, values in sorted(found.items())}


def line(cell: Cell) -> str:
    """A run in one line, for whoever watches."""
    kl = f"KL {cell['kl']:.4f}" if cell["kl"] is not None else ""
    accuracy = f"{cell['start_accuracy']:.3f} -> {cell['accuracy']:.3f}"
    return f"seed {cell['seed']} {cell['rung']:12} {accuracy} {kl} {cell['cpu_seconds']:.0f} s"


def _accuracy(samples: Sequence[tuple[str, str]], answers: Mapping[str, str]) -> float:
    """Share of (prompt, greedy response) that end in the right answer."""
    assert len(samples) == len(answers)
    return sum(is_right(response, answers[prompt]) for prompt, response in samples) / len(answers)


def _mean(steps: Any, name: str) -> float | None:
    values = [step[name] for step in steps if step[name] is not None]
    return sum(values) / len(values) if values else None


def tidy(home: Path) -> None:
    """Keep the student, the metrics and the config of a run, not its shards and checkpoints."""
    layout = RunLayout(home / "run")
    shutil.move(layout.student, home / "student")
    shutil.move(layout.metrics_jsonl, home / "metrics.jsonl")
    shutil.rmtree(layout.root)

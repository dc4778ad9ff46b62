"""Advice from a run's own numbers: at most four findings, each with a setting to change.

One pure function of a run's facts. `npd show` and the report apply it to a finished run, `npd
doctor` to a run before its start, with fewer facts. A remedy is a `--set` option for the next run.
Thresholds are rules of thumb; a comment explains each.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from npd.config.length import RULES
from npd.config.sections import SIZES_ON_CPU, SIZES_ON_GPU, ScoreSizes
from npd.config.sources import as_yaml
from npd.observe.live import NEAR_POLICY_DRIFT
from npd.text import counted

MOST = 4
# With fewer optimiser steps a run hardly trains; AdamW's moments alone need about ten steps.
_FEW_STEPS, _GOOD_STEPS, _LEAST_BATCH = 30, 100, 4
# The usual learning rate for fully fine-tuning a 7B model, how it scales with size, and for LoRA.
_USUAL_LR, _USUAL_SIZE, _LORA_LR, _MOST_LR = 1e-5, 7e9, 1e-4, 1e-3
# AdamW moves a weight by about lr per step; fewer than ten steps at the usual rate change little.
_LEAST_USUAL_STEPS = 10
# With a larger share of truncated responses the student may learn not to end.
_MOST_TRUNCATED = 0.10
# The minimum mass that the teacher's top k should hold (docs/method.md), and the largest and the
# smallest share that a filter should reject, from a minimum number of judged samples.
_ENOUGH_MASS, _MOST_REJECTED, _LEAST_REJECTED, _ENOUGH_JUDGED = 0.9, 0.6, 0.005, 256
# With a larger share of waiting the trainer is not the bottleneck; short runs say nothing.
_MOST_IDLE, _LEAST_WALL = 0.5, 120.0
# If the held-out KL fell by this share, few steps were enough.
_ENOUGH_GAIN = 0.3


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts of a run; None or empty means unknown.

    `config`: as from `dump_config`. `lr_sum`: the sum of the learning rates of all steps. `drift`:
    the largest drift of a few consecutive steps, in nats per token. `generated`, `truncated`,
    `judged`, `rejected`: numbers of samples. `kl`: held-out KL before and after. `is_worse`: the KL
    rose by more than noise. `idle`: the share of time that the trainer waited. `busiest`: the stage
    that was busy longest meanwhile. `wall`: the run's seconds.
    """

    config: Mapping[str, Any]
    steps: int | None = None
    lr_sum: float | None = None
    parameters: int | None = None
    context: int | None = None
    generated: int = 0
    truncated: int = 0
    judged: int = 0
    rejected: int = 0
    drift: float | None = None
    mass: float | None = None
    kl: tuple[float, float] | None = None
    is_worse: bool = False
    idle: float | None = None
    busiest: str | None = None
    wall: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding and the values to set; the first one is its key."""

    weight: int
    text: str
    sets: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The finding as one line that ends with the options to type."""
        words = (shlex.quote(f"{key}={as_yaml(value)}") for key, value in self.sets.items())
        return f"{self.text}: " + " ".join(f"--set {word}" for word in words)


def findings(facts: RunFacts, most: int = MOST) -> list[Finding]:
    """The findings, most serious first."""
    found = [finding for rule in _RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: -finding.weight)[:most]


def usual_lr(facts: RunFacts) -> float | None:
    """The usual learning rate for a student of this size; None if the size is unknown."""
    if facts.config["train"]["lora"] is not None:
        return _LORA_LR
    if not facts.parameters:
        return None
    return _rounded(min(_MOST_LR, _USUAL_LR * math.sqrt(_USUAL_SIZE / facts.parameters)))


def _rounded(value: float) -> float:
    """`value` rounded to one significant digit."""
    return float(f"{value:.0e}")


def _has_gained(facts: RunFacts) -> bool:
    return facts.kl is not None and facts.kl[1] < (1 - _ENOUGH_GAIN) * facts.kl[0]


def _worse(facts: RunFacts) -> Iterator[Finding]:
    if facts.is_worse and facts.kl is not None:
        lr, least = facts.config["train"]["lr"], facts.config["train"]["min_lr"]
        lower = _rounded(lr / 3)
        sets = {"train.lr": lower} | ({"train.min_lr": lower / 10} if least > lower else {})
        before, after = facts.kl
        text = f"held-out KL to the teacher rose from {before:.3f} to {after:.3f}, beyond noise"
        yield Finding(100, f"{text}; train.lr was {lr:g}", sets)


def _few_steps(facts: RunFacts) -> Iterator[Finding]:
    steps, train = facts.steps, facts.config["train"]
    if steps is None or not 0 < steps < _FEW_STEPS or _has_gained(facts):
        return
    schedule = facts.config["schedule"]
    text = f"{'only ' if steps > 1 else ''}{counted(steps, 'optimiser step')}"
    batch = max(_LEAST_BATCH, train["batch_size"] * steps // _GOOD_STEPS)
    if schedule["steps"] is not None:
        yield Finding(90, f"{text}, set by schedule.steps", {"schedule.steps": _GOOD_STEPS})
    elif train["batch_size"] * steps >= _FEW_STEPS * batch:
        text = f"{text} of train.batch_size {train['batch_size']}"
        yield Finding(90, text, {"train.batch_size": batch})
    else:
        epochs = schedule["epochs"] * math.ceil(_GOOD_STEPS / steps)
        yield Finding(90, f"{text}: more prompts, or more epochs", {"schedule.epochs": epochs})


def _low_lr(facts: RunFacts) -> Iterator[Finding]:
    usual, lr = usual_lr(facts), facts.config["train"]["lr"]
    if usual is None or facts.lr_sum is None or _has_gained(facts):
        return
    if facts.lr_sum < _LEAST_USUAL_STEPS * usual and lr <= usual / 2:
        size = "adapters" if not facts.parameters else f"a student of {_size(facts.parameters)}"
        text = (
            f"train.lr {lr:g} over {counted(facts.steps or 0, 'step')} hardly changes {size}; "
            f"{usual:g} is usual (a rule of thumb)"
        )
        yield Finding(85, text, {"train.lr": usual})


def _size(parameters: int) -> str:
    """`81 M` or `7.6 B`."""
    return f"{parameters / 1e6:,.0f} M" if parameters < 1e9 else f"{parameters / 1e9:,.1f} B"


def _truncated(facts: RunFacts) -> Iterator[Finding]:
    if not facts.generated or facts.truncated <= _MOST_TRUNCATED * facts.generated:
        return
    most = facts.config["generate"]["max_new_tokens"]
    share = facts.truncated / facts.generated
    text = f"{share:.0%} of the responses were truncated at generate.max_new_tokens ({most})"
    yield Finding(80, text, _longer(facts, most) or {"filter.drop_truncated": False})


def _longer(facts: RunFacts, most: int) -> dict[str, Any]:
    """Settings for twice the response length, within the model's context, and for longer rows."""
    prompt = facts.config["data"]["max_prompt_tokens"]
    longer = 2 * most if not facts.context else min(2 * most, facts.context - prompt)
    if longer <= most:
        return {}
    sets: dict[str, Any] = {"generate.max_new_tokens": longer}
    for section in ("score", "train"):
        if _rows(facts, section, SIZES_ON_CPU) < prompt + longer:
            sets[f"{section}.row_tokens"] = prompt + longer
    return sets


def _drift(facts: RunFacts) -> Iterator[Finding]:
    config = facts.config
    if facts.drift is None or facts.drift <= NEAR_POLICY_DRIFT:
        return
    if config["generate"]["source"] != "student":
        return
    text = (
        f"the student drifted {facts.drift:.2f} nats/token from the snapshot that generates "
        f"(near-policy is up to {NEAR_POLICY_DRIFT:.2f})"
    )
    refresh, sampling = config["schedule"]["refresh"], config["generate"]
    is_own = (sampling["temperature"], sampling["top_p"]) == (1.0, 1.0)
    if is_own and refresh["drift"] is None:
        batch, shard = config["train"]["batch_size"], config["generate"]["shard_size"]
        sets: dict[str, Any] = {"schedule.refresh.drift": NEAR_POLICY_DRIFT}
        sets |= {"schedule.window": max(4 * batch, 2 * shard)}
        # Another refresh rule must be unset when this one is given.
        sets |= {f"schedule.refresh.{rule}": None for rule in RULES if refresh.get(rule)}
        yield Finding(70, text, sets)
    else:
        lower = _rounded(config["train"]["lr"] / 2)
        least = {"train.min_lr": lower / 10} if config["train"]["min_lr"] > lower else {}
        yield Finding(70, text, {"train.lr": lower, **least})


def _rejecting(facts: RunFacts) -> Iterator[Finding]:
    name = facts.config["filter"]["name"]
    if name not in ("delta_ifd", "outlier") or facts.judged < _ENOUGH_JUDGED:
        return
    share = facts.rejected / facts.judged
    if share <= _MOST_REJECTED:
        return
    text = f"filter.name {name} rejected {share:.0%} of {facts.judged:,} samples"
    if name == "outlier":
        given = facts.config["filter"]["deviations"]
        yield Finding(65, text, {"filter.deviations": 2 * given})
    elif facts.config["filter"]["bounds"] == "fixed":
        yield Finding(65, text, {"filter.bounds": "quantile"})
    else:
        yield Finding(65, text, {"filter.low_quantile": 0.05, "filter.high_quantile": 0.95})


def _idle_filter(facts: RunFacts) -> Iterator[Finding]:
    found = facts.config["filter"]
    if found["name"] != "delta_ifd" or facts.judged < _ENOUGH_JUDGED:
        return
    if facts.rejected < _LEAST_REJECTED * facts.judged:
        text = (
            f"filter.name delta_ifd rejected {facts.rejected} of {facts.judged:,} samples, and its "
            "passes without the prompt cost scoring time"
        )
        yield Finding(20, text, {"filter.name": "none"})


def _mass(facts: RunFacts) -> Iterator[Finding]:
    loss, top_k = facts.config["loss"], facts.config["score"]["top_k"]
    if facts.mass is None or facts.mass >= _ENOUGH_MASS or loss["kd_weight"] == 0:
        return
    if loss["target"] in ("topk", "renorm"):
        text = (
            f"the teacher's top {top_k} hold {facts.mass:.0%} of its probability, and the loss "
            "ignores the rest"
        )
        yield Finding(50, text, {"loss.target": "tail"})


def _waiting(facts: RunFacts) -> Iterator[Finding]:
    if facts.idle is None or facts.idle <= _MOST_IDLE or facts.wall < _LEAST_WALL:
        return
    text = f"the trainer waited {facts.idle:.0%} of the time, mostly for {facts.busiest}"
    if facts.busiest == "generate":
        size = facts.config["generate"]["batch_size"]
        yield Finding(30, text, {"generate.batch_size": 2 * size})
    elif facts.busiest == "score":
        yield Finding(30, text, {"score.row_tokens": 2 * _rows(facts, "score", SIZES_ON_GPU)})


def _rows(facts: RunFacts, section: str, auto: ScoreSizes) -> int:
    """Tokens of a row; `auto` where the scorer's own device decides, as on Ray."""
    rows: int | str = facts.config[section]["row_tokens"]
    return rows if isinstance(rows, int) else auto.row_tokens


_RULES = (
    *(_worse, _few_steps, _low_lr, _truncated, _drift),
    *(_rejecting, _mass, _waiting, _idle_filter),
)

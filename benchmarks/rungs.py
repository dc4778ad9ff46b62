"""The configurations that the ladder compares: presets of npd with a few values set on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Values: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Rung:
    """A configuration: a preset and what is set on top of it."""

    label: str
    preset: str
    values: Values


GROUPS = {
    "ladder": (
        "sft", "seqkd", "offline", "rollouts", "filter", "npd", "on_policy", "every_epoch",
    ),
    "controls": ("sft_long", "teacher_text"),
    "filters": ("no_filter", "letter", "random", "quantile"),
    "sweeps": (
        "lambda=0", "lambda=0.5", "lambda=1", "k=1", "k=3", "k=20", "tau=0.2", "tau=0.4",
        "refreshes=3",
    ),
    "targets": ("target=renorm", "target=tail", "target=sampled"),
    "refreshes": ("window=0", "window=96", "window=48", "window=24", "drift=0.1", "drift=0.05"),
    "skip": ("rollouts-skip", "npd-skip", "on_policy-skip", "every_epoch-skip"),
    "prefixes": ("prefix=8", "prefix=12", "prefix=16"),
    "quick": ("sft", "offline", "npd"),
}  # fmt: skip


def rungs(epochs: int, batch: int) -> dict[str, Rung]:
    """Every configuration by name: the ladder, what it is held against, and the sweeps.

    Those that write text twice (SeqKD, rollouts, filter, NPD) use each text for half of the epochs.
    """
    near = _passes(epochs, epochs // 2) | {"schedule.refresh": {"at_epochs": [epochs // 2]}}
    return {
        **_ladder(epochs, batch, near),
        **_filters(near),
        **_sweeps(epochs, near),
        **_streams(epochs, batch),
        **_skips(_ladder(epochs, batch, near)),
    }


def _passes(epochs: int, reuse: int) -> dict[str, Any]:
    """All epochs, each text used in `reuse` of them."""
    return {"schedule.epochs": epochs, "schedule.reuse": reuse}


def _ladder(epochs: int, batch: int, near: Values) -> dict[str, Rung]:
    """The paper's order, and what people use besides."""
    once, twice, each = (_passes(epochs, reuse) for reuse in (epochs, epochs // 2, 1))
    stale = twice | {"schedule.refresh": "never"}
    often = each | {"schedule.refresh": {"at_epochs": list(range(1, epochs))}}
    return {
        "sft": Rung("SFT", "sft", once),
        "sft_long": Rung("SFT, four times as long", "sft", _passes(4 * epochs, 4 * epochs)),
        "seqkd": Rung("SeqKD", "seqkd", twice),
        "offline": Rung("offline top-k KD", "offline_kd", once),
        "rollouts": Rung("+ packed student rollouts", "npd", stale | {"filter.name": "none"}),
        "filter": Rung("+ Δ-IFD", "npd", stale),
        "npd": Rung("+ one refresh (NPD)", "npd", near),
        "teacher_text": Rung(
            "top-k KD on new teacher text", "seqkd", twice | {"loss.kd_weight": 0.9}
        ),
        "on_policy": Rung("strict on-policy", "on_policy", each | {"schedule.window": batch}),
        "every_epoch": Rung("refresh every epoch", "npd", often),
    }


def _filters(near: Values) -> dict[str, Rung]:
    """NPD with other filters."""
    letter = {"filter.tolerance": 0.0, "filter.min_nll": 0.0}
    by_chance = letter | {"filter.name": "random"}
    return {
        "no_filter": Rung("NPD without filter", "npd", near | {"filter.name": "none"}),
        "letter": Rung("NPD, filter to the letter", "npd", near | letter),
        "random": Rung("NPD, as many dropped at random", "npd", near | by_chance),
        "quantile": Rung("NPD, bounds by quantiles", "npd", near | {"filter.bounds": "quantile"}),
    }


def _sweeps(epochs: int, near: Values) -> dict[str, Rung]:
    """NPD with one other value: those of the paper's sweeps, other targets, prefixes."""
    often = {"schedule.reuse": 2, "schedule.refresh": {"at_epochs": list(range(2, epochs, 2))}}
    found = {"refreshes=3": Rung(f"{(epochs - 1) // 2} refreshes", "npd", near | often)}

    def add(name: str, label: str, **values: Any) -> None:
        dotted = {key.replace("__", "."): value for key, value in values.items()}
        found[name] = Rung(label, "npd", near | dotted)

    for weight in (0.0, 0.5, 1.0):
        add(f"lambda={weight:g}", f"λ = {weight:g}", loss__kd_weight=weight)
    found["offline-lambda=1"] = Rung(
        "offline top-k KD, λ = 1", "offline_kd", _passes(epochs, epochs) | {"loss.kd_weight": 1.0}
    )
    found["rollouts-lambda=1"] = Rung(
        "+ packed student rollouts, λ = 1", "npd",
        near | {"schedule.refresh": "never", "filter.name": "none", "loss.kd_weight": 1.0},
    )  # fmt: skip
    for k in (1, 3, 20):
        add(f"k={k}", f"k = {k}", score__top_k=k)
    for high in (0.2, 0.4):
        add(f"tau={high:g}", f"τ = {high:g}", filter__high=high)
    for target in ("renorm", "tail", "sampled"):
        add(f"target={target}", f"target: {target}", loss__target=target)
    for tokens in (8, 12, 16):
        # What is cut is what is asked for: no reason to reject it.
        values = {"generate__max_new_tokens": tokens, "filter__drop_truncated": False}
        add(f"prefix={tokens}", f"first {tokens} tokens only", **values)
    return found


def _streams(epochs: int, batch: int) -> dict[str, Rung]:
    """A window of a few batches, so that a refresh between epochs reaches what is written next."""
    size, found = 8 * batch, {}
    window = _passes(epochs, epochs // 2) | {"schedule.window": size}
    for steps in (0, 96, 48, 24):
        rule: Any = {"every_steps": steps} if steps else "never"
        what = f"refresh each {steps} steps" if steps else "no refresh"
        label = f"window of {size}, {what}"
        found[f"window={steps}"] = Rung(label, "npd", window | {"schedule.refresh": rule})
    for drift in (0.05, 0.1):
        rule = {"drift": drift, "min_steps": 16}
        label = f"window of {size}, refresh at drift {drift:g}"
        found[f"drift={drift:g}"] = Rung(label, "npd", window | {"schedule.refresh": rule})
    return found


def _skips(ladder: Mapping[str, Rung]) -> dict[str, Rung]:
    """Rungs of own text without what follows a token that the teacher finds unlikely."""
    rule = {"loss.skip_after": 0.01}
    return {
        f"{name}-skip": Rung(f"{rung.label}, skipping", rung.preset, rung.values | rule)
        for name, rung in ladder.items()
        if name in ("rollouts", "npd", "on_policy", "every_epoch")
    }

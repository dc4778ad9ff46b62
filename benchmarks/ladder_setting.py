"""What the ladder trains on what: sizes, numbers and rates, and how they are set by hand."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

# One process and thread, nothing written that a benchmark does not read.
ALONE: Mapping[str, Any] = {
    "checkpoint.every_steps": None,
    "observe.report": False,
    "observe.trace": False,
    "runtime.kind": "inline",
    "runtime.device": "cpu",
    "runtime.threads": 1,
}


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, and heads of 16 numbers each or more."""

    layers: int
    width: int
    heads: int = 4


@dataclass(frozen=True)
class Setting:
    """What is trained on what. `levels`: least and most steps of a problem's working. `is_new`: the
    rungs train on prompts drawn anew (a few may be the start's), as many as it has. `slips`: share
    of steps in the teacher's own texts that go wrong and are mended (task `mend`). `start_prompts`:
    how many prompts the start is trained on, the rungs' first among them; None: the rungs' alone.
    """

    task: str
    levels: tuple[int, int]
    is_varied: bool
    num_prompts: int
    num_heldout: int
    teacher: Shape
    teacher_problems: int
    teacher_epochs: int
    student: Shape
    warm_epochs: int
    epochs: int
    lr: float
    warm_lr: float = 3e-3
    teacher_lr: float = 2e-3
    batch: int = 64
    max_response: int = 64
    is_new: bool = False
    slips: float = 0.0
    start_prompts: int | None = None


# 1,536 prompts are few enough that fine-tuning on them ends far below the teacher, and enough that
# every seed's student learns to add at all (with 1,024 some do not, and then no rung helps).
SUM = Setting(
    task="sum", levels=(3, 4), is_varied=True, num_prompts=1536, num_heldout=1000,
    teacher=Shape(3, 128), teacher_problems=48_000, teacher_epochs=2, student=Shape(2, 64),
    warm_epochs=40, epochs=8, lr=1e-3,
)  # fmt: skip
# `list` is nearly mastered at these sizes (by no student with 768 prompts); with fewer prompts than
# these some students of `mend` do not learn to add; of `program` they learn next to nothing with
# half as many.
SETTINGS = {
    "sum": SUM,
    "mend": replace(SUM, task="mend", slips=0.05, num_prompts=2048, warm_epochs=30),
    "list": replace(SUM, task="list", levels=(2, 4)),
    "program": replace(SUM, task="program", levels=(2, 4), num_prompts=3072),
}


def with_values(setting: Any, items: Sequence[str]) -> Any:
    """A frozen record with some fields set, each as `name=value` (JSON; a Shape as its numbers).

    Exits with one line where a name is none of the record's, or a value not of the field's kind.
    """
    kinds, values = {field.name: str(field.type) for field in fields(setting)}, {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in kinds:
            sys.exit(f"{item}: no such name; there are {', '.join(kinds)}")
        try:
            values[name] = _value(kinds[name], json.loads(value))
        except (TypeError, ValueError):
            sys.exit(f"{item}: not a value for {name}, which is {_KINDS[kinds[name]]}")
    return replace(setting, **values)


_KINDS = {
    "str": "a text in double quotes",
    "bool": "true or false",
    "int": "a whole number above 0",
    "int | None": "a whole number above 0, or null",
    "float": "a number, 0 or more",
    "tuple[int, int]": "two whole numbers above 0, as [3,4]",
    "Shape": "layers, width and perhaps heads, as [3,128,4]",
}


def _value(kind: str, found: Any) -> Any:
    """What was read from JSON as a value of that kind; ValueError or TypeError if it is none."""
    if kind in ("Shape", "tuple[int, int]"):
        numbers = tuple(_value("int", number) for number in found)
        if kind == "Shape":
            return Shape(*numbers)
        is_one = len(numbers) == 2
        found = numbers
    elif kind in ("str", "bool"):
        is_one = type(found).__name__ == kind
    elif kind == "float":
        is_one = type(found) in (int, float) and found >= 0
    else:
        is_one = (type(found) is int and found > 0) or (kind == "int | None" and found is None)
    if not is_one:
        raise ValueError(found)
    return found


def digest(values: Mapping[str, Any]) -> str:
    """What tells apart the folders of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

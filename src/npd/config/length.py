"""The reuse and the refresh points that follow from the length of a run. Pure functions.

A preset states both for its own length. If a higher layer changes only the length, they are scaled:
a refresh stays at the same share of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DEFAULT_EPOCHS, DEFAULT_REUSE, DEFAULT_AT_EPOCHS = 10, 5, (5,)
RULES = ("every_steps", "at_epochs", "at_steps", "drift")
"""The refresh rules that exclude each other."""
# The refresh rules that list points of the run, and the unit of the points.
_LENGTHS = {"refresh.at_epochs": "epochs", "refresh.at_steps": "steps"}


def following(below: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values implied by the length in `given`, unless `given` sets them; `below`: lower layers.

    All three are values of `schedule` by dotted path (`refresh.at_epochs`). Empty if `given` sets
    no length, or if the values of `below` still fit. A rule that is replaced by another is `None`.

    >>> following({"epochs": 10, "reuse": 5, "refresh.at_epochs": (5,)}, {"steps": 30})
    {'refresh.at_epochs': None, 'refresh.at_steps': [15]}
    """
    steps, epochs = _number(given.get("steps")), _number(given.get("epochs"))
    if (steps is None) == (epochs is None):
        return {}
    old_rule = _listing_rule(below)
    if old_rule in given or any(_is_rule(key, value) for key, value in given.items()):
        old_rule = None
    shares = [] if old_rule is None else _shares(below, old_rule)
    if steps is not None:
        return _in_steps(steps, shares, below, old_rule)
    assert epochs is not None
    return _in_epochs(epochs, shares, below, given, old_rule)


def best_reuse(epochs: int, most: int, points: Iterable[int] = ()) -> int:
    """The largest reuse up to `most` that divides the epochs and each of the refresh `points`."""
    common = math.gcd(epochs, *points)
    return max(each for each in range(1, min(most, common) + 1) if common % each == 0)


def points_at(shares: Iterable[float], length: int, *, unit: int = 1) -> list[int]:
    """Shares of a run as points strictly inside it, rounded to multiples of `unit`."""
    last = length // unit - 1
    inside = (math.floor(share * length / unit + 0.5) for share in shares if share < 1)
    return sorted({unit * min(last, max(1, point)) for point in inside}) if last > 0 else []


def _is_rule(key: str, value: Any) -> bool:
    is_one = key == "refresh" or key.removeprefix("refresh.") in RULES
    return is_one and value not in (None, {})


def _number(value: Any) -> int | None:
    """`value` if it is a positive count, else None (the section will refuse it)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _listing_rule(values: Mapping[str, Any]) -> str | None:
    """The rule that lists points of the run; None if it is malformed or another rule is set."""
    for rule, length in _LENGTHS.items():
        if _points(values.get(rule)) and _number(values.get(length)):
            return rule
    return None


def _points(value: Any) -> Sequence[int]:
    """The points of a rule; empty if `value` is not a list of counts."""
    value = [value] if _number(value) else value
    is_list = isinstance(value, list | tuple) and all(map(_number, value))
    return value if is_list else ()


def _is_never(values: Mapping[str, Any]) -> bool:
    return all(values.get(f"refresh.{rule}") is None for rule in RULES)


def _shares(values: Mapping[str, Any], rule: str) -> list[float]:
    return [point / values[_LENGTHS[rule]] for point in _points(values[rule])]


def _in_steps(
    steps: int, shares: Sequence[float], below: Mapping[str, Any], old_rule: str | None
) -> dict[str, Any]:
    if old_rule is None or not shares:
        return {}
    if old_rule == "refresh.at_steps" and max(_points(below[old_rule])) < steps:
        return {}
    found: dict[str, Any] = {old_rule: None}
    points = points_at(shares, steps)
    return found | ({"refresh.at_steps": points} if points else {})


def _in_epochs(
    epochs: int,
    shares: Sequence[float],
    below: Mapping[str, Any],
    given: Mapping[str, Any],
    old_rule: str | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reuse, was = _number(given.get("reuse")), _number(below.get("reuse"))
    if reuse is None:
        was = was or DEFAULT_REUSE
        reuse = _shrunk(epochs, was, shares, below, given)
        found = {} if reuse == was else {"reuse": reuse}
    if old_rule is None:
        return found
    unit = reuse if given.get("window", below.get("window", "all")) == "all" else 1
    is_same = old_rule == "refresh.at_epochs" and reuse == was
    if is_same and all(point < epochs and point % unit == 0 for point in _points(below[old_rule])):
        return found
    if old_rule == "refresh.at_steps":
        found[old_rule] = None
    return found | {"refresh.at_epochs": points_at(shares, epochs, unit=unit) or None}


def _shrunk(
    epochs: int,
    was: int,
    shares: Sequence[float],
    below: Mapping[str, Any],
    given: Mapping[str, Any],
) -> int:
    """The reuse of a run of `epochs`: unchanged, or with as many rounds as before, or the largest
    divisor."""
    if asked := _points(given.get("refresh.at_epochs")):
        return best_reuse(epochs, was, (point for point in asked if point < epochs))
    before = _number(below.get("epochs"))
    if epochs % was == 0 and before is not None:
        return was
    rounds = len(shares) + 1 if before is None else before // was
    if rounds == 1 and before == was and _is_never(below) and _is_never(given):
        return epochs  # each sample is still written once and trained on in every epoch
    if rounds and epochs % rounds == 0 and epochs // rounds <= was:
        return epochs // rounds
    return best_reuse(epochs, was)

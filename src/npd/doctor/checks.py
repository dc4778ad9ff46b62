"""One thing that was looked at: how it stands, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from npd.errors import NpdError
from npd.wording import counted

Status: TypeAlias = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """`what` was looked at, and what it `says`; unless `ok`, that ends in the remedy."""

    status: Status
    what: str
    says: str

    def __str__(self) -> str:
        """The line a person reads."""
        return f"{self.status:5} {self.what:18} {' '.join(self.says.split())}"


def ok(what: str, says: str) -> Check:
    """A check that passed."""
    return Check("ok", what, says)


def warn(what: str, says: str) -> Check:
    """A check that a run survives."""
    return Check("warn", what, says)


def fail(what: str, says: str) -> Check:
    """A check that ends a run."""
    return Check("FAIL", what, says)


def attempt(what: str, look: Callable[[], str]) -> Check:
    """What `look` says, or the error it raises."""
    try:
        return ok(what, look())
    except NpdError as error:
        return fail(what, str(error))


def summary(checks: Iterable[Check]) -> str:
    """The last line: `2 of 14 checks failed, 1 warning`."""
    listed = list(checks)
    failed, warned = (sum(c.status == status for c in listed) for status in ("FAIL", "warn"))
    warnings = f", {counted(warned, 'warning')}" if warned else ""
    checked = counted(len(listed), "check")
    if failed:
        return f"{failed} of {checked} failed{warnings}"
    return f"nothing failed in {checked}{warnings}"


def as_json(checks: Iterable[Check]) -> dict[str, Any]:
    """The checks as plain JSON values."""
    listed = list(checks)
    return {
        "failed": sum(check.status == "FAIL" for check in listed),
        "checks": [asdict(check) for check in listed],
    }


def lines(checks: Iterable[Check]) -> Iterator[str]:
    """Each check's line as soon as it is known, and the summary."""
    seen = []
    for check in checks:
        seen.append(check)
        yield str(check)
    yield ""
    yield summary(seen)

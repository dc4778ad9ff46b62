"""A snapshot as the servers of a generator hold it: a record, nothing more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from npd.probe import Probe


@dataclass(frozen=True, slots=True)
class Held:
    """A snapshot on the servers: the tag they report for it, the name its adapter goes by.

    `readings` is what each server said of the probe's texts when it was proven.
    """

    snapshot: Path
    version: int
    tag: str
    adapter: str | None
    probe: Probe | None
    readings: dict[str, Probe] = field(default_factory=dict)

"""How the stages follow one another. Import-light, no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from npd.fields import Positive, Section


class Refresh(Section):
    """When the generating snapshot is replaced; exactly one rule, or none of them (never)."""

    every_steps: Positive | None = None
    """Refresh every so many optimiser steps."""
    at_epochs: tuple[Positive, ...] | None = None
    """Refresh once each of these epochs is done."""
    drift: Annotated[float, Field(gt=0.0)] | None = None
    """Refresh when the mean KL(theta || gen) of a segment passes this (nats per token)."""
    min_steps: Positive = 1
    """Fewest steps between two refreshes by drift."""
    in_flight: Literal["finish", "abort", "mix"] = "finish"
    """What becomes of responses being written when a snapshot is published: they are finished by
    the old one, begun again by the new one, or gone on with by the new one (servers only)."""

    @property
    def is_never(self) -> bool:
        """Whether the first snapshot writes everything."""
        return self.every_steps is None and self.at_epochs is None and self.drift is None


def _parse_refresh(value: Any) -> Any:
    return {} if value == "never" else value


class ScheduleConfig(Section):
    """Four numbers that span the family of methods, and how long the run is."""

    epochs: Positive | None = None
    """Passes over the prompts, counted in uses of samples (one that leaves early counts as used
    up); or else `steps`."""
    steps: Positive | None = None
    """Optimiser steps; prompts repeat as needed."""
    window: Positive | Literal["all"] = "all"
    """Samples kept live."""
    reuse: Positive = 5
    """Times a sample is trained on."""
    refresh: Annotated[Refresh, BeforeValidator(_parse_refresh)] = Refresh(at_epochs=(5,))
    max_lag: Annotated[int, Field(ge=0)] = 1
    """Snapshots a sample may be behind and still be trained on."""
    overlap: bool | Literal["auto"] = "auto"
    """Whether stages run at the same time; auto: yes with several processes, no inline."""
    segment_steps: Positive = 8
    """Steps handed to the trainer at once."""
    max_tries: Positive = 3
    """Tries at a shard, or at a call of the trainer, before it is given up."""

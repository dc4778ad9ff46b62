"""Where a run lives, and what it leaves. Import-light, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from npd.fields import Positive, Section


class RayConfig(Section):
    """Which Ray cluster, and what each worker asks of it (`runtime.kind: ray`)."""

    address: str | None = None
    """`auto` (the cluster of this machine, or RAY_ADDRESS) or `HOST:PORT`; null starts one on this
    machine alone, for the run."""
    gpus: dict[Literal["generator", "scorer", "trainer"], Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict
    )
    """GPUs for each worker of a role, e.g. `{generator: 2}` for vLLM over two; by default one for
    each that holds a model, if the cluster has any."""
    start_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds in which a worker must have got its place in the cluster and started."""


class RuntimeConfig(Section):
    """Where workers live."""

    kind: Literal["inline", "local", "ray"] = "local"
    """A thread for each worker, a process, or an actor on a Ray cluster."""
    ray: RayConfig = RayConfig()
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: Positive | None = None
    """CPU threads a worker may use; None shares the machine's cores out."""
    call_timeout: Annotated[float, Field(gt=0.0)] = 3600.0
    """Seconds after which a worker that has not answered counts as lost."""
    shared: str | None = None
    """A URL (`s3://bucket/runs`) where workers exchange files; None: in the run directory."""
    scratch: Annotated[Path, AfterValidator(Path.expanduser)] | None = None
    """With `shared`, where each machine keeps copies; None: its place for temporary files."""


class CheckpointConfig(Section):
    """When the trainer's state is saved for `--resume` (also at the end of the run)."""

    every_steps: Positive | None = 100
    """Steps between checkpoints; None saves at the end only."""
    keep: Positive = 1
    """Newest checkpoints kept."""


class ObserveConfig(Section):
    """What a run leaves for people to look at."""

    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where metrics go besides `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` at the end."""
    trace: bool = True
    """Write trace.json for Perfetto (the spans themselves are always kept)."""

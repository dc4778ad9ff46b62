"""A run that is open without being checked: for parts of the controller tested by themselves."""

from __future__ import annotations

from typing import Any

from npd.config import RunConfig
from npd.control.run_directory import OpenRun
from npd.data.inputs import RunInputs
from npd.store.layout import RunLayout
from npd.types import EncodedPrompt


def open_run(
    config: RunConfig,
    layout: RunLayout,
    ledger: Any = None,
    monitor: Any = None,
    *,
    prompts: list[EncodedPrompt] | None = None,
) -> OpenRun:
    """The record of a run; what a part does not use may be None."""
    return OpenRun(config, RunInputs(prompts or [], [], {}), layout, ledger, monitor)

"""Runtimes of workers behind one small protocol: threads, processes, Ray actors."""

from __future__ import annotations

from pathlib import Path

from npd.config import RuntimeConfig
from npd.runtime.base import CallResult, Factory, Resources, Runtime, Worker

__all__ = ["CallResult", "Factory", "Resources", "Runtime", "Worker", "build_runtime"]


def build_runtime(config: RuntimeConfig, log_dir: Path) -> Runtime:
    """The runtime in the config; worker logs go to `log_dir/<worker>.log`."""
    if config.kind == "inline":
        from npd.runtime.inline import InlineRuntime

        return InlineRuntime(log_dir, call_timeout=config.call_timeout)
    if config.kind == "ray":
        from npd.runtime.ray import RayRuntime

        return RayRuntime(log_dir, config.ray, call_timeout=config.call_timeout)
    from npd.runtime.local import LocalRuntime

    return LocalRuntime(log_dir, call_timeout=config.call_timeout)

"""npd: Near-Policy Distillation. Trains a small language model on its own text with a teacher.

`npd.run("run.yaml")`, or `npd.run(preset="npd", student=..., teacher=..., data=...)`, is the same
as `npd run`. Names are imported on first use, so `import npd` is cheap.
"""

from __future__ import annotations

import os
import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("npd", "-mnpd"):
    # `python -m npd` searches the current directory first and would run a `json.py` there.
    sys.path[:1] = [entry for entry in sys.path[:1] if entry != os.getcwd()]

from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npd.api import run
    from npd.config import RunConfig
    from npd.config.load import Settings, load_config, presets
    from npd.control.report_data import RunResult
    from npd.errors import ConfigError, NpdError
    from npd.observe.trackers import Callback
    from npd.train.loss import NearPolicyLoss, near_policy_loss
    from npd.types import EvalReport, StepReport

__all__ = [
    "Callback",
    "ConfigError",
    "EvalReport",
    "NearPolicyLoss",
    "NpdError",
    "RunConfig",
    "RunResult",
    "Settings",
    "StepReport",
    "__version__",
    "load_config",
    "near_policy_loss",
    "presets",
    "run",
]

__version__ = "0.1.0"

_HOMES = {
    "Callback": "npd.observe.trackers",
    "ConfigError": "npd.errors",
    "EvalReport": "npd.types",
    "NearPolicyLoss": "npd.train.loss",
    "NpdError": "npd.errors",
    "RunConfig": "npd.config",
    "RunResult": "npd.control.report_data",
    "Settings": "npd.config.load",
    "StepReport": "npd.types",
    "load_config": "npd.config.load",
    "near_policy_loss": "npd.train.loss",
    "presets": "npd.config.load",
    "run": "npd.api",
}

# Two threads cannot import torch or transformers for the first time at once.
_IMPORTING = RLock()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with _IMPORTING:
            return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'npd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

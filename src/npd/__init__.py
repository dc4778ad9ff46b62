"""npd: Near-Policy Distillation. Teach a small language model from a large one on its own text.

`npd.run(npd.RunConfig(student=..., teacher=..., data=..., schedule=...))` does what `npd run` does.
Names below are imported when first used, so that `import npd` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npd.config import RunConfig
    from npd.control.run import RunResult, run
    from npd.errors import NpdError
    from npd.settings import load_config
    from npd.train.loss import NearPolicyLoss, near_policy_loss

__all__ = [
    "NearPolicyLoss",
    "NpdError",
    "RunConfig",
    "RunResult",
    "__version__",
    "load_config",
    "near_policy_loss",
    "run",
]

__version__ = "0.1.0"

_HOMES = {
    "NearPolicyLoss": "npd.train.loss",
    "NpdError": "npd.errors",
    "RunConfig": "npd.config",
    "RunResult": "npd.control.run",
    "load_config": "npd.settings",
    "near_policy_loss": "npd.train.loss",
    "run": "npd.control.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'npd' has no attribute {name!r}")

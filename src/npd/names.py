"""Names that mean something special wherever they occur. Imports nothing."""

from __future__ import annotations

DEFAULT_TEACHER = "default"
"""The teacher of prompts that name none: the config's `teacher`."""

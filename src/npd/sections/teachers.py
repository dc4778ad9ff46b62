"""A teacher with a name of its own, for the prompts that name it. Import-light, no torch."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from npd.fields import Section
from npd.served import LaunchConfig

Model = Annotated[str, AfterValidator(os.path.expanduser)]


class TeacherConfig(Section):
    """One of several teachers: its model, and where it is served if it is not held in process."""

    model: Model
    """A Hugging Face directory or name; it shares the student's vocabulary."""
    urls: tuple[str, ...] = ()
    """Running servers that hold it, where `score.engine` is one."""
    launch: LaunchConfig | None = None
    """Have each scorer start a server for it."""


def _as_section(value: Any) -> Any:
    """`math: DIR` is short for `math: {model: DIR}`."""
    return {"model": value} if isinstance(value, str) else value


NamedTeacher = Annotated[TeacherConfig, BeforeValidator(_as_section)]

"""Which teachers the samples of a run name, and whether it has them. Loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from npd.config import RunConfig
from npd.errors import DataError
from npd.names import DEFAULT_TEACHER


def role_of(teacher: str) -> str:
    """The setting a teacher's model stands in: `teacher`, or `teachers.<name>`."""
    return "teacher" if teacher == DEFAULT_TEACHER else f"teachers.{teacher}"


def check_names(named: Sequence[tuple[str, str]], config: RunConfig) -> set[str]:
    """The teachers in use, of (place of a record, name that it gives) each.

    Raises:
        DataError: a name is none of the run's teachers.
    """
    known = config.teacher_models
    unknown = [(place, name) for place, name in named if name not in known]
    if not unknown:
        return {name for _, name in named}
    place, name = unknown[0]
    more = sum(other == name for _, other in unknown[1:])
    where = f"{place} (and {more} more)" if more else place
    names = ", ".join(config.teachers)
    if name == DEFAULT_TEACHER:
        raise DataError(
            f"{where} names no teacher, and the run has none for such prompts: set `teacher`, or "
            f"name one of {names} in the record's `teacher`"
        )
    if not config.teachers:
        raise DataError(
            f"{where} names the teacher {name!r}, and the run has none by name: set "
            f"`teachers: {{{name}: DIR}}`, or take the data's `teacher` column out"
        )
    near = get_close_matches(name, config.teachers, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise DataError(
        f"{where} names the teacher {name!r}{hint}, and those of the run are {names}: correct the "
        "record, or add it to `teachers`"
    )


def idle_notes(used: set[str], config: RunConfig) -> tuple[str, ...]:
    """A line for each teacher that has nothing to do, where a run has several."""
    if not config.needs_teacher or not config.teachers:
        return ()
    idle = [name for name in config.teacher_models if name not in used]
    return tuple(f"{role_of(name)}: no prompt names it, so it is not loaded" for name in idle)

"""What cannot be about several teachers: their names, and the servers of each.

The servers of a teacher are whoever's engine is one and who asks a teacher: the scorers', and the
generators' where teachers write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from npd.config.values import RunValues
from npd.names import DEFAULT_TEACHER
from npd.rules import is_url, launch_problems
from npd.sections import TeacherConfig

Problem = tuple[bool, str]


def teacher_problems(c: RunValues) -> list[Problem]:
    """What is impossible about `teachers`: (is it so, what to do about it)."""
    askers = _askers(c)
    found = list(_time_problems(c, askers)) if c.teachers else []
    for name, teacher in c.teachers.items():
        found += [*_name_problems(name), *_address_problems(c, name, teacher)]
        found += _server_problems(f"teachers.{name}", teacher, askers)
        found += launch_problems(f"teachers.{name}", teacher.launch) if teacher.launch else []
    return found


def _askers(c: RunValues) -> dict[str, int]:
    """The sections that ask a teacher through servers, and how many workers of each do."""
    askers = {"score": c.score.workers} if c.score.engine != "transformers" else {}
    if c.generate.source == "teacher" and c.generate.engine != "transformers":
        askers["generate"] = c.generate.workers
    return askers


def _name_problems(name: str) -> Iterator[Problem]:
    yield (
        name == DEFAULT_TEACHER,
        f"teachers names one {DEFAULT_TEACHER!r}: that is the teacher of prompts that name none, "
        "set it as `teacher`",
    )
    yield (
        re.fullmatch(r"[\w-]+", name, re.ASCII) is None,
        f"teachers: {name!r} cannot be a name: take letters, digits, _ and -",
    )


def _server_problems(
    where: str, teacher: TeacherConfig, askers: dict[str, int]
) -> Iterator[Problem]:
    urls, launch = teacher.urls, teacher.launch
    gpus = () if launch is None else launch.gpus
    by = " and ".join(f"{section}.engine" for section in askers)
    yield (
        bool(askers) and bool(urls) == (launch is not None),
        f"{where} is asked through servers ({by}): set exactly one of {where}.urls (running ones) "
        f"and {where}.launch (started by npd)",
    )
    yield (
        not askers and (bool(urls) or launch is not None),
        f"{where}.urls and {where}.launch are for servers, but score.engine is transformers: set "
        "score.engine: vllm, or leave them out",
    )
    yield (
        len(askers) > 1 and launch is not None,
        f"{where}.launch would start its servers twice, for score and for generate: give running "
        f"ones in {where}.urls, or leave score.engine or generate.engine at transformers",
    )
    for section, workers in askers.items():
        yield (
            bool(urls) and workers > len(urls),
            f"{section}.workers ({workers}) is more than the {len(urls)} servers of {where}.urls: "
            "each worker has servers of its own",
        )
        yield (
            bool(gpus) and len(gpus) < workers,
            f"{where}.launch.gpus names the GPUs of {len(gpus)} servers, but {section}.workers is "
            f"{workers}: one entry a worker",
        )
    yield (
        launch is not None and launch.venv is not None and bool(launch.command),
        f"{where}.launch takes one of venv and command",
    )


def _address_problems(c: RunValues, name: str, teacher: TeacherConfig) -> Iterator[Problem]:
    """A server holds one model, and is one worker's."""
    where = f"teachers.{name}.urls"
    yield not all(map(is_url, teacher.urls)), f"{where} must be like http://host:8000"
    yield (
        len(set(teacher.urls)) < len(teacher.urls),
        f"{where} names a server twice: list each once",
    )
    others = {"generate.urls": c.generate.urls, "score.urls": c.score.urls}
    others |= {f"teachers.{n}.urls": t.urls for n, t in c.teachers.items() if n < name}
    for other, urls in others.items():
        both = sorted(set(urls) & set(teacher.urls))
        yield (
            bool(both),
            f"{min(both, default='')} is in {where} and in {other}: it cannot hold both models",
        )


def _time_problems(c: RunValues, askers: dict[str, int]) -> Iterator[Problem]:
    """One call may start the servers of all teachers, and must not count as lost meanwhile."""
    launches = [c.score.launch, *(teacher.launch for teacher in c.teachers.values())]
    starts = sum(launch.start_timeout for launch in launches if launch is not None)
    limits = {"the teachers' launch.start_timeout together": starts if askers else 0.0}
    for section in askers:
        own = c.score if section == "score" else c.generate
        limits[f"{section}.request_timeout"] = own.request_timeout
    for what, limit in limits.items():
        yield (
            limit >= c.runtime.call_timeout,
            f"runtime.call_timeout ({c.runtime.call_timeout:g} s) must be more than {what} "
            f"({limit:g} s)",
        )

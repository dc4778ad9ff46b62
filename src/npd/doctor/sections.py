"""The sections of a config that may use engines behind HTTP, each with the model of its servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from npd.config import GenerateConfig, RunConfig, ScoreConfig
from npd.names import DEFAULT_TEACHER


class ServedSection(NamedTuple):
    """`where`: the section that names the servers; `values`: how they are asked."""

    where: str
    values: GenerateConfig | ScoreConfig
    model: str


def served_sections(config: RunConfig) -> Iterator[ServedSection]:
    """Those of the generators, then those of the scorers; each teacher has its own."""
    models = config.teacher_models
    if config.generate.source == "student":
        yield ServedSection("generate", config.generate, config.student)
    elif config.generate.source == "teacher":
        for name, model in models.items():
            yield ServedSection(_where("generate", name), config.generate_of(name), model)
    for name, model in models.items():
        yield ServedSection(_where("score", name), config.score_of(name), model)


def _where(section: str, teacher: str) -> str:
    return section if teacher == DEFAULT_TEACHER else f"teachers.{teacher}"

"""Generation of responses by the student's snapshot or the teacher, or from the data set."""

from __future__ import annotations

from npd.generate.base import Generator, TeachersGenerator, build_generator

__all__ = ["Generator", "TeachersGenerator", "build_generator"]

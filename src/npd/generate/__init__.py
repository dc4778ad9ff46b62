"""Who writes the responses: the student's snapshot, the teacher, or the data with its own text."""

from __future__ import annotations

from npd.generate.base import Generator, build_generator
from npd.generate.teachers import TeachersGenerator

__all__ = ["Generator", "TeachersGenerator", "build_generator"]

"""Teachers as the writers: each prompt is answered by its own.

Promises: a teacher is opened when it is first asked, once, and kept; what it writes is what it
would write alone. The text is nobody's policy: version 0, and it never goes stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from npd.generate.base import Generator
from npd.types import Ask, Failed, Rollout


class TeachersGenerator:
    """A Generator over teachers by name; `build` gives one's own, its model loaded."""

    def __init__(self, build: Callable[[str], Generator]) -> None:
        self._build = build
        self._writers: dict[str, Generator] = {}

    @property
    def version(self) -> int:
        """0: the text is nobody's policy."""
        return 0

    def load(self, snapshot: Path, version: int) -> None:
        """Nothing to load: a teacher does not change."""

    def open(self, name: str) -> Generator:
        """The writer of that name, opened now if it was not."""
        if name not in self._writers:
            self._writers[name] = self._build(name)
        return self._writers[name]

    def generate(self, asks: Sequence[Ask]) -> list[Rollout | Failed]:
        """One rollout, or the reason why there is none, per ask, in the order of the asks."""
        found: dict[int, Rollout | Failed] = {}
        for name in sorted({ask.prompt.teacher for ask in asks}):
            own = [ask for ask in asks if ask.prompt.teacher == name]
            written = self.open(name).generate(own)
            found |= {ask.sample_id: item for ask, item in zip(own, written, strict=True)}
        return [found[ask.sample_id] for ask in asks]

    def close(self) -> None:
        """Let go of all of them."""
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close)
            self._writers = {}

"""Several teachers as one reader: each document is read by the teacher that it names.

Promises: a teacher is opened when it is first asked, once, and kept; it reads all of its documents
of a call together, so that a reading is what that teacher alone would give (to float noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from npd.score.base import Document, Key, Reader, Reading, Unread

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher


class Teachers:
    """A Reader over teachers by name: `serve` opens one on its servers, or says by None that there
    are none; then `load` loads it into this process."""

    def __init__(
        self, load: Callable[[str], Reader], serve: Callable[[str], ServedTeacher | None]
    ) -> None:
        self._load, self._serve = load, serve
        self._loaded: dict[str, Reader] = {}
        self._served: dict[str, ServedTeacher | None] = {}

    def read(self, documents: Mapping[Key, Document]) -> dict[Key, Reading | Unread]:
        """A reading of each document, or the reason why there is none, under its key."""
        readings: dict[Key, Reading | Unread] = {}
        for name in sorted({document.teacher for document in documents.values()}):
            own = {key: d for key, d in documents.items() if d.teacher == name}
            readings.update(self._named(name).read(own))
        return readings

    def served(self, name: str) -> ServedTeacher | None:
        """The teacher on its servers; None where it is held in process."""
        if name not in self._served:
            self._served[name] = self._serve(name)
        return self._served[name]

    def widest(self, names: Iterable[str], wanted: int) -> int:
        """The widest support, up to `wanted`, that all of these teachers give."""
        found = [self.served(name) for name in names]
        return min([wanted, *(teacher.max_k for teacher in found if teacher is not None)])

    def unload(self) -> None:
        """Let go of the models of this process; one that is asked again is loaded again."""
        self._loaded.clear()

    def close(self) -> None:
        """Let go of the models, and of the servers."""
        self.unload()
        with ExitStack() as stack:
            for teacher in self._served.values():
                if teacher is not None:
                    stack.callback(teacher.close)
            self._served = {}

    def _named(self, name: str) -> Reader:
        served = self.served(name)
        if served is not None:
            return served
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

"""Several teachers as one model: each document goes to the teacher that it names.

Promises: a teacher is opened once, at its first use, and kept open. A call passes it all of its
documents together, so the log-probs equal those of a run with that teacher alone (to float noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from npd.score.base import Key, LogprobFailure, LogprobModel, LogprobRequest, Logprobs

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher


class Teachers:
    """A LogprobModel over teachers by name.

    `serve` opens a teacher on its servers, or returns None if it has none; then `load` loads it
    into this process.
    """

    def __init__(
        self, load: Callable[[str], LogprobModel], serve: Callable[[str], ServedTeacher | None]
    ) -> None:
        self._load, self._serve = load, serve
        self._loaded: dict[str, LogprobModel] = {}
        self._served: dict[str, ServedTeacher | None] = {}

    def read(self, documents: Mapping[Key, LogprobRequest]) -> dict[Key, Logprobs | LogprobFailure]:
        """The log-probs of each document, or its failure, by key."""
        readings: dict[Key, Logprobs | LogprobFailure] = {}
        for name in sorted({document.teacher for document in documents.values()}):
            own = {key: d for key, d in documents.items() if d.teacher == name}
            readings.update(self._named(name).read(own))
        return readings

    def served(self, name: str) -> ServedTeacher | None:
        """The teacher on its servers; None if it runs in process."""
        if name not in self._served:
            self._served[name] = self._serve(name)
        return self._served[name]

    def widest(self, names: Iterable[str], wanted: int) -> int:
        """The largest support, up to `wanted`, that all of these teachers can give."""
        found = [self.served(name) for name in names]
        return min([wanted, *(teacher.max_k for teacher in found if teacher is not None)])

    def unload(self) -> None:
        """Free the models of this process; a later use loads again."""
        self._loaded.clear()

    def release(self) -> None:
        """Free the models and stop launched servers; a later use loads or launches again."""
        self.unload()
        ours = {n: t for n, t in self._served.items() if t is not None and t.is_ours}
        with ExitStack() as stack:
            for name, teacher in ours.items():
                stack.callback(teacher.close)
                del self._served[name]

    def close(self) -> None:
        """Free the models and close the servers."""
        self.unload()
        with ExitStack() as stack:
            for teacher in self._served.values():
                if teacher is not None:
                    stack.callback(teacher.close)
            self._served = {}

    def _named(self, name: str) -> LogprobModel:
        served = self.served(name)
        if served is not None:
            return served
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

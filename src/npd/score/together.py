"""A teacher that several processes hold together, each a part of every layer (tensor parallel).

The first rank is the scorer; the others do what it does with the teacher, and nothing else: they
load when it loads and read what it reads, because a layer's output takes all of them. What they
find is the same, so it is not compared, and what they cannot do the first rank cannot either: it is
the one to say so. Does not start ranks or connect them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from npd.errors import NpdError
from npd.score.base import Document, Key, Reader, Reading, Unread


@dataclass(frozen=True, slots=True)
class Order:
    """What all ranks are to do at once: read `documents` by `model`; None: load it (again)."""

    model: str
    documents: Mapping[Any, Document] | None = None


Load: TypeAlias = Callable[[str], Reader]
# Tells every rank what the first one is about to do, None when it has done; the first one's words.
Tell: TypeAlias = Callable[[Order | None], Order | None]


class LeadingReader:
    """The first rank's Reader of `model`: the others load and read along (`Follower`)."""

    def __init__(self, model: str, load: Load, tell: Tell) -> None:
        self._model, self._tell = model, tell
        tell(Order(model))
        self._reader = load(model)

    def read(self, documents: Mapping[Key, Document]) -> Mapping[Key, Reading | Unread]:
        """A reading of each document, under its key."""
        self._tell(Order(self._model, documents))
        return self._reader.read(documents)


class Follower:
    """What the other ranks do, and what they hold."""

    def __init__(self, load: Load, tell: Tell) -> None:
        self._load, self._tell = load, tell
        self._readers: dict[str, Reader] = {}

    def follow(self) -> None:
        """Do what the first rank does, until it has done."""
        while (order := self._tell(None)) is not None:
            # An error of ours is every rank's, and the first one's answer is what counts.
            with suppress(NpdError):
                self._carry_out(order)

    def _carry_out(self, order: Order) -> None:
        if order.documents is None:
            self._readers.pop(order.model, None)  # the old weights go before the new ones come
            self._readers[order.model] = self._load(order.model)
        else:
            self._readers[order.model].read(order.documents)

"""A teacher that several processes hold together, each a part of every layer (tensor parallel).

The first rank is the scorer; the others do what it does with the teacher, and nothing else: they
load when it loads, read what it reads, write what it writes and unload when it does, because a
layer's output takes all of them. What they find is the same, so it is not compared, and what they
cannot do the first rank cannot either (a load that fails on one fails on all: `World.agreed`): it
is the one to say so. Does not start ranks or connect them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from npd.errors import NpdError
from npd.score.base import Document, Key, Reader, Reading, Unread
from npd.types import Ask, Rollout


class Teacher(Reader, Protocol):
    """A model that reads, and can write too."""

    def write(self, asks: Sequence[Ask]) -> Sequence[Rollout]:
        """A greedy response to each."""


@dataclass(frozen=True, slots=True)
class Order:
    """What all ranks are to do with the teacher at once; `what` is what it reads or writes."""

    teacher: str
    action: Literal["load", "read", "write", "unload"] = "load"
    what: Any = None


Load: TypeAlias = Callable[[str], Teacher]
# Tells every rank what the first one is about to do, None when it has done; the first one's words.
Tell: TypeAlias = Callable[[Order | None], Order | None]


class Leader:
    """The first rank's Teacher `name`, loaded: the others (`Follower`) do as it does."""

    def __init__(self, name: str, load: Load, tell: Tell) -> None:
        self._name, self._tell = name, tell
        tell(Order(name))
        self._teacher = load(name)

    def read(self, documents: Mapping[Key, Document]) -> Mapping[Key, Reading | Unread]:
        """A reading of each document, under its key."""
        self._tell(Order(self._name, "read", documents))
        return self._teacher.read(documents)

    def write(self, asks: Sequence[Ask]) -> Sequence[Rollout]:
        """A greedy response to each."""
        self._tell(Order(self._name, "write", asks))
        return self._teacher.write(asks)

    def unload(self) -> None:
        """Have the others let go of their parts, as the caller is about to do with this one."""
        self._tell(Order(self._name, "unload"))


class Leaders:
    """The first rank's teachers by name, each loaded as it is first asked for."""

    def __init__(self, load: Load, tell: Tell) -> None:
        self._load, self._tell = load, tell
        self._held: dict[str, Leader] = {}

    def hold(self, name: str) -> Leader:
        """The teacher, which all ranks hold from now on."""
        if name not in self._held:
            self._held[name] = Leader(name, self._load, self._tell)
        return self._held[name]

    def unload(self) -> None:
        """All ranks let go of all teachers; one that is asked for again is loaded again."""
        while self._held:
            self._held.popitem()[1].unload()


class Follower:
    """What the other ranks do, and what they hold."""

    def __init__(self, load: Load, tell: Tell) -> None:
        self._load, self._tell = load, tell
        self._teachers: dict[str, Teacher] = {}

    def follow(self) -> None:
        """Do what the first rank does, until it has done."""
        while (order := self._tell(None)) is not None:
            # An error of ours is every rank's, and the first one's answer is what counts.
            with suppress(NpdError):
                self._carry_out(order)

    def _carry_out(self, order: Order) -> None:
        if order.action == "load":
            self._teachers[order.teacher] = self._load(order.teacher)
        elif order.action == "read":
            self._teachers[order.teacher].read(order.what)
        elif order.action == "write":
            self._teachers[order.teacher].write(order.what)
        else:
            del self._teachers[order.teacher]

"""A tensor-parallel teacher: every layer is split over several processes.

The first rank is the scorer. Before it loads, reads, writes or unloads a teacher it broadcasts a
`Command`, and the other ranks execute it too, because every layer needs all ranks. All ranks
compute the same result; only the first rank's is used. If one rank fails, all do
(`DistContext.all_or_raise` for loading), and the first rank reports the error. `check_divisible`
decides from a model's config alone whether it can be split. Does not start or connect ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from npd.errors import ModelError, NpdError
from npd.models.loading import read_config, supports_tensor_parallel
from npd.score.base import Key, LogprobFailure, LogprobModel, LogprobRequest, Logprobs
from npd.types import Rollout, SampleRequest


class Teacher(LogprobModel, Protocol):
    """A model that computes log-probs of documents, and also generates responses."""

    def write(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout]:
        """A greedy response to each request."""


@dataclass(frozen=True, slots=True)
class Command:
    """The next operation of all ranks on a teacher; `what` are the documents or requests."""

    teacher: str
    action: Literal["load", "read", "write", "unload"] = "load"
    what: Any = None


Load: TypeAlias = Callable[[str], Teacher]
# Sends the first rank's command to every rank, None at the end of a call; returns the command.
Broadcast: TypeAlias = Callable[[Command | None], Command | None]


class RankZeroTeacher:
    """The teacher `name` on the first rank; a `TeacherReplica` on each other rank mirrors it."""

    def __init__(self, name: str, load: Load, broadcast: Broadcast) -> None:
        self._name, self._broadcast = name, broadcast
        broadcast(Command(name))
        self._teacher = load(name)

    def read(
        self, documents: Mapping[Key, LogprobRequest]
    ) -> Mapping[Key, Logprobs | LogprobFailure]:
        """The log-probs of each document, by key."""
        self._broadcast(Command(self._name, "read", documents))
        return self._teacher.read(documents)

    def write(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout]:
        """A greedy response to each request."""
        self._broadcast(Command(self._name, "write", requests))
        return self._teacher.write(requests)

    def unload(self) -> None:
        """Free the other ranks' parts; the caller frees this rank's."""
        self._broadcast(Command(self._name, "unload"))


class RankZeroTeachers:
    """The first rank's teachers by name, each loaded at its first use."""

    def __init__(self, load: Load, broadcast: Broadcast) -> None:
        self._load, self._broadcast = load, broadcast
        self._held: dict[str, RankZeroTeacher] = {}

    def get(self, name: str) -> RankZeroTeacher:
        """The teacher `name`, loaded on all ranks."""
        if name not in self._held:
            self._held[name] = RankZeroTeacher(name, self._load, self._broadcast)
        return self._held[name]

    def unload(self) -> None:
        """Free all teachers on all ranks; a later use loads again."""
        while self._held:
            self._held.popitem()[1].unload()


class TeacherReplica:
    """The teachers on a rank other than the first."""

    def __init__(self, load: Load, broadcast: Broadcast) -> None:
        self._load, self._broadcast = load, broadcast
        self._teachers: dict[str, Teacher] = {}

    def follow(self) -> None:
        """Execute the first rank's commands until its call ends."""
        while (command := self._broadcast(None)) is not None:
            # Every rank gets the same error, and the first one reports it.
            with suppress(NpdError):
                self._execute(command)

    def _execute(self, command: Command) -> None:
        if command.action == "load":
            self._teachers[command.teacher] = self._load(command.teacher)
        elif command.action == "read":
            self._teachers[command.teacher].read(command.what)
        elif command.action == "write":
            self._teachers[command.teacher].write(command.what)
        else:
            del self._teachers[command.teacher]


# The sizes that are split: heads, the widths of MLPs and experts, and the vocabulary.
_SHARED_OUT = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
)


def check_divisible(model: str, ranks: int, *, trust_remote_code: bool = False) -> None:
    """Check that every layer of `model` can be split evenly over `ranks`.

    Raises:
        ModelError: transformers is too old or has no tensor-parallel plan for the architecture, or
            a size is not divisible.
    """
    if ranks == 1:
        return
    remedy = "set score.ranks: 1, or score with vLLM (score.engine, docs/servers.md)"
    if not supports_tensor_parallel():
        raise ModelError(
            f"score.ranks {ranks} needs transformers 5.17 or newer: pip install -U transformers, "
            f"{remedy}"
        )
    config = read_config(model, trust_remote_code=trust_remote_code).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise ModelError(
            f"{model}: transformers has no tensor-parallel plan for {config.model_type}, so "
            f"score.ranks {ranks} cannot split it: {remedy}"
        )
    for name in _SHARED_OUT:
        size = getattr(config, name, None)
        if isinstance(size, int) and size % ranks:
            fits = [n for n in range(2, ranks) if _divides(config, n)]
            other = f"set score.ranks to {' or '.join(map(str, fits))}, or " if fits else ""
            raise ModelError(
                f"{model}: score.ranks {ranks} does not divide its {name} ({size}): {other}{remedy}"
            )


def _divides(config: object, ranks: int) -> bool:
    sizes = (getattr(config, name, None) for name in _SHARED_OUT)
    return all(not isinstance(size, int) or size % ranks == 0 for size in sizes)

"""The generator protocol: requests in, rollouts out, one policy version at a time.

Every implementation promises (one contract suite checks them all): rollouts are in the order of the
requests, and each response has at least one token. In process a sample's randomness depends on its
seed alone; a server draws from its own, unless `generate.seeded`. `build_generator` imports only
the implementation that the config names. Does not score, store or filter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from npd.config import GenerateConfig
from npd.errors import DataError
from npd.types import Failed, FinishReason, Rollout, SampleRequest

if TYPE_CHECKING:
    from npd.generate.served import ServingContext


class Generator(Protocol):
    """Generates one response per request with the loaded snapshot."""

    @property
    def version(self) -> int | None:
        """The version of the loaded snapshot; None before the first `load`."""

    def load(self, snapshot: Path, version: int) -> None:
        """Load the weights of `snapshot`; later rollouts carry `version`."""

    def generate(self, requests: Sequence[SampleRequest]) -> Sequence[Rollout | Failed]:
        """One rollout or failure per request, in the order of the requests."""

    def release(self) -> None:
        """Free the model, and stop a launched server; `version` is None until the next `load`.

        The model of a text's own source (a teacher, the data) is loaded again by `generate`.
        """

    def close(self) -> None:
        """Free the model; no call is allowed afterwards."""


def build_generator(
    config: GenerateConfig,
    *,
    stop_ids: Iterable[int],
    pad_id: int,
    vocab_size: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    serving: ServingContext | None = None,
) -> Generator:
    """The generator for `config.source` and `config.engine`, with no snapshot loaded.

    `stop_ids` end a response. `pad_id` fills the left of shorter prompts (masked). Ids from
    `vocab_size` on (padding of the embedding) are never sampled. `device` is `auto`, `cpu` or
    `cuda`. `serving` is needed for an engine on servers only.
    """
    if config.source == "dataset":
        return DatasetGenerator(config.max_new_tokens)
    if config.is_served:
        from npd.generate.served import ServedGenerator

        assert serving is not None, "generation on servers needs a serving context"
        return ServedGenerator(
            config,
            serving,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
            trust_remote_code=trust_remote_code,
        )
    from npd.generate.in_process import TransformersGenerator

    return TransformersGenerator(
        config,
        stop_ids=stop_ids,
        pad_id=pad_id,
        vocab_size=vocab_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )


class DatasetGenerator:
    """Returns each prompt's own completion as its rollout; no model and no randomness.

    The text comes from no policy: it has version 0, never goes stale and has no behaviour
    log-probs. A completion longer than `max_new_tokens` is truncated and marked so.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens

    @property
    def version(self) -> int:
        """Always 0, because the text comes from no policy."""
        return 0

    def load(self, snapshot: Path, version: int) -> None:
        """A no-op, because the text does not depend on a model."""

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        Raises:
            DataError: a prompt has no completion.
        """
        return [self._rollout(request) for request in requests]

    def release(self) -> None:
        """A no-op."""

    def close(self) -> None:
        """A no-op."""

    def _rollout(self, request: SampleRequest) -> Rollout:
        prompt = request.prompt
        if prompt.completion_ids is None or len(prompt.completion_ids) == 0:
            raise DataError(
                f"prompt {prompt.index} has no completion, but generate.source dataset trains on "
                "completions: add a `completion` column (or name yours in data.columns), or set "
                "generate.source to student or teacher"
            )
        is_cut = len(prompt.completion_ids) > self._max_new_tokens
        return Rollout(
            sample_id=request.sample_id,
            prompt_index=prompt.index,
            version=0,
            prompt_ids=prompt.prompt_ids,
            header_ids=prompt.header_ids,
            response_ids=prompt.completion_ids[: self._max_new_tokens],
            logprobs=None,
            finish=FinishReason.LENGTH if is_cut else FinishReason.STOP,
            seed=request.seed,
            teacher=prompt.teacher,
        )


class TeachersGenerator:
    """A Generator over several teachers; each prompt's own teacher responds to it.

    `build` returns a teacher's generator with the model loaded; it is called once per teacher, at
    the first request. Responses are those of each teacher alone. The text comes from no policy: it
    has version 0 and never goes stale.
    """

    def __init__(self, build: Callable[[str], Generator]) -> None:
        self._build = build
        self._generators: dict[str, Generator] = {}
        self._building = Lock()

    @property
    def version(self) -> int:
        """Always 0, because the text comes from no policy."""
        return 0

    def load(self, snapshot: Path, version: int) -> None:
        """A no-op, because teachers do not change."""

    def open(self, name: str) -> Generator:
        """The generator of the teacher `name`, built at the first call."""
        with self._building:
            if name not in self._generators:
                self._generators[name] = self._build(name)
            return self._generators[name]

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout | Failed]:
        """One rollout or failure per request, in the order of the requests."""
        found: dict[int, Rollout | Failed] = {}
        for name in sorted({request.prompt.teacher for request in requests}):
            own = [request for request in requests if request.prompt.teacher == name]
            results = self.open(name).generate(own)
            found |= {request.sample_id: item for request, item in zip(own, results, strict=True)}
        return [found[request.sample_id] for request in requests]

    def release(self) -> None:
        """Close the generators of all teachers; the next request opens its teacher's again."""
        self.close()

    def close(self) -> None:
        """Close the generators of all teachers."""
        with ExitStack() as stack:
            for generator in self._generators.values():
                stack.callback(generator.close)
            self._generators = {}

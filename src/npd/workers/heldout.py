"""The held-out text of a run: the data's own completions, or what teachers write greedily.

Written once, by the scorer, with the teachers that it scores with. Does not score or store it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from npd.chat import Chat
from npd.config import RunConfig
from npd.errors import RunError
from npd.servers import EngineServer, Unavailable
from npd.servers.base import SamplingSettings
from npd.types import Ask, EncodedPrompt, FinishReason, Rollout
from npd.workers.writers import stop_ids

if TYPE_CHECKING:
    from npd.score.served import ServedTeacher
    from npd.score.together import Teacher


def heldout_rollouts(
    config: RunConfig,
    chat: Chat,
    prompts: Sequence[EncodedPrompt],
    device: str,
    served: Callable[[str], ServedTeacher | None],
    hold: Callable[[str], Teacher] | None = None,
) -> list[Rollout]:
    """A response to each prompt, where there is one, in the prompts' order.

    Each teacher writes those of the prompts that name it: on its servers, which `served` gives,
    held with other ranks, which `hold` does, or loaded for it, one after the other.

    Raises:
        RunError: a server has no answer to a prompt.
    """
    asks = [Ask(prompt.index, prompt.index, prompt) for prompt in prompts]
    if config.eval.source != "teacher":
        return _in_process(config, chat, asks, device, None)
    found: dict[int, Rollout] = {}
    for name in sorted({prompt.teacher for prompt in prompts}):
        own, servers = [ask for ask in asks if ask.prompt.teacher == name], served(name)
        if servers is None and hold is not None:
            written = list(hold(name).write(own))
        elif servers is None:
            written = _in_process(config, chat, own, device, name)
        else:
            written = _by_server(config, chat, own, servers, name)
        found |= {rollout.sample_id: rollout for rollout in written}
    return [found[ask.sample_id] for ask in asks if ask.sample_id in found]


def _in_process(
    config: RunConfig, chat: Chat, asks: Sequence[Ask], device: str, teacher: str | None
) -> list[Rollout]:
    """By a teacher loaded for it; None: the data's own completions."""
    from npd.generate import build_generator

    source: Literal["teacher", "dataset"] = "dataset" if teacher is None else "teacher"
    # A config of its own: where the run's samples come from servers, this text does not.
    section = type(config.generate)(
        source=source,
        temperature=0.0,
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
        dtype=config.generate.dtype,
    )
    generator = build_generator(
        section,
        stop_ids=stop_ids(config, chat, teacher),
        pad_id=chat.pad_id,
        vocab_size=chat.vocab_size,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    with closing(generator):
        if teacher is not None:
            generator.load(Path(config.teacher_models[teacher]), 0)
        found = generator.generate(asks)
    return [rollout for rollout in found if isinstance(rollout, Rollout)]


def _by_server(
    config: RunConfig, chat: Chat, asks: Sequence[Ask], served: ServedTeacher, teacher: str
) -> list[Rollout]:
    first_padding = chat.vocab_size
    sampling = SamplingSettings(
        config.eval.max_new_tokens,
        tuple(sorted(stop_ids(config, chat, teacher))),
        temperature=0.0,
        banned_ids=tuple(range(first_padding, first_padding + served.num_padding_ids)),
    )

    async def write(server: EngineServer, ask: Ask) -> Rollout:
        prompt = ask.prompt
        written = await server.complete(
            prompt.prompt_ids.tolist(), sampling, seed=ask.seed, model=None
        )
        if written.ending == "abort" or not len(written.ids):
            raise Unavailable(
                server.name, "cuts held-out responses off: does another run pause it?"
            )
        return Rollout(
            sample_id=ask.sample_id,
            prompt_index=prompt.index,
            version=0,
            prompt_ids=prompt.prompt_ids,
            header_ids=prompt.header_ids,
            response_ids=written.ids,
            logprobs=None,
            finish=FinishReason.STOP if written.ending == "stop" else FinishReason.LENGTH,
            seed=ask.seed,
            teacher=prompt.teacher,
        )

    rollouts = []
    for ask, found in zip(
        asks, served.ask(asks, write, at_once=config.eval.batch_size), strict=True
    ):
        if isinstance(found, RunError):
            raise RunError(f"no held-out response to prompt {ask.sample_id}: {found}") from found
        rollouts.append(found)
    return rollouts

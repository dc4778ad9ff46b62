"""Whether the models really work with the libraries installed here: eight tokens of each.

What a run would hold in process is loaded as a run loads it, writes eight tokens, and reads them.
Written and read, a token has two log-probs that must be the same: this finds an architecture or a
library's release that is computed wrong, before money is spent. Servers are looked at elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from npd.config import RunConfig
from npd.control.devices.memory import device_bytes
from npd.data.chat_tokenizer import ChatTokenizer
from npd.environment import untested
from npd.errors import NpdError
from npd.models.device import resolve_device
from npd.models.metadata import GIB, size_of
from npd.text import counted
from npd.types import Check, EncodedPrompt, FinishReason, Prompt, Rollout, SampleRequest, role_of

NUM_TOKENS = 8
"""How many tokens are written."""
_ASKED = "What is the colour of the sky?"
_BYTES = {"bfloat16": 2, "float32": 4}
# Nats a token, on average over the response. In bfloat16 a correct pair differs by up to 0.1; what
# is computed wrong, such as a logit cap left out, by 1 and more.
_TOLERANCE = {"bfloat16": 0.35, "float32": 0.02}


def trial_checks(config: RunConfig) -> Iterator[Check]:
    """A few tokens written by whoever writes in process, and read by each model read in process."""
    try:
        chat = ChatTokenizer.of_student(config)
        prompt = chat.encode(Prompt(0, text=_ASKED))
    except NpdError as error:
        yield Check.fail("trial", str(error))
        return
    short = _too_large(config)
    if short:
        yield Check.warn("trial", f"not tried: {short}")
        return
    written: list[Rollout] = []
    if not config.generate.is_served and config.generate.source != "dataset":
        yield _tried("trial: generate", partial(_write, config, chat, prompt, written))
    rollout = written[0] if written else _unwritten(prompt)
    for role, model in _readers(config).items():
        yield _tried(f"trial: {role}", partial(_read, config, chat, role, model, rollout))


def _tried(what: str, look: Callable[[], str]) -> Check:
    """What `look` says; a library's own error is shown with the versions that are new."""
    try:
        return Check.ok(what, look())
    except NpdError as error:
        return Check.fail(what, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a new release of a library raises
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return Check.warn(
                what, "not tried: too little memory is free; stop what else runs there"
            )
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        newer = "; ".join(untested())
        remedy = newer or "please report it as a bug of npd, with `npd version`"
        return Check.fail(what, f"does not work here ({cause}): {remedy}")


def _write(
    config: RunConfig, chat: ChatTokenizer, prompt: EncodedPrompt, written: list[Rollout]
) -> str:
    from npd.workers.generator import generator_for

    section = config.generate.model_copy(update={"max_new_tokens": NUM_TOKENS})
    small = config.model_copy(update={"generate": section})
    is_student = config.generate.source == "student"
    names = [prompt.teacher] if is_student else list(config.teacher_models)
    requests = [SampleRequest(i, i, replace(prompt, teacher=name)) for i, name in enumerate(names)]
    model = config.student if is_student else None
    with closing(generator_for(small, chat, lambda _: None, model=model)) as engine:
        found = engine.generate(requests)
    written += [item for item in found if isinstance(item, Rollout)]
    num_tokens = sum(len(rollout.response_ids) for rollout in written)
    return f"{config.generate.source} wrote {counted(num_tokens, 'token')}"


def _read(config: RunConfig, chat: ChatTokenizer, role: str, model: str, rollout: Rollout) -> str:
    from npd.score.base import LogprobRequest, Logprobs
    from npd.score.in_process import load_prefill_model

    trust, device = config.trust_remote_code, resolve_device(config.runtime.device)
    # Compiling would take longer than all the rest.
    score = config.score.model_copy(update={"compile": False})
    reader = load_prefill_model(
        score, model, chat.vocab_size, role=role, device=device, trust_remote_code=trust
    )
    document = LogprobRequest(rollout.prompt_ids, rollout.response_ids, config.score.top_k)
    reading = reader.read({role: document})[role]
    assert isinstance(reading, Logprobs)
    says = f"read {counted(len(rollout.response_ids), 'token')}, {reading.nll:.2f} nats each"
    if role != "student" or rollout.logprobs is None:
        return says
    apart = float(np.abs(reading.logprobs - rollout.logprobs).mean())
    tolerance = max(_TOLERANCE[config.score.dtype], _TOLERANCE[config.generate.dtype])
    if not apart <= tolerance:
        raise _Wrong(
            f"the {role} {model} gives its own tokens log-probs that differ by {apart:.2g} nats "
            "between writing and scoring: this architecture is computed wrong here; choose another "
            f"model, and please report it{''.join(f'; {note}' for note in untested())}"
        )
    return f"{says}, within {apart:.1g} of what it wrote them with"


class _Wrong(NpdError):
    """A model that is computed wrong."""


def _unwritten(prompt: EncodedPrompt) -> Rollout:
    """Eight tokens to read where nobody writes in process: the prompt's own."""
    ids = np.resize(prompt.prompt_ids, NUM_TOKENS)
    return Rollout(0, 0, 0, prompt.prompt_ids, prompt.header_ids, ids, None, FinishReason.LENGTH, 0)


def _readers(config: RunConfig) -> dict[str, str]:
    """Who is read in process, by role: the student always, as it is trained on such rows."""
    found = {"student": config.student}
    is_read = config.needs_scores or config.evaluates_teacher
    if is_read and not config.score.is_served and config.score.ranks == 1:
        found |= {role_of(name): model for name, model in config.teacher_models.items()}
    return found


def _too_large(config: RunConfig) -> str:
    """Why the largest of the models cannot be loaded beside what is running; empty if it can."""
    device = resolve_device(config.runtime.device)
    free, _ = device_bytes(device)
    for role, model in _readers(config).items():
        size = size_of(model) if Path(model).is_dir() else None
        needed = 0 if size is None else size.parameters * _BYTES[config.score.dtype]
        if needed > 0.9 * free:
            return (
                f"the {role} takes {needed / GIB:,.1f} GiB, and {device} has {free / GIB:,.1f} "
                "free: stop what else runs there, or go without"
            )
    return ""

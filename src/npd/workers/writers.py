"""Who writes the samples of a run: the student, the data, or each prompt's own teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from npd.chat import Chat
from npd.config import GenerateConfig, RunConfig
from npd.generate import Generator, TeachersGenerator, build_generator
from npd.modeling import resolve_device
from npd.names import DEFAULT_TEACHER

if TYPE_CHECKING:
    from npd.generate.served import Surroundings


def build_writer(
    config: RunConfig,
    chat: Chat,
    surroundings: Callable[[str | None], Surroundings | None],
    *,
    model: str | None = None,
) -> Generator:
    """The generator of a run, holding `model` where that is given: it then writes all there is.

    Of several teachers each is loaded when it is first asked, a single one at once. `surroundings`
    is given the name of the teacher that writes, or None.

    Raises:
        InputError, RunError: a model cannot be loaded or served.
    """

    def build(section: GenerateConfig, teacher: str | None, holding: str | None) -> Generator:
        writer = build_generator(
            section,
            stop_ids=stop_ids(config, chat, teacher),
            pad_id=chat.pad_id,
            vocab_size=chat.vocab_size,
            device=resolve_device(config.runtime.device),
            trust_remote_code=config.trust_remote_code,
            surroundings=surroundings(teacher),
        )
        with ExitStack() as undo:
            undo.callback(writer.close)
            if holding is not None:
                writer.load(Path(holding), 0)
            undo.pop_all()
        return writer

    models = config.teacher_models
    if config.generate.source != "teacher":
        return build(config.generate, None, model)
    if model is not None:
        name = min(models, key=lambda name: name != DEFAULT_TEACHER)
        return build(config.generate_of(name), name, model)
    writers = TeachersGenerator(lambda name: build(config.generate_of(name), name, models[name]))
    if len(models) == 1:
        writers.open(*models)
    return writers


def stop_ids(config: RunConfig, chat: Chat, teacher: str | None) -> frozenset[int]:
    """What ends a response: the student's end tokens, and the teacher's own where it writes."""
    if teacher is None:
        return chat.stop_ids
    model = config.teacher_models[teacher]
    return chat.stop_ids | Chat.load(model, trust_remote_code=config.trust_remote_code).stop_ids

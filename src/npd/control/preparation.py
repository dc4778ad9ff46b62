"""What can be found wrong before any model is loaded: models, vocabularies, data. And the prompts.

Reads configs, tokenizers, the headers of weights and the data. Writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from npd import lora
from npd.chat import Chat, check_same_vocabulary
from npd.config import DataConfig, RunConfig
from npd.control.teaching import check_names, idle_notes, role_of
from npd.data import encode_prompts, load_prompts
from npd.errors import DataError, ModelError
from npd.modeling import check_context, resolve_device
from npd.score.divisible import check_divisible
from npd.train.compilers import check_compilers
from npd.types import EncodedPrompt

# A fingerprint reads this much of a weight file at this many places: 16 MiB of any model.
_SAMPLED_BYTES, _SAMPLES = 65536, 256


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompts of a run as token ids, and how many records were dropped for which reason."""

    prompts: list[EncodedPrompt]
    heldout: list[EncodedPrompt]
    dropped: dict[str, int]
    notes: tuple[str, ...] = ()
    """Lines for the person watching."""

    @property
    def data_fingerprint(self) -> str:
        """A checksum of all prompts, completions and answers: the data must not change in a run."""
        digest = hashlib.sha256()
        for prompt in (*self.prompts, *self.heldout):
            completion = prompt.completion_ids
            for ids in (prompt.prompt_ids, prompt.header_ids, completion):
                digest.update(b"-" if ids is None else len(ids).to_bytes(8, "big") + ids.tobytes())
            digest.update(repr((prompt.answer, prompt.teacher)).encode())
        return digest.hexdigest()


def prepare(config: RunConfig) -> Prepared:
    """Check models and data, and tokenise the prompts.

    Raises:
        InputError: a model or the data cannot be used.
    """
    trust = config.trust_remote_code
    if config.train.lora is not None:
        lora.require("train.lora")
    check_model("student", config.student, config)
    for name, model in config.teacher_models.items():
        check_model(role_of(name), model, config)
    if config.train.lora is not None:
        lora.check_targets(config.train.lora, config.student)
    check_compiler(config)
    check_ranks(config)
    chat = Chat.load(config.student, system=config.data.system, trust_remote_code=trust)
    for model in config.teacher_models.values() if config.needs_teacher else ():
        check_same_vocabulary(model, config.student, trust_remote_code=trust)
    prepared = read_data(config, chat)
    for model in models_read_here(config):
        check_weights(model)
    return prepared


def read_data(config: RunConfig, chat: Chat) -> Prepared:
    """The prompts as the student's `chat` has them, checked for what the run needs of them.

    Raises:
        DataError: the data cannot be used.
    """
    found = load_prompts(data_section(config))
    read = found.train if config.trains_by_teacher else []
    read = [*read, *found.heldout] if config.evaluates_teacher else read
    teachers = check_names([(prompt.place, prompt.teacher) for prompt in read], config)
    prompts, dropped = encode_prompts(found.train, chat, config.data)
    heldout, dropped_heldout = encode_prompts(found.heldout, chat, config.data)
    if config.generate.source == "dataset":
        _check_completions(prompts, "generate.source dataset")
    if config.eval.source == "completion":
        _check_completions(heldout, "eval.source completion")
    if not prompts:
        raise DataError(
            "no training prompt is left after dropping: see data.on_long_prompt and "
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens})"
        )
    counts = [found.dropped, dropped, dropped_heldout]
    reasons = sorted({reason for count in counts for reason in count})
    total = {reason: sum(count.get(reason, 0) for count in counts) for reason in reasons}
    notes = idle_notes(teachers, config)
    return Prepared(_numbered(prompts, 0), _numbered(heldout, len(prompts)), total, notes)


def models_read_here(config: RunConfig) -> list[str]:
    """Models whose weights this machine reads; those of a teacher on running servers are theirs."""
    teachers = config.teacher_models.items()
    return [config.student, *(model for name, model in teachers if not _is_elsewhere(name, config))]


def _is_elsewhere(teacher: str, config: RunConfig) -> bool:
    writes_here = config.generate.source == "teacher" and not config.generate_of(teacher).urls
    return bool(config.score_of(teacher).urls) and not writes_here


def _numbered(prompts: Sequence[EncodedPrompt], first: int) -> list[EncodedPrompt]:
    """The prompts under the indices a run knows them by, without gaps where some were dropped."""
    return [replace(prompt, index=i) for i, prompt in enumerate(prompts, first)]


def check_model(role: str, model: str, config: RunConfig) -> None:
    """Check that a model is there and its context long enough, reading its config only.

    `role` is the name of the setting or option it comes from, for the message.

    Raises:
        ModelError: it cannot be used. A path is never taken for a hub's name.
    """
    if _is_path(model) and not Path(model).is_dir():
        raise ModelError(
            f"no model directory at {model} (looked from {Path.cwd()}): correct `{role}`, or make "
            "the directory with npd prepare"
        )
    if role.startswith(("student", "teacher")) and lora.base_of(model) is not None:
        raise ModelError(
            f"the {role} {model} is a LoRA adapter: merge it into its base (npd export {model} "
            "DIR) and give that directory"
        )
    check_context(model, config.max_sample_tokens, trust_remote_code=config.trust_remote_code)


def check_compiler(config: RunConfig) -> None:
    """Check that what `train.compile` writes can be built here, if the trainer is to be here.

    Raises:
        ConfigError: the compiler, or what it needs, is missing.
    """
    if config.train.compile and config.runtime.kind != "ray":
        check_compilers(resolve_device(config.runtime.device))


def check_ranks(config: RunConfig) -> None:
    """Check that each teacher can be held by `score.ranks` together.

    Raises:
        ModelError: it cannot be shared out like that.
    """
    for model in config.teacher_models.values():
        trust = config.trust_remote_code
        check_divisible(model, config.score.ranks, trust_remote_code=trust)


def check_weights(model: str) -> None:
    """Check that a directory's weights are there and whole, reading their headers only.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    if not Path(model).is_dir():
        return  # a hub's name: what is downloaded is checked when it is loaded
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model} holds no .safetensors weights: save the model in that format")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is damaged or cut short ({error}): copy or make the model again"
            ) from error


def _is_path(model: str) -> bool:
    """Whether `model` can only mean a directory; a hub's names are `name` and `owner/name`."""
    owner, _, name = model.partition("/")
    return model.startswith(("/", ".")) or "/" in name or (bool(name) and Path(owner).is_dir())


def model_fingerprint(model: str) -> str | None:
    """A checksum of a model directory's config and of places spread over its weight files.

    Not of every weight: reading a large model whole would hold up each start. None for the name
    of a model on a hub.
    """
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256((Path(model) / "config.json").read_bytes())
    for file in sorted(Path(model).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for start in range(0, size, max(_SAMPLED_BYTES, size // _SAMPLES)):
                weights.seek(start)
                digest.update(weights.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def data_section(config: RunConfig) -> DataConfig:
    """The data section; nothing is held out where nothing is evaluated."""
    if config.eval.source != "none":
        return config.data
    return config.data.model_copy(update={"heldout": None, "heldout_size": 0})


def _check_completions(prompts: Sequence[EncodedPrompt], needed_by: str) -> None:
    missing = [prompt.index for prompt in prompts if prompt.completion_ids is None]
    if missing:
        raise DataError(
            f"{needed_by} needs a completion for every prompt, but prompt {missing[0]} (and "
            f"{len(missing) - 1} more) has none: add a `completion` column, or name yours in "
            "data.columns"
        )

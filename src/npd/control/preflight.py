"""Every check of a run before it starts, each once: what `npd run` raises and `npd doctor` prints.

Promises: what passes can be used, and what does not is refused in one line, before anything is
made. Reads configs, tokenizers, the headers of weights and the data. Builds small random models of
an architecture, and loads no model. Writes nothing (at `runtime.shared`, an object that it removes
at once).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from npd.config import LaunchConfig, RunConfig
from npd.config.load import dump_config
from npd.config.paths import why_no_path
from npd.config.sources import flat
from npd.control.placement import check_gpus
from npd.control.resume_checks import check_resumable
from npd.control.run_directory import check_directory, check_start, check_writable, is_free
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.completions import longest_completion
from npd.data.inputs import RunInputs, data_section, read_data
from npd.data.prompts import load_prompts
from npd.data.vocabulary import check_same_vocabulary, check_support, compare_ends
from npd.engines.client import key_of
from npd.engines.server_process import check_program
from npd.errors import ConfigError, ModelError, NpdError
from npd.generate.in_process import check_decoding
from npd.models import lora
from npd.models.device import CPU, CUDA, check_kind, kind_of, num_gpus, resolve_device, untested
from npd.models.files import check_files, check_generation_settings
from npd.models.kernels.compile import check_compilers
from npd.models.loading import (
    check_context,
    check_weights,
    outline,
    read_config,
)
from npd.models.metadata import model_settings, size_of
from npd.models.quantisation import check_loadable, check_numbers, check_trainable
from npd.models.replica import check_packing, check_writing
from npd.models.tensors import about
from npd.observe.trackers import check_trackers
from npd.remote.shared_folder import check_shared
from npd.score.tensor_parallel import check_divisible
from npd.text import counted, shown, shown_path
from npd.types import Check, EncodedPrompt, role_of

# One thread at a time: preparing imports transformers, and of that the module of each model and
# tokenizer. Two first imports at once fail.
_PREPARING = RLock()
# What a record has in place of a secret: all of a value, a password, what follows a name.
_MASKED = re.compile(r"(^|[=:/])\*\*\*\d*($|@)")
_MAY_BE_MASKED = re.compile(r"\.(admin_)?urls$|\.launch\.(env|args|command)|^runtime\.shared$")


@dataclass(frozen=True, slots=True)
class Start:
    """How a run is to start: as a new one, or by resuming (None: not known yet).

    `origins` says where the config's values came from, for the command that resumes.
    """

    resume: bool | None = None
    origins: Mapping[str, str] = field(default_factory=dict)


def prepare(
    config: RunConfig, *, clock: datetime | None = None, start: Start | None = None
) -> RunInputs:
    """Check a run, and tokenise its prompts; see `Preflight` for the arguments.

    Raises:
        InputError: the first check that fails.
    """
    with _PREPARING:
        preflight = Preflight(config, clock=clock, start=start)
        for check in preflight.checks():
            if check.error is not None:
                raise check.error
    assert preflight.inputs is not None
    return preflight.inputs


class _Rule(NamedTuple):
    """A check and its name. `look` raises an NpdError, or gives what an ok says or all records.

    `needs`: the checks without which there is nothing to look at.
    """

    what: str
    look: Callable[[], str | Sequence[Check]]
    needs: Sequence[str] = ()


class Preflight:
    """The checks of one run, and what they read: its inputs.

    `clock` is the time that chat templates write (now). Without `start` nothing is checked that
    only a run needs: a free directory, shared files, a cluster. `gpus` are those of another
    machine, for which the run is planned (None: this one's).
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        clock: datetime | None = None,
        start: Start | None = None,
        gpus: Sequence[str] | None = None,
    ) -> None:
        self._gpus = gpus
        self._config, self._clock, self._start = config, clock, start
        self._teachers = {role_of(name): model for name, model in config.teacher_models.items()}
        self._chat: ChatTokenizer | None = None
        self._data: RunInputs | None = None
        self._stop_ids: frozenset[int] = frozenset()
        self._notes: list[str] = []
        self._failed: set[str] = set()

    @property
    def failed(self) -> frozenset[str]:
        """The checks that failed so far, and those that were skipped because of them."""
        return frozenset(self._failed)

    @property
    def inputs(self) -> RunInputs | None:
        """The run's inputs, whole once every check has passed; None if the data was not read."""
        if self._data is None:
            return None
        notes = (*self._notes, *self._data.notes)
        return replace(self._data, stop_ids=self._stop_ids, notes=notes)

    def checks(self) -> Iterator[Check]:
        """Makes one check after the other, as they are asked for, and continues after a failure.

        A check that needs one that failed is skipped.
        """
        for what, look, needs in self._rules():
            if not self._failed.isdisjoint(needs):
                self._failed.add(what)
                continue
            try:
                found = look()
            except NpdError as error:
                self._failed.add(what)
                yield Check.fail(what, error)
            else:
                yield from [Check.ok(what, found)] if isinstance(found, str) else found

    def _rules(self) -> Iterator[_Rule]:
        """Every check that concerns this run, in the order in which a run makes them."""
        yield from self._rules_of_place()
        yield from self._rules_of_models()
        yield from self._rules_of_servers()
        yield from self._rules_of_text()
        # The headers of all weights take longest.
        for role, model in models_read_here(self._config):
            yield _Rule(f"weights: {role}", partial(self._weights, role, model), [role])
        if self._start is not None and self._start.resume:
            yield _Rule("recorded run", self._recorded)
        # Last, because it may make a folder there.
        if self._start is not None and self._config.shared_url is not None:
            yield _Rule("shared files", self._shared_files)

    def _rules_of_place(self) -> Iterator[_Rule]:
        config, start = self._config, self._start
        yield _Rule("secrets", partial(check_unmasked, config))
        yield _Rule("run directory", self._run_directory)
        # A finished run that is resumed joins no cluster: `run` checks that when it goes on.
        if start is not None and config.runtime.kind == "ray" and not start.resume:
            yield _Rule("cluster", partial(check_cluster, config))
        if config.observe.trackers:
            yield _Rule("trackers", self._trackers)
        device = config.runtime.device
        if self._gpus is None and (device not in ("auto", CPU) or untested(device)):
            yield _Rule("device", self._device)
        is_placed = config.runtime.assigns_gpus
        if is_placed and (self._gpus or num_gpus(device) or config.named_gpus):
            yield _Rule("gpus", partial(check_gpus, config, self._gpus), ["device"])

    def _rules_of_models(self) -> Iterator[_Rule]:
        config = self._config
        for role, model in {"student": config.student, **self._teachers}.items():
            yield _Rule(role, partial(self._model, role, model))
        if config.train.lora is not None:
            yield _Rule("lora", self._lora)
        if config.train.compile or config.score.compile is True:
            yield _Rule("compiler", partial(check_compiler, config))
        if config.score.ranks > 1:
            yield _Rule("score.ranks", partial(check_ranks, config), [*self._teachers])

    def _rules_of_servers(self) -> Iterator[_Rule]:
        config = self._config
        sections = {"generate": config.generate, "score": config.score}
        served = {where: section for where, section in sections.items() if section.is_served}
        for where, section in served.items():
            key = f"{where}.api_key_env"
            yield _Rule(key, partial(check_key, section.api_key_env))
        if config.runtime.kind == "ray":
            return  # its workers start servers on machines that cannot be looked at from here
        engines = [section.engine for section in served.values()]
        for where, launch in config.launches.items():
            look = partial(self._program, where, engines[-1], launch)
            yield _Rule(f"{where}.launch", look)

    def _rules_of_text(self) -> Iterator[_Rule]:
        config, teachers = self._config, self._teachers if self._config.needs_teacher else {}
        is_taught = config.trains_by_teacher and config.generate.source != "dataset"
        if is_taught and not config.teachers:
            yield _Rule("pair", partial(check_pair, config), ["student", *teachers])
        yield _Rule("tokenizer", self._tokenizer, ["student"])
        if teachers:
            yield _Rule("score.top_k", self._support, ["tokenizer"])
        for role, model in teachers.items():
            look = partial(self._vocabulary, role, model)
            yield _Rule(f"vocabulary: {role}", look, ["tokenizer", role])
        yield _Rule("end tokens", self._end_tokens, ["tokenizer", *teachers])
        yield _Rule("data", self._read_data)

    def _device(self) -> list[Check]:
        checks = [Check.ok("device", check_device(self._config))]
        if (why := untested(self._config.runtime.device)) is not None:
            self._notes.append(why)
            checks.append(Check.warn("device", why))
        return checks

    def _run_directory(self) -> str | list[Check]:
        config, start, root = self._config, self._start, self._config.directory.absolute()
        check_directory(config)
        if start is None:
            return f"{root} can hold the run"
        if not start.resume:
            check_writable(config)
        if start.resume is not None:
            check_start(config, resume=start.resume, origins=start.origins)
            return f"{root} {'holds a run to resume' if start.resume else 'is free'}"
        if is_free(root):
            return f"{root} is free, and can be written to"
        says = (
            f"{root} is not empty: npd run needs --resume (a run of this config), or another name"
        )
        return [Check.warn("run directory", says)]

    def _shared_files(self) -> str:
        assert self._start is not None
        check_shared(self._config, resume=self._start.resume is not False)
        return f"{self._config.shared_url} takes and gives back a small object, from this machine"

    def _trackers(self) -> str:
        names = self._config.observe.trackers
        check_trackers(names)
        return f"{', '.join(names)} can be used"

    def _model(self, role: str, model: str) -> str:
        config = self._config
        check_model(role, model, config)
        size, settings = size_of(model), model_settings(Path(model))
        parts = [model]
        if size is not None:
            parts.append(f"{size.parameters / 1e6:,.0f} M parameters")
        if settings.context:
            longest = config.max_sample_tokens
            parts.append(f"context {settings.context:,}, samples have up to {longest:,}")
        return ", ".join(parts)

    def _weights(self, role: str, model: str) -> str:
        check_whole(role, model, self._config)
        check_use(role, model, self._config)
        return "every tensor of the architecture is there"

    def _recorded(self) -> str:
        check_resumable(self._config)
        return "the run was started with the same settings, and its ledger is there"

    def _program(self, where: str, engine: str, launch: LaunchConfig) -> str:
        return f"{check_program(where, engine, launch)} is there"

    def _lora(self) -> str | list[Check]:
        lora.require("train.lora")
        covered = None if "student" in self._failed else lora_coverage(self._config)
        if covered is None:
            return "peft is installed; the targets can be checked once the student can be read"
        says = f"peft is installed; {covered}"
        if not covered.uncovered:
            return says
        self._notes.append(f"train.lora: {covered}")
        return [Check.warn("lora", says)]

    def _tokenizer(self) -> str:
        self._chat = ChatTokenizer.of_student(self._config, clock=self._clock)
        template = "with a" if self._chat.has_template else "without a"
        return f"{self._chat.vocab_size:,} token ids, {template} chat template"

    def _support(self) -> str:
        assert self._chat is not None
        check_support(self._config, self._chat)
        return f"{self._config.score.top_k:,} of {self._chat.vocab_size:,} ids at each position"

    def _vocabulary(self, role: str, model: str) -> str:
        assert self._chat is not None
        config = self._config
        trust = config.trust_remote_code
        check_same_vocabulary(model, config.student, trust_remote_code=trust, role=role)
        return f"{role} and student share {self._chat.vocab_size:,} token ids"

    def _end_tokens(self) -> list[Check]:
        assert self._chat is not None
        self._stop_ids, notes, samples = compare_ends(self._config, self._chat)
        self._notes[:0] = notes
        names = self._chat.tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))
        says = f"a response ends with {' or '.join(map(str, names))}"
        return [
            Check.ok("end tokens", says),
            *(Check.warn("end tokens", note) for note in notes),
            *(
                Check.ok(f"template: {role}", f"a question is written as {shown(text, 240)}")
                for role, text in samples.items()
            ),
        ]

    def _read_data(self) -> str | list[Check]:
        config = self._config
        if self._chat is None:
            found = load_prompts(data_section(config), config.seed)
            counts = _counts(found.train, found.heldout, found.dropped)
            return f"{counts}; their length can be checked once the student can be read"
        data = read_data(config, self._chat)
        self._check_longest(data.prompts)
        self._data = data
        return [
            Check.ok("data", _counts(data.prompts, data.heldout, data.dropped)),
            *(Check.warn("data", note) for note in data.notes),
            *map(_remark, data.remarks),
        ]

    def _check_longest(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Check that the longest completion of the data fits every model."""
        config = self._config
        longest = config.data.max_prompt_tokens + longest_completion(prompts)
        teachers = self._teachers if config.needs_scores else {}
        for role, model in {"student": config.student, **teachers}.items():
            if role in self._failed:
                continue
            with about(role, model):
                check_context(
                    model,
                    longest,
                    trust_remote_code=config.trust_remote_code,
                    limit="the data's longest completion, which data.max_completion_tokens bounds",
                )


def _remark(text: str) -> Check:
    """What the start of a run says of its data, as a check."""
    what, is_form, says = text.partition("data: ")
    return Check.ok("records", says) if is_form and not what else Check.ok("data", text)


def _counts(
    prompts: Sequence[object], heldout: Sequence[object], dropped: Mapping[str, int]
) -> str:
    counts = f"{counted(len(prompts), 'prompt')}, {len(heldout):,} held out"
    return ", ".join([counts, *(f"{count} dropped ({why})" for why, count in dropped.items())])


# ---- The place: config, device, cluster, servers


def check_unmasked(config: RunConfig) -> str:
    """Check that no secret is what stands for it where npd prints or records a config.

    Raises:
        ConfigError: one is.
    """
    for key, value in flat(dump_config(config)):
        words = map(str, value if isinstance(value, list) else [value])
        if _MAY_BE_MASKED.search(key) and any(map(_MASKED.search, words)):
            raise ConfigError(
                f"{key} has *** where npd left a secret out, as in every config that it prints or "
                "records: put the secret there again"
            )
    return "no setting has *** in place of a secret"


def check_device(config: RunConfig) -> str:
    """Check that the GPU that `runtime.device` names is there, if workers are to be here.

    Raises:
        ConfigError: it is not, or torch knows no such kind.
    """
    device = config.runtime.device
    return f"runtime.device is {device}" if config.runtime.kind == "ray" else device_here(device)


def device_here(device: str) -> str:
    """As `check_device`, for what runs in this process whatever `runtime.kind` is."""
    if device in ("auto", CPU):
        return f"runtime.device is {device}"
    check_kind(device)
    there, index = num_gpus(device), device.partition(":")[2]
    if there <= int(index or 0):
        kind = "GPU" if kind_of(device) == CUDA else f"device of kind {kind_of(device)}"
        has = counted(there, kind) if there else f"no {kind} that torch can use"
        raise ConfigError(
            f"runtime.device {device}, but this machine has {has}: set runtime.device: auto"
        )
    return f"runtime.device is {device}"


def check_cluster(config: RunConfig) -> str:
    """Check that a run on Ray names the cluster it joins; connects to nothing.

    Raises:
        ConfigError: neither `runtime.ray.address` nor RAY_ADDRESS does.
    """
    from npd.runtime.ray_cluster import cluster_address

    return f"the run joins {cluster_address(config.runtime.ray)}"


def check_key(variable: str) -> str:
    """Check that the key for servers, in an environment variable, can be sent.

    Raises:
        ConfigError: it holds what no HTTP header can carry.
    """
    if key_of(variable) is None:
        return f"requests carry no key (${variable} is not set)"
    return f"requests carry the key of ${variable}"


# ---- Models


def check_model(role: str, model: str, config: RunConfig) -> None:
    """Check that a model is there and its context long enough, reading its config only.

    `role` is the name of the setting or option it comes from, for the message.

    Raises:
        ModelError: it cannot be used. A path is never taken for a hub's name.
    """
    if (why := why_no_path(model)) is not None:
        raise ModelError(f"{role} {shown_path(model)} {why}: give a model directory or name")
    if "://" in model:
        raise ModelError(
            f"{role} {shown_path(model)} is a URL: give a model directory, or a name like "
            "owner/name"
        )
    if _is_path(model) and not Path(model).is_dir():
        raise ModelError(
            f"no model directory at {model} (looked from {Path.cwd()}): correct `{role}`, or give "
            "the name of a model"
        )
    if role.startswith(("student", "teacher")) and lora.base_of(model) is not None:
        raise ModelError(
            f"the {role} {model} is a LoRA adapter: merge it into its base (npd export {model} "
            "DIR) and give that directory"
        )
    if Path(model).is_dir():
        check_files(role, Path(lora.base_of(model) or model))
    trust = config.trust_remote_code
    settings = read_config(model, trust_remote_code=trust, role=role)
    if (Path(model) / "config.json").is_file():
        check_generation_settings(role, Path(model))
    if role == "student":
        check_trainable(role, model, settings)
    check_numbers(role, model, settings)
    if role in _held_here(config):
        check_loadable(role, model, settings, resolve_device(config.runtime.device))
    with about(role, model):
        check_context(model, config.max_sample_tokens, trust_remote_code=trust)


def _is_path(model: str) -> bool:
    """Whether `model` can only mean a directory; a hub's names are `name` and `owner/name`."""
    owner, _, name = model.partition("/")
    return model.startswith(("/", ".")) or "/" in name or (bool(name) and Path(owner).is_dir())


def _held_here(config: RunConfig) -> set[str]:
    """The roles of teachers that transformers loads, on this machine: not served, not by Ray."""
    if config.runtime.kind == "ray":
        return set()
    writes_here = config.generate.source == "teacher" and not config.generate.is_served
    is_held = config.needs_teacher and (writes_here or not config.score.is_served)
    return {role_of(name) for name in config.teacher_models} if is_held else set()


def check_pair(config: RunConfig) -> str:
    """Check that the student does not learn from itself alone, on text that a model writes.

    Raises:
        ModelError: its only teacher is the student.
    """
    student, teacher = config.student, config.teacher
    same = student == teacher or (
        teacher is not None
        and os.path.isdir(student)
        and os.path.isdir(teacher)
        and os.path.samefile(student, teacher)
    )
    if same:
        raise ModelError(
            f"student and teacher are one model ({shown_path(student)}), which has nothing to "
            "learn from itself: set `teacher` to a better model of the same family"
        )
    return "student and teacher are two models"


def models_read_here(config: RunConfig) -> list[tuple[str, str]]:
    """Roles and models whose weights this machine reads; those of running servers are theirs."""
    teachers = config.teacher_models.items()
    here = [(role_of(name), model) for name, model in teachers if not _is_elsewhere(name, config)]
    return [("student", config.student), *here]


def _is_elsewhere(teacher: str, config: RunConfig) -> bool:
    writes_here = config.generate.source == "teacher" and not config.generate_of(teacher).urls
    return bool(config.score_of(teacher).urls) and not writes_here


def check_whole(role: str, model: str, config: RunConfig) -> None:
    """Check that a model's weights are there, and those of its architecture, by their headers.

    Raises:
        ModelError: some are missing, damaged, misnamed or of another shape.
    """
    with about(role, model):
        check_weights(model, trust_remote_code=config.trust_remote_code)


def check_use(role: str, model: str, config: RunConfig) -> None:
    """Check that a model's architecture can do what the run needs of it in process.

    It is tried on a small random model.

    Raises:
        ModelError: its packed rows, or its decoding, are not what its own code gives.
    """
    settings = read_config(model, trust_remote_code=config.trust_remote_code, role=role)
    if getattr(settings, "auto_map", None):
        return  # code that a directory brings is checked as the model is loaded
    with about(role, model):
        if role == "student" or _reads_here(config):
            check_packing(settings)
        if _writes_here(role, config):
            check_writing(settings, check_decoding)


def _reads_here(config: RunConfig) -> bool:
    """Whether a teacher reads samples or held-out text in process."""
    is_needed = config.needs_scores or config.evaluates_teacher
    return is_needed and not config.score.is_served


def _writes_here(role: str, config: RunConfig) -> bool:
    """Whether a model writes samples or held-out text in process."""
    writer = "student" if role == "student" else "teacher"
    writes = config.generate.source == writer and not config.generate.is_served
    answers = config.eval.num_samples > 0 and config.eval.source != "none"
    evaluates = config.eval.source == "teacher" and not config.score.is_served
    return writes or (answers if role == "student" else evaluates)


def lora_coverage(config: RunConfig) -> lora.Coverage | None:
    """What the adapters of `train.lora` act on; None without it, or where only loading can tell.

    Raises:
        ModelError: a name in `train.lora.targets` is no linear layer of the student.
    """
    if config.train.lora is None:
        return None
    try:
        model = outline(config.student, trust_remote_code=config.trust_remote_code)
    except ModelError:
        return None
    return lora.coverage(model, config.train.lora, config.student)


def check_compiler(config: RunConfig) -> str:
    """Check that what `compile` writes can be built here, if the workers are to be here.

    Raises:
        ConfigError: the compiler, or what it needs, is missing.
    """
    asked = {"train.compile": config.train.compile, "score.compile": config.score.compile is True}
    named = [setting for setting, is_on in asked.items() if is_on]
    for setting in named if config.runtime.kind != "ray" else ():
        check_compilers(resolve_device(config.runtime.device), setting)
    return f"{' and '.join(named)}: the compiler it needs is here"


def check_ranks(config: RunConfig) -> str:
    """Check that each teacher can be held by `score.ranks` together.

    Raises:
        ModelError: it cannot be shared out like that.
    """
    for model in config.teacher_models.values():
        trust = config.trust_remote_code
        check_divisible(model, config.score.ranks, trust_remote_code=trust)
    return f"{config.score.ranks} ranks can hold each teacher together"

"""Every check of a run before it starts, each once: what `npd run` raises and `npd doctor` prints.

Promises: what passes can be used, and what does not is refused in one line, before anything is
made. Reads configs, tokenizers, the headers of weights and the data. Builds small random models of
an architecture, and loads no model. Writes nothing (at `runtime.shared`, an object that it removes
at once).
"""

from __future__ import annotations

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
from npd.config.sources import flat
from npd.control.devices.placement import check_gpus
from npd.control.model_checks import (
    check_compiler,
    check_model,
    check_pair,
    check_ranks,
    check_use,
    check_whole,
    lora_coverage,
    models_read_here,
)
from npd.control.resume_checks import check_resumable
from npd.control.run_directory import check_directory, check_start, check_writable, is_free
from npd.data.chat_tokenizer import ChatTokenizer
from npd.data.completions import longest_completion
from npd.data.inputs import RunInputs, data_section, read_data
from npd.data.prompts import load_prompts
from npd.data.vocabulary import check_same_vocabulary, check_support, compare_ends
from npd.engines.client import key_of
from npd.engines.server_process import check_program
from npd.errors import ConfigError, NpdError
from npd.models import lora
from npd.models.device import CPU, CUDA, check_kind, kind_of, num_gpus, untested
from npd.models.loading import (
    check_context,
)
from npd.models.metadata import model_settings, size_of
from npd.models.tensors import about
from npd.observe.trackers import check_trackers
from npd.remote.shared_folder import check_shared
from npd.text import counted, shown
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

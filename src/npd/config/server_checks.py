"""Cross-section validation of servers, ranks and devices, for `npd.config.checks`.

A model's servers are set in `generate` or `score` (the student, and `teacher`) or in an entry of
`teachers`. All three have the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from urllib.parse import urlsplit

from npd.config.base import LaunchConfig
from npd.config.run import RunValues
from npd.config.sections import GenerateConfig, ScoreConfig, TeacherConfig
from npd.redaction import without_login
from npd.text import shown
from npd.types import DEFAULT_TEACHER

# Flags and environment variables that npd itself sets for a server that it starts.
_OUR_FLAGS = {"--host", "--port", "--api-key", "--model", "--model-path", "--served-model-name"}
_OUR_FLAGS |= {"--uds"}
_OUR_VARIABLES = {"VLLM_API_KEY", "VLLM_SERVER_DEV_MODE"}
# What a user may call a GPU, and torch does not.
_NO_KINDS = {"gpu", "nvidia", "rocm", "hip", "amd", "ascend", "metal"}


@dataclass(frozen=True, slots=True)
class _Servers:
    """The servers of one model.

    `where`: the section that sets them. `chosen_by`: the section whose `engine` decides whether
    servers are used. `callers`: for each section whose workers call them, how many workers it has;
    empty if the model runs in process.
    """

    where: str
    urls: tuple[str, ...]
    launch: LaunchConfig | None
    chosen_by: str
    callers: Mapping[str, int]
    need: str
    """Why a server is needed: the beginning of a message."""
    has_model: bool = True
    """Whether the run has a model for these servers."""


def servers_problems(c: RunValues) -> Iterator[str]:
    """The servers of every model, alone and together."""
    for servers in _all_servers(c):
        yield from _choice_problems(servers)
        yield from _worker_problems(servers)
        yield from _url_problems(f"{servers.where}.urls", servers.urls)
        if servers.launch is not None:
            yield from _launch_problems(f"{servers.where}.launch", servers.launch)
    for name in c.teachers:
        yield from _teacher_name_problems(name)
    yield from _load_balancer_problems(c.generate)
    yield from _key_problems(c)
    yield from _model_clashes(c)
    yield from _call_timeout_problems(c)


def _all_servers(c: RunValues) -> Iterator[_Servers]:
    """The servers of `generate`, `score` and each entry of `teachers`."""
    has_default = c.teacher is not None or not c.teachers
    is_written = c.generate.source != "teacher" or has_default
    yield _of_section("generate", c.generate, has_model=is_written)
    yield _of_section("score", c.score, has_model=has_default)
    callers = _callers_of_teachers(c)
    by = " and ".join(f"{section}.engine" for section in callers)
    for name, teacher in c.teachers.items():
        where = f"teachers.{name}"
        need = f"{where} needs a server ({by})"
        yield _Servers(where, teacher.urls, teacher.launch, "score", callers, need)


def _of_section(where: str, section: GenerateConfig | ScoreConfig, *, has_model: bool) -> _Servers:
    callers = {where: section.workers} if section.is_served else {}
    need = f"{where}.engine {section.engine} needs a server"
    return _Servers(where, section.urls, section.launch, where, callers, need, has_model)


def _callers_of_teachers(c: RunValues) -> dict[str, int]:
    """The workers that call servers of `teachers`: scorers, and generators if teachers write."""
    callers = {"score": c.score.workers} if c.score.is_served else {}
    if c.generate.source == "teacher" and c.generate.is_served:
        callers["generate"] = c.generate.workers
    return callers


def _choice_problems(s: _Servers) -> Iterator[str]:
    """Exactly one of `urls` and `launch` if the engine is a server, neither if it is not."""
    urls, launch = f"{s.where}.urls", f"{s.where}.launch"
    num_given = bool(s.urls) + (s.launch is not None)
    if not s.has_model:
        if num_given:
            yield (
                f"{urls} and {launch} are for `teacher`, which is not set: set urls or launch in "
                "each entry of `teachers` instead"
            )
    elif s.callers and num_given != 1:
        yield (
            f"{s.need}: set exactly one of {urls} (running servers) and {launch} (servers that npd "
            "starts)"
        )
    if not s.callers and num_given:
        yield (
            f"{urls} and {launch} are for servers, but {s.chosen_by}.engine is transformers: set "
            f"{s.chosen_by}.engine: vllm, or leave them out"
        )
    if len(s.callers) > 1 and s.launch is not None:
        yield (
            f"{launch} would start its servers twice, for {' and for '.join(s.callers)}: set "
            f"{urls} to running servers, or set score.engine or generate.engine to transformers"
        )


def _worker_problems(s: _Servers) -> Iterator[str]:
    """Workers do not share servers, so there are as many and each is listed once."""
    if len({without_login(url)[0] for url in s.urls}) < len(s.urls):
        yield f"{s.where}.urls lists a server twice: list each once"
    gpus = () if s.launch is None else s.launch.gpus
    for section, workers in s.callers.items():
        if 0 < len(s.urls) < workers:
            yield (
                f"{section}.workers ({workers}) is more than the servers of {s.where}.urls "
                f"({len(s.urls)}), and workers do not share servers: lower {section}.workers, or "
                "add servers"
            )
        if 0 < len(gpus) < workers:
            yield (
                f"{s.where}.launch.gpus has entries for {len(gpus)} servers, but "
                f"{section}.workers is {workers}: set one entry per worker"
            )


def _url_problems(key: str, urls: tuple[str, ...]) -> Iterator[str]:
    """The form of the URLs of setting `key`."""
    if not all(map(_is_server_url, urls)):
        yield f"{key} must be URLs like http://host:8000"


def _is_server_url(text: str) -> bool:
    """Whether `text` is like http://host:8000."""
    if re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", text) is None:
        return False
    try:
        parts = urlsplit(without_login(text)[0])
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or brackets do not match
        return False


def _launch_problems(where: str, launch: LaunchConfig) -> Iterator[str]:
    """The settings with which npd starts a server."""
    if launch.venv is not None and launch.command:
        yield f"{where} takes only one of venv and command: leave one out"
    flags = {word.partition("=")[0] for word in launch.args} & _OUR_FLAGS
    if flags:
        yield (
            f"{where}.args sets {', '.join(sorted(flags))}, which npd sets itself (loopback, a "
            "free port, a key, the model): leave it out"
        )
    text = " ".join(launch.args).replace("_", "-")
    if "--gpu-memory-utilization" in text and launch.memory != "auto":
        yield f"{where}.memory and --gpu-memory-utilization in {where}.args are the same: keep one"
    names = set(launch.env) & _OUR_VARIABLES
    if names:
        yield f"{where}.env sets {', '.join(sorted(names))}, which npd sets itself: leave it out"


def _teacher_name_problems(name: str) -> Iterator[str]:
    """The keys of `teachers`."""
    if name == DEFAULT_TEACHER:
        yield (
            f"teachers has the key {DEFAULT_TEACHER!r}, which is reserved for prompts without a "
            "teacher: set that model as `teacher`"
        )
    if re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) is None:
        yield (
            f"teachers: {shown(repr(name), 60)} is not a valid name: use letters, digits, _ and -, "
            "at most 64"
        )


def _load_balancer_problems(generate: GenerateConfig) -> Iterator[str]:
    """`generate.admin_urls`."""
    if generate.admin_urls and (not generate.urls or generate.workers > 1):
        yield (
            "generate.admin_urls lists the servers behind a load balancer: set generate.urls to "
            "the load balancer, and generate.workers: 1"
        )
    yield from _url_problems("generate.admin_urls", generate.admin_urls)


def _key_problems(c: RunValues) -> Iterator[str]:
    """`api_key_env` is the name of a variable, not the key."""
    for where, section in (("generate", c.generate), ("score", c.score)):
        if re.fullmatch(r"[A-Za-z_]\w*", section.api_key_env, re.ASCII) is None:
            yield (
                f"{where}.api_key_env must be the name of an environment variable, e.g. "
                "NPD_API_KEY: export the key under that name before you start npd"
            )


def _model_clashes(c: RunValues) -> Iterator[str]:
    """A server holds one model, so two models cannot share it."""
    named = sorted(c.teachers.items(), reverse=True)
    settings: dict[str, GenerateConfig | ScoreConfig | TeacherConfig] = {
        **{f"teachers.{name}.urls": teacher for name, teacher in named},
        **{"generate.urls": c.generate, "score.urls": c.score},
    }
    for (one, own), (other, others) in combinations(settings.items(), 2):
        if one == "generate.urls" and c.generate.source != "student":
            continue  # `teacher` writes, and scores
        for url in sorted(set(own.urls) & set(others.urls))[:1]:
            yield f"{url} is in {one} and in {other}: a server holds one model, so remove one"


def _call_timeout_problems(c: RunValues) -> Iterator[str]:
    """A worker that waits for its servers must not count as lost."""
    limit = c.runtime.call_timeout
    for what, seconds in _waits(c).items():
        if seconds >= limit:
            yield (
                f"runtime.call_timeout ({limit:g} s) must be more than {what} ({seconds:g} s): "
                "raise runtime.call_timeout"
            )


def _waits(c: RunValues) -> dict[str, float]:
    """The seconds that one call may wait for servers, by setting."""
    waits: dict[str, float] = {}
    for where, section in (("generate", c.generate), ("score", c.score)):
        if section.is_served:
            waits[f"{where}.request_timeout"] = section.request_timeout
        if section.is_served and section.launch is not None:
            waits[f"{where}.launch.start_timeout"] = section.launch.start_timeout
    if c.teachers and _callers_of_teachers(c):
        # One call may start the servers of all teachers.
        starts = sum(v.start_timeout for where, v in c.launches.items() if where != "generate")
        waits["the teachers' launch.start_timeout together"] = starts
    return waits


def in_flight_problems(c: RunValues) -> Iterator[str]:
    """`schedule.refresh.in_flight`: what happens to requests during a weight update."""
    in_flight = c.schedule.refresh.in_flight
    if in_flight == "mix" and c.schedule.max_lag == 0:
        yield (
            "schedule.refresh.in_flight mix with schedule.max_lag 0 discards every mixed sample: "
            "set max_lag: 1, or in_flight: finish"
        )
    if in_flight != "finish" and not c.generate.is_served:
        yield (
            f"schedule.refresh.in_flight {in_flight} needs a server: set generate.engine: vllm, or "
            "in_flight: finish"
        )


def engine_problems(c: RunValues) -> Iterator[str]:
    """Combinations that an engine does not support."""
    g = c.generate
    if g.source == "dataset" and g.is_served:
        yield "generate.source dataset decodes nothing: leave generate.engine out"
    if c.score.is_served and c.loss.target == "sampled":
        yield (
            "loss.target sampled draws from the teacher's whole distribution, which a server does "
            "not return: set score.engine: transformers, or another target"
        )


def ranks_problems(c: RunValues) -> Iterator[str]:
    """A trainer, or a teacher, of several ranks: processes with one GPU each."""
    gpus = c.runtime.ray.gpus
    yield from _process_problems("train", c.train.ranks, gpus.get("trainer"), c)
    yield from _process_problems("score", c.score.ranks, gpus.get("scorer"), c)
    if c.score.ranks == 1:
        return
    ranks = f"score.ranks {c.score.ranks}"
    if c.score.is_served:
        yield (
            f"{ranks} is for a teacher in process, but score.engine {c.score.engine} is a server: "
            "set score.ranks: 1 and score.launch.tensor_parallel"
        )
    if c.score.compile is True:
        yield (
            f"{ranks} splits layers, which score.compile does not compile: set score.compile: auto"
        )
    if c.generate.source == "teacher" and not c.generate.is_served:
        yield (
            f"{ranks} does not apply to generate.source teacher, which decodes in one process: set "
            "generate.engine: vllm, and generate.launch.tensor_parallel"
        )


def _process_problems(section: str, count: int, gpus: float | None, c: RunValues) -> Iterator[str]:
    """Each of `count` ranks is a process with a whole GPU; `gpus`: its GPUs in `runtime.ray`."""
    if count == 1:
        return
    ranks, runtime = f"{section}.ranks {count}", c.runtime
    if runtime.kind == "inline":
        yield (
            f"{ranks} needs a process for each rank: set runtime.kind: local, or {section}.ranks: 1"
        )
    if runtime.names_one_gpu:
        yield (
            f"{ranks} needs a GPU for each rank, but runtime.device {runtime.device} is one GPU: "
            f"set runtime.device: {runtime.device_kind}, and choose GPUs with {section}.gpus"
        )
    named = len({*c.named_gpus.get(section, ())})
    needed = count * (c.score.workers if section == "score" else 1)
    if runtime.assigns_gpus and 0 < named < needed:
        yield (
            f"{ranks} needs {needed} GPUs, one for each rank, but {section}.gpus names {named}: "
            f"name as many, or leave {section}.gpus out"
        )
    if gpus is not None and gpus < 1.0 and runtime.device != "cpu":
        yield (
            f"{ranks} needs a whole GPU for each rank, but runtime.ray.gpus gives a part of one: "
            "set it to 1, or set runtime.device: cpu"
        )


def device_problems(c: RunValues) -> Iterator[str]:
    """`runtime.device`."""
    device = c.runtime.device
    is_kind = re.fullmatch(r"auto|cpu|(?!cpu|auto)[a-z]+(:\d+)?", device) is not None
    if not is_kind or c.runtime.device_kind in _NO_KINDS:
        yield (
            f"runtime.device ({device!r}) must be auto, cpu, cuda or cuda:N (AMD's GPUs too), or "
            "another kind of device that torch knows, such as xpu"
        )
    if c.runtime.kind == "ray" and c.runtime.names_one_gpu:
        yield (
            f"runtime.device {device} does not apply to Ray, which assigns GPUs to workers: set "
            f"{c.runtime.device_kind}, or auto"
        )


def ray_problems(c: RunValues) -> Iterator[str]:
    """`runtime.ray.address`."""
    address = c.runtime.ray.address or ""
    if address.startswith("ray://"):
        yield (
            f"runtime.ray.address {address} is a Ray client address, but npd runs inside the "
            "cluster: submit it there (ray job submit -- npd run ..., with runtime.ray.address: "
            "auto)"
        )
    if c.runtime.kind == "ray" and address == "local":
        yield (
            "runtime.ray.address local is not a running cluster: start one (ray start --head) and "
            "set auto, or set runtime.kind: local, which needs no cluster"
        )

"""Settings of servers that a run survives, but hardly as they were meant."""

from __future__ import annotations

from collections.abc import Iterator

from npd.config import RunConfig
from npd.doctor.checks import Check, warn
from npd.served import looks_secret
from npd.wording import counted


def served_checks(config: RunConfig) -> Iterator[Check]:
    """Warnings only: shards too small for their servers, and secrets in the config."""
    yield from _shard_checks(config)
    sections = {"generate": config.generate.launch, "score": config.score.launch}
    sections |= {f"teachers.{name}": t.launch for name, t in config.teachers.items()}
    for where, launch in sections.items():
        secrets = sorted(filter(looks_secret, launch.env)) if launch else []
        if secrets:
            listed = ", ".join(secrets)
            yield warn(
                f"{where}.launch",
                f"{listed} in {where}.launch.env may be secret, and stands in the config for all "
                "to read: take it out and export it where npd is started, the server inherits it",
            )


def _shard_checks(config: RunConfig) -> Iterator[Check]:
    generate = config.generate
    if generate.engine == "transformers":
        return
    servers = -(-len(generate.urls) // generate.workers) if generate.urls else 1
    at_once = generate.batch_size * servers
    if generate.shard_size < at_once:
        whose = "its server takes" if servers == 1 else f"its {servers} servers take"
        yield warn(
            "shard size",
            f"a generator has one shard of {counted(generate.shard_size, 'sample')} at a time, "
            f"but {whose} {at_once} (generate.batch_size each): set "
            f"generate.shard_size to {2 * at_once}, or lower generate.batch_size",
        )

"""Shows of each server that it holds a snapshot, and remembers what snapshots and servers said.

Promises: a server is compared with every snapshot of the run that came before, also after a restart
of ours, because their probes are kept in the run directory (a few KiB each). Changes no server.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from npd import probe
from npd.errors import ConfigError
from npd.generate.held import Held
from npd.probe import Probe
from npd.servers import EngineServer
from npd.servers.base import SamplingSettings
from npd.servers.checksums import Checksums
from npd.servers.proof import Evidence, judge, read_probe

# Tokens of the first text to go on from, and tokens to draw, to see what log-probs a server tells.
_PROMPT, _DRAWN = 16, 16


class Proving:
    """The proofs of one generator's servers. `past` is where probes are kept; None: nowhere."""

    def __init__(self, tolerance: float, past: Path | None) -> None:
        self._tolerance, self._past = tolerance, past
        self._probes: dict[int, Probe] = {}
        self._checksums: dict[str, Checksums] = {}

    async def measure(self, snapshot: Path, version: int, trust_remote_code: bool) -> Probe:
        """The probe of a snapshot, from its files; kept for those that come after it."""
        # In a thread: it takes seconds, and responses are being read meanwhile.
        work = partial(probe.of_directory, snapshot, trust_remote_code)
        found = await asyncio.to_thread(work)
        self._recall()
        self._probes[version] = found
        if self._past is not None:
            probe.write(found, self._past / f"v{version:06d}")
        return found

    def forget_servers(self) -> None:
        """Servers were started anew: nothing that they said before counts."""
        self._checksums.clear()

    async def show(self, admin: EngineServer, new: Held, before: Probe | None) -> Evidence:
        """What shows that a server holds `new`.

        `before` is what the server said of the texts while it is known to have held another.

        Raises:
            StaleWeights: it does not.
        """
        assert new.probe is not None
        what = f"snapshot v{new.version}"
        found = await read_probe(admin, new.probe, model=new.adapter)
        evidence = self._judge(admin.name, what, found, new, before)
        new.readings[admin.name] = found
        if new.adapter is not None:
            return evidence
        sums = self._checksums.setdefault(admin.name, Checksums())
        digests = await admin.checksums()
        check = partial(sums.check, admin.name, what, digests, new.snapshot)
        num_tensors, num_changed = await asyncio.to_thread(check)
        return replace(evidence, num_tensors=num_tensors, num_changed=num_changed)

    async def look_again(self, admin: EngineServer, held: Held) -> None:
        """Raise StaleWeights where a server no longer holds what it was shown to hold."""
        if held.probe is not None:
            found = await read_probe(admin, held.probe, model=held.adapter)
            self._judge(admin.name, f"snapshot v{held.version}", found, held, None)

    async def check_untempered(
        self, server: EngineServer, held: Held, sampling: SamplingSettings
    ) -> None:
        """Raise ConfigError where a server tells log-probs of the tempered distribution.

        At temperature 1 with top_p 1 there is no other; else a few drawn tokens are read again.
        """
        if held.probe is None or (sampling.temperature in (0.0, 1.0) and sampling.top_p == 1.0):
            return
        prompt = held.probe.sequences[0][:_PROMPT].tolist()
        few = replace(sampling, max_new_tokens=_DRAWN)
        drawn = await server.complete(prompt, few, seed=1, model=held.adapter)
        read = await server.read([*prompt, *drawn.ids.tolist()], 0, model=held.adapter)
        off = np.abs(read.logprobs[len(prompt) - 1 :] - drawn.logprobs)
        if off.mean() > self._tolerance:
            raise ConfigError(
                f"{server.name} tells log-probs of tempered samples ({off.mean():.2f} nats a token "
                "off the model's own): start it with --logprobs-mode raw_logprobs, or set "
                "generate.temperature: 1 and generate.top_p: 1"
            )

    def _judge(
        self, name: str, what: str, found: Probe, new: Held, before: Probe | None
    ) -> Evidence:
        """Against every earlier snapshot; the evidence is of the one just before."""
        assert new.probe is not None
        evidence = judge(name, what, found, new.probe, None, self._tolerance)
        # The newest last: it is the likeliest, and what the evidence tells of.
        for version in sorted(v for v in self._probes if v != new.version):
            old = self._probes[version]
            evidence = judge(name, what, found, new.probe, old, self._tolerance, before)
        return evidence

    def _recall(self) -> None:
        """Read what earlier lives of this worker kept."""
        if self._past is None or self._probes:
            return
        for directory in sorted(self._past.glob("v[0-9]*")):
            kept = probe.read(directory)
            if kept is not None:
                self._probes[int(directory.name[1:])] = kept

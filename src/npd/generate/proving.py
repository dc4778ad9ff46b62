"""Shows of each server that it holds a snapshot, and remembers what snapshots and servers said.

Promises: a server is compared with every snapshot of the run that came before, also after a restart
of ours, because their probes are kept in the run directory (a few KiB each). Changes no server.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

from npd import probe
from npd.generate.held import Held
from npd.probe import Probe
from npd.servers import EngineServer
from npd.servers.checksums import Checksums
from npd.servers.proof import Evidence, judge, read_probe


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

"""What a run leaves behind on the machine: processes, shared memory, temporary files.

A run is told apart from everything else on the machine by a mark in its environment, which its
processes inherit and keep when their parent dies, and by a temporary directory of its own. A port
is free when its process has ended, so ports need no look of their own.
"""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

_MARK = "NPD_TEST_MARK"
_SEGMENT = re.compile(r"/dev/shm/(\S+)")


class Surroundings:
    """The mark and the temporary directory of a run; `look` often, ask `left` at the end."""

    def __init__(self, folder: Path) -> None:
        self._token = secrets.token_hex(8)
        self._tmp = folder / "tmp"
        self._tmp.mkdir(parents=True)
        self._segments: set[str] = set()

    @property
    def environment(self) -> dict[str, str]:
        """What the run's first process must have in its environment."""
        return {_MARK: self._token, "TMPDIR": str(self._tmp)}

    def processes(self) -> dict[int, list[str]]:
        """The living processes of the run and their command lines."""
        mark = f"{_MARK}={self._token}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    arguments = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = [a.decode(errors="replace") for a in arguments]
            except OSError:
                continue  # it ended, or is another user's
        return found

    def look(self) -> None:
        """Note the shared memory that the run's processes hold at this moment."""
        for pid in self.processes():
            try:
                self._segments |= set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
            except OSError:
                continue

    def left(self, *places: Path, patience: float = 10.0) -> list[str]:
        """What is still there: processes (after `patience` seconds), segments, temporary files.

        `places` are directories, e.g. the run's, in which no unfinished file may lie.
        """
        deadline = time.monotonic() + patience
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = [f"process {pid}: {' '.join(line)[:200]}" for pid, line in
                     self.processes().items()]  # fmt: skip
        segments = [f"/dev/shm/{name}" for name in sorted(self._segments)
                    if (Path("/dev/shm") / name).exists()]  # fmt: skip
        unfinished = [str(path) for place in places for path in place.rglob("*.tmp")]
        return [*processes, *segments, *unfinished, *map(str, self._tmp.rglob("*"))]

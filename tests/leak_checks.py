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


class LeakCheck:
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
        """The living processes of the run and their command lines.

        Those with the mark and what descends from them: a process that gives itself a title (vLLM's
        do) writes it over its environment.
        """
        mark = f"{_MARK}={self._token}".encode()
        parents = {int(folder.name): _parent(folder) for folder in Path("/proc").glob("[0-9]*")}
        found = {pid for pid in parents if mark in _words(pid, "environ")}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        lines = {pid: _words(pid, "cmdline") for pid in sorted(found)}
        return {
            pid: [word.decode(errors="replace") for word in words]
            for pid, words in lines.items()
            if words != [b""]  # it has ended, and its parent has not looked yet
        }

    def look(self) -> None:
        """Note the shared memory that the run's processes hold at this moment."""
        for pid in self.processes():
            try:
                self._segments |= set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
            except OSError:
                continue

    def left(self, *places: Path, patience: float = 120.0) -> list[str]:
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


def _words(pid: int, file: str) -> list[bytes]:
    """A file of a process as words; nothing of one that ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0

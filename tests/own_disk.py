"""A disk of a test's own: a small tmpfs that only the test's commands see, in a mount namespace.

Real `ENOSPC` and `EROFS`, for root too, without touching the machine. Where the system does not let
an unprivileged process make one, the test is skipped.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" npd-test "$0" && echo ready && exec sleep 900'


class OwnDisk:
    """A tmpfs of `kib` KiB at `place` (made), as commands after `prefix` see it."""

    def __init__(self, place: Path, kib: int) -> None:
        self._place, self.kib = place, kib
        place.mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, place,
             f"{kib}k"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            pytest.skip("this system does not let a test mount a disk of its own")

    def __enter__(self) -> OwnDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the disk away with everything on it."""
        self._holder.kill()
        self._holder.wait()
        self._holder.stdout.close()

    @property
    def prefix(self) -> list[str]:
        """What to put before a command that is to see the disk."""
        target = f"--target={self._holder.pid}"
        return ["nsenter", "--preserve-credentials", "--user", "--mount", target]

    def view(self, path: Path) -> Path:
        """Where this process sees what the disk's commands see at `path`."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def resize(self, kib: int) -> None:
        """Make it larger or smaller."""
        self.kib = kib
        self.do("mount", "-o", f"remount,size={kib}k", str(self._place))

    def set_read_only(self, folder: Path) -> None:
        """Let nobody write in `folder` until `set_writable`."""
        self.do("mount", "--bind", str(folder), str(folder))
        self.do("mount", "-o", "remount,bind,ro", str(folder))

    def set_writable(self, folder: Path) -> None:
        """Undo `set_read_only`."""
        self.do("umount", str(folder))

    def do(self, *command: str) -> None:
        """Run a command that sees the disk."""
        subprocess.run([*self.prefix, *command], check=True)

"""A disk of a test's own, that only the test's commands see: in a mount namespace of its own.

Real `ENOSPC`, `EROFS` and `EIO`, for root too, without touching the machine. Where the system does
not let the test make one, it is skipped; with NPD_REQUIRE_DISKS=1 it fails.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

_EXT4_IOC_SHUTDOWN, _WITHOUT_LOG = 0x8004587D, 2


def _do_without(reason: str) -> NoReturn:
    assert os.environ.get("NPD_REQUIRE_DISKS") != "1", reason
    pytest.skip(reason)


class _Disk:
    """A file system mounted at `place` (made) for commands after `prefix`."""

    def __init__(self, place: Path, spaces: list[str], mount: str) -> None:
        self.place, self._spaces = place, spaces
        place.mkdir()
        # `cat` ends with its standard input, so with this process, however that ends.
        script = f"{mount} && echo ready && exec cat"
        as_root = ["--map-root-user"] if "--user" in spaces else []
        try:
            self._holder = subprocess.Popen(
                ["unshare", *as_root, *spaces, "sh", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            _do_without("this system has no unshare (util-linux)")
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            _do_without("this system does not let a test mount a disk of its own")

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the disk away with everything on it."""
        self._holder.kill()
        self._holder.wait()
        self._holder.stdin.close()
        self._holder.stdout.close()

    @property
    def prefix(self) -> list[str]:
        """What to put before a command that is to see the disk."""
        keep = ["--preserve-credentials"] if "--user" in self._spaces else []
        return ["nsenter", *keep, *self._spaces, f"--target={self._holder.pid}"]

    def view(self, path: Path) -> Path:
        """Where this process sees what the disk's commands see at `path` (but SQLite does not: it
        resolves what it opens)."""
        return Path("/proc", str(self._holder.pid), "root") / path.relative_to("/")

    def copied(self, into: Path) -> Path:
        """A copy of all that is on the disk, for this process."""
        return Path(shutil.copytree(self.view(self.place), into))

    def do(self, *command: str) -> None:
        """Run a command that sees the disk."""
        subprocess.run([*self.prefix, *command], check=True)


class SmallDisk(_Disk):
    """A tmpfs of `kib` KiB; needs no rights but a user namespace."""

    def __init__(self, place: Path, kib: int) -> None:
        self.kib = kib
        super().__init__(
            place, ["--user", "--mount"], f"mount -t tmpfs -o size={kib}k npd-test {place}"
        )

    def resize(self, kib: int) -> None:
        """Make it larger or smaller."""
        self.kib = kib
        self.do("mount", "-o", f"remount,size={kib}k", str(self.place))

    def set_read_only(self, folder: Path) -> None:
        """Let nobody write in `folder` until `set_writable`."""
        self.do("mount", "--bind", str(folder), str(folder))
        self.do("mount", "-o", "remount,bind,ro", str(folder))

    def set_writable(self, folder: Path) -> None:
        """Undo `set_read_only`."""
        self.do("umount", str(folder))


class DyingDisk(_Disk):
    """An ext4 in a file, which can lose its power: what was not flushed is gone. Needs root."""

    def __init__(self, place: Path, mib: int = 64) -> None:
        if os.geteuid() or shutil.which("mkfs.ext4") is None:
            _do_without("mounting a file as a disk needs root and mkfs.ext4")
        image = place.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(mib * 2**20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        self._again = ["mount", "-o", "loop", str(image), str(place)]
        command = f"{' '.join(self._again)} && rmdir {place}/lost+found"
        super().__init__(place, ["--mount"], command)

    def die(self) -> None:
        """From now on it answers every call with an error."""
        disk = os.open(self.view(self.place), os.O_RDONLY)
        try:
            fcntl.ioctl(disk, _EXT4_IOC_SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(disk)

    def revive(self) -> None:
        """Back in service, with what had reached it."""
        self.do("umount", str(self.place))
        self.do(*self._again)

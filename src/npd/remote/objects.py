"""Objects below one URL, in any store that fsspec supports: S3, a server, a mounted folder.

Promises: a failed operation is retried a few times, then raises one RunError that names the object
and the cause. An upload is checked for the size of its file. Uploads are not atomic: a killed
writer leaves a partial object (`npd.remote.sync` handles that). Keys and options come from fsspec's
own settings (`FSSPEC_S3_KEY` ..., the provider's files), never from a URL or a config.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from npd.errors import ConfigError, RunError
from npd.store.files import is_full

T = TypeVar("T")
# Pauses between tries, in seconds. An overloaded store recovers in seconds; a longer outage ends
# the run, which can be resumed.
PAUSES = (0.5, 2.0, 8.0)
# Errors that no retry can resolve, e.g. a missing bucket on write.
_FINAL = (PermissionError, NotImplementedError, FileNotFoundError)
_CAUSE_CHARS = 200


class ObjectStore:
    """The objects below `url`, with names like `rollouts/000012.arrow`. Thread-safe.

    Raises:
        ConfigError: fsspec does not support the URL, or a package for it is not installed.
    """

    def __init__(self, url: str, *, pauses: Sequence[float] = PAUSES) -> None:
        self.url, self._pauses = url.rstrip("/"), tuple(pauses)
        self._fs, self._base = _connect(self.url)

    def read(self, name: str) -> bytes | None:
        """A small object's content; None if it does not exist."""
        try:
            data = self._persist("read", name, lambda: self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None
        return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        """Write a small object; replaces an existing one."""
        self._persist("write", name, lambda: self._fs.pipe_file(self._to(name), data))

    def upload(self, path: Path, name: str) -> None:
        """Upload a file; replaces an existing object."""

        def put() -> None:
            self._fs.put_file(str(path), self._to(name))
            found, wanted = self._fs.info(self._at(name))["size"], path.stat().st_size
            if found != wanted:
                raise OSError(f"it has {found} of {wanted} bytes")

        self._persist("write", name, put)

    def download(self, name: str, path: Path) -> None:
        """Download an object to a file. Raises FileNotFoundError if it does not exist."""
        self._persist("read", name, lambda: self._fs.get_file(self._at(name), str(path)))

    def names(self, folder: str) -> list[str]:
        """The names directly in a folder; empty if it does not exist."""

        def look() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self._at(folder), detail=False))

        try:
            found = self._persist("list", folder, look)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with its content; a no-op if it does not exist."""

        def drop() -> None:
            self._fs.invalidate_cache()
            self._fs.rm(self._at(name), recursive=True)

        try:
            self._persist("remove", name, drop)
        except FileNotFoundError:
            return

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _to(self, name: str) -> str:
        """The path for writing `name`; its folder is created on file systems, buckets never are."""
        path = self._at(name)
        if path.startswith("/"):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _persist(self, doing: str, name: str, work: Callable[[], T]) -> T:
        """Run `work`, and repeat it after each pause while it fails."""
        for pause in (*self._pauses, None):
            try:
                return work()
            except Exception as error:  # each file system raises its own
                if isinstance(error, FileNotFoundError) and doing != "write":
                    raise
                if pause is None or isinstance(error, _FINAL) or is_full(error):
                    raise RunError(
                        f"cannot {doing} {self.url}/{name} ({one_line(error)}): check that the "
                        "store is up, has free space, and gives this machine access, then resume "
                        "the run"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")


def check_usable(url: str, *, pauses: Sequence[float] = PAUSES[:1]) -> None:
    """Write an object below `url`, read it back and remove it.

    Raises:
        ConfigError: one of these fails; names the cause.
    """
    remote = ObjectStore(url, pauses=pauses)
    name, word = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    try:
        remote.write(name, word)
        found = remote.read(name)
        remote.remove(name)
    except RunError as error:
        cause = error.__cause__ or error
        raise ConfigError(
            f"runtime.shared {url} cannot be used ({one_line(cause)}): correct the URL, or give "
            "this machine access to it"
        ) from error
    if found != word:
        raise ConfigError(
            f"runtime.shared {url} does not return the data written to it: choose another location"
        )


def one_line(error: BaseException) -> str:
    """An error on one line, for a message."""
    text = " ".join(str(error).split())[:_CAUSE_CHARS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, without caches, and the path in it."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fs, base = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"{url} needs a package: {_package(protocol) or error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{url} cannot be used ({one_line(error)}): give a URL that fsspec supports, like "
            "s3://bucket/folder"
        ) from error
    return fs, str(base).rstrip("/")


def _package(protocol: str) -> str:
    """The command that installs a protocol's package; empty if only fsspec's message names it."""
    from fsspec.registry import known_implementations

    module = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
    return "" if module in ("", "fsspec") else f"pip install {module}"

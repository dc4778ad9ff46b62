"""Objects below one URL, in any place fsspec reaches: an object store, a server, a mounted folder.

Promises: what fails for a moment is tried again, a few times; what fails for good is one RunError
that names the object and the cause; an upload has the size of its file. Does not make anything
whole or absent: a killed writer leaves a part (`npd.store.exchange` sees to that). Keys and options
are fsspec's own (`FSSPEC_S3_KEY` ..., the provider's files): they are on no URL and in no config.
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
# Stores that shed load recover in seconds; what takes longer is for a person, and `--resume`.
PAUSES = (0.5, 2.0, 8.0)
# What another try does not change; a folder or bucket that is not there, for one, when writing.
_FINAL = (PermissionError, NotImplementedError, FileNotFoundError)
_CAUSE_CHARS = 200


class Remote:
    """The objects below `url`, by names like `rollouts/000012.arrow`. For any number of threads.

    Raises:
        ConfigError: no such kind of URL, or its package is not installed.
    """

    def __init__(self, url: str, *, pauses: Sequence[float] = PAUSES) -> None:
        self.url, self._pauses = url.rstrip("/"), tuple(pauses)
        self._fs, self._base = _connect(self.url)

    def read(self, name: str) -> bytes | None:
        """A small object's content; None where there is none."""
        try:
            data = self._persist("read", name, lambda: self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None
        return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        """Put a small object, in place of one that is there."""
        self._persist("write", name, lambda: self._fs.pipe_file(self._to(name), data))

    def upload(self, path: Path, name: str) -> None:
        """Put a file, in place of an object that is there."""

        def put() -> None:
            self._fs.put_file(str(path), self._to(name))
            found, wanted = self._fs.info(self._at(name))["size"], path.stat().st_size
            if found != wanted:
                raise OSError(f"it holds {found} of {wanted} bytes")

        self._persist("write", name, put)

    def download(self, name: str, path: Path) -> None:
        """Fetch an object into a file of ours. Raises FileNotFoundError where there is none."""
        self._persist("read", name, lambda: self._fs.get_file(self._at(name), str(path)))

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, by its own name; nothing where there is none."""

        def look() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self._at(folder), detail=False))

        try:
            found = self._persist("list", folder, look)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})

    def remove(self, name: str) -> None:
        """Remove an object, or a folder with all that is in it; nothing there is fine."""

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
        """Where to write `name`; in file systems, with its folder made. Buckets are never made."""
        path = self._at(name)
        if path.startswith("/"):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _persist(self, doing: str, name: str, work: Callable[[], T]) -> T:
        """`work`, and again after each pause while it fails."""
        for pause in (*self._pauses, None):
            try:
                return work()
            except Exception as error:  # each file system has errors of its own
                if isinstance(error, FileNotFoundError) and doing != "write":
                    raise
                if pause is None or isinstance(error, _FINAL) or is_full(error):
                    raise RunError(
                        f"cannot {doing} {self.url}/{name} ({one_line(error)}): see that the store "
                        "is up, has room, and lets this machine in, then resume the run"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")


def check_usable(url: str, *, pauses: Sequence[float] = PAUSES[:1]) -> None:
    """Write an object below `url`, read it back and remove it.

    Raises:
        ConfigError: that cannot be done, with the cause.
    """
    remote = Remote(url, pauses=pauses)
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
            f"runtime.shared {url} does not give back what is written to it: choose another place"
        )


def one_line(error: BaseException) -> str:
    """An error as part of one of our lines."""
    text = " ".join(str(error).split())[:_CAUSE_CHARS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, with nothing of it cached, and the URL's path there."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fs, base = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"{url} needs a package: {_package(protocol) or error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{url} cannot be used ({one_line(error)}): give a URL that fsspec knows, like "
            "s3://bucket/folder"
        ) from error
    return fs, str(base).rstrip("/")


def _package(protocol: str) -> str:
    """How to install what a protocol needs; empty where only fsspec's own words tell."""
    from fsspec.registry import known_implementations

    module = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
    return "" if module in ("", "fsspec") else f"pip install {module}"

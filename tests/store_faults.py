"""A file system for fsspec, `faulty://`, that fails, cuts and is slow as the environment says.

Worker processes find it by its entry point, which `install` writes where they look for packages.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

FAULTS = "NPD_TEST_FAULTS"


class FaultyFileSystem(LocalFileSystem):
    """Local files. `$NPD_TEST_FAULTS`: JSON of `fail_every`, `cut_every` (th operation), `seconds`
    that each takes, `dead` (a path; while it exists everything fails) and `calls` (a log of all),
    `is_closed` (nothing may be written).
    """

    protocol = "faulty"

    def __init__(self, **options):
        super().__init__(**options)
        self.count = 0

    def _begin(self, what: str, path: str) -> bool:
        """Fail if it is time to; whether to cut what is copied."""
        faults = json.loads(os.environ.get(FAULTS, "{}"))
        self.count += 1
        time.sleep(faults.get("seconds", 0))
        if "calls" in faults:
            with Path(faults["calls"]).open("a") as log:
                log.write(f"{what} {path}\n")
        if "dead" in faults and Path(faults["dead"]).exists():
            raise ConnectionError("the store is down")
        if faults.get("is_closed") and what in ("put", "write", "remove"):
            raise PermissionError("read only")
        if "fail_every" in faults and self.count % faults["fail_every"] == 0:
            raise TimeoutError("slow down")
        return "cut_every" in faults and self.count % faults["cut_every"] == 0

    def put_file(self, path1, path2, callback=None, **kwargs):
        self._copy("put", path1, path2)

    def get_file(self, path1, path2, callback=None, **kwargs):
        self._copy("get", path1, path2)

    def _copy(self, what, path1, path2):
        is_cut = self._begin(what, path2 if what == "put" else path1)
        source, into = (self._strip_protocol(path) for path in (path1, path2))
        shutil.copyfile(source, into)
        if is_cut:
            os.truncate(into, os.path.getsize(into) // 2)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._begin("read", path)
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._begin("write", path)
        super().pipe_file(path, value, mode, **kwargs)

    def info(self, path, **kwargs):
        if isinstance(path, str):
            self._begin("size", path)
        return super().info(path, **kwargs)

    def rm(self, path, recursive=False, maxdepth=None):
        self._begin("remove", path)
        super().rm(path, recursive, maxdepth)


def install(folder: Path) -> Path:
    """Make `faulty://` known here, and to processes that have the folder returned on their path."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    spec = "[fsspec.specs]\nfaulty = store_faults:FaultyFileSystem\n"
    (info / "entry_points.txt").write_text(spec)
    return folder

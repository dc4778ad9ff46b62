"""Which settings of a run that exchanges files by a URL cannot work: (is it so, what to do)."""

from __future__ import annotations

import re

from npd.config.values import RunValues


def sharing_problems(c: RunValues) -> list[tuple[bool, str]]:
    """What cannot be about `runtime.shared` and `runtime.scratch`."""
    url, scratch = c.runtime.shared or "", c.runtime.scratch
    told = re.sub(r"//[^/]*@", "//***@", url)
    return [
        (
            bool(url) and ("::" in url or re.fullmatch(r"[\w+.-]+://.+", url) is None),
            f"runtime.shared ({told}) must be a URL like s3://bucket/folder: a folder that all "
            "machines see needs none, only run_dir in it",
        ),
        (
            re.match(r"[^/]*//[^/]*:[^/]*@", url) is not None,
            f"runtime.shared ({told}) holds a password, which config.json would show: leave it to "
            "the provider's files or fsspec's (FSSPEC_<PROTOCOL>_PASSWORD)",
        ),
        (
            not url and scratch is not None,
            "runtime.scratch is for copies of what lies at runtime.shared: set that, or leave it "
            "out",
        ),
        (
            bool(url and c.generate.urls) and scratch is None and c.generate.source == "student",
            "the servers of generate.urls load snapshots from their worker's copies: set "
            "runtime.scratch to a folder that they see at the same path",
        ),
    ]

"""Checks whether a file can be read, or created, at a path that a user gave.

Promises: nothing is opened or created, so a pipe or a device cannot block. Each check returns a
phrase for the caller's message. Does not know what a path is for.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from npd.text import shown, shown_path

# The most bytes that file systems allow in a name, and in a path.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
_DATA_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSIONS = (".gz", ".zst")


def is_data_file(source: str) -> bool:
    """Whether a source of prompts is a file, by its extension; only hub datasets have splits.

    >>> is_data_file("prompts.jsonl"), is_data_file("openai/gsm8k")
    (True, False)
    """
    return bool(data_kind(source)[0])


def data_kind(source: str) -> tuple[str, str]:
    """The format and the compression of a data file, by its extensions; empty if it has none.

    >>> data_kind("a/prompts.JSONL.gz"), data_kind("openai/gsm8k")
    (('.jsonl', '.gz'), ('', ''))
    """
    name = source.lower()
    compression = next((end for end in _COMPRESSIONS if name.endswith(end)), "")
    name = name.removesuffix(compression)
    kind = next((end for end in _DATA_KINDS if name.endswith(end)), "")
    return (kind, compression) if kind else ("", "")


def expanded(text: str) -> str:
    """`text` with a leading `~` or `~user` expanded.

    Raises:
        ValueError: it cannot be a path: empty, control characters, too long, or unknown user.
    """
    if (why := why_no_path(text)) is not None:
        raise ValueError(why)
    return os.path.expanduser(text)


def why_no_path(text: str) -> str | None:
    """Why `text` cannot be a path; None if it can.

    >>> why_no_path("a\\0b")
    'contains a control character'
    """
    if not text.strip():
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        return "contains a control character"
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        return f"names an unknown user ({shown(text.partition('/')[0], 40)})"
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        return None  # not UTF-8: undecoded bytes of a name in the file system
    sizes = [len(part.encode()) for part in text.split("/")]
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) > _LONGEST_PATH:
        return f"is too long for a path (at most {_LONGEST_NAME} bytes per name)"
    return None


def why_unreadable(path: Path) -> str | None:
    """Why no file can be read at `path`; None if one can."""
    if (why := why_no_path(str(path))) is not None:
        return why
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "is a directory"
    if not stat.S_ISREG(mode):
        return "is a pipe or a device, not a file"
    return None if os.access(path, os.R_OK) else "cannot be read (permission denied)"


def why_unmakeable(path: Path) -> str | None:
    """Why nothing can be created at `path` and its missing parents; None if it can."""
    if (why := why_no_path(str(path))) is not None:
        return why
    # `new/../old` becomes `old` once `new` exists.
    if os.path.lexists(path) or os.path.lexists(os.path.normpath(path)):
        return "already exists"
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        return f"cannot be created, as {shown_path(above)} is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"cannot be created, as {shown_path(above)} is not writable"
    return None

"""Safe output to a terminal: control characters escaped, secrets masked, closed streams tolerated.

Text from a server, a file or a model cannot move the cursor of a terminal, colour it, retitle it or
reorder its text, and no secret is printed (`npd.redaction`). A standard stream that cannot be
written (a closed pipe, a full disk) does not end the program.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from npd.redaction import mask

# Controls except tab and line feed, surrogates, other line ends, bidirectional and invisible
# characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""`text` with characters that act on a terminal escaped.

    >>> printable("\x1b[2J done")
    '\\x1b[2J done'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def safe_text(text: str) -> str:
    """`text`, printable and with secrets masked."""
    return printable(mask(text))


def say(line: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(f"{safe_text(line)}\n")


def say_json(value: Any) -> None:
    """Print a value as JSON; each string in it is made safe, so the JSON stays valid."""
    sys.stdout.write(f"{json.dumps(_safe_leaves(value), indent=2)}\n")


def _safe_leaves(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _safe_leaves(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_safe_leaves(inner) for inner in value]
    return safe_text(value) if isinstance(value, str) else value


class LineFormatter(logging.Formatter):
    """Formats log records as safe text, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as safe text."""
        return safe_text(super().format(record))


class Stream:
    """A text stream that ignores write errors; `error` is the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, escaping characters that the encoding lacks; returns its length."""
        try:
            text.encode(self._stream.encoding or "utf-8")
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush buffered text."""
        self._attempt(self._stream.flush)

    def release(self) -> None:
        """Flush, and discard unwritable text, so that the interpreter exits cleanly."""
        self.flush()
        if self.error is not None:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except OSError as error:
            self.error = error


@contextmanager
def lenient_streams() -> Iterator[Stream]:
    """Make standard output and error tolerate write errors; yields standard output."""
    _open_standard_files()
    before = sys.stdout, sys.stderr
    out, err = (Stream(stream or _nowhere()) for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        out.release()
        err.release()


def is_reader_gone(error: OSError) -> bool:
    """Whether the stream's reader has exited (`| head`), which is not a failure."""
    return error.errno == errno.EPIPE


def _open_standard_files() -> None:
    """Reopen closed standard files (`>&-`); else the next opened file would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")

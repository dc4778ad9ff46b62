"""The header of a GGUF file, checked before a library reads it: whole, consistent, and bounded.

Libraries trust the counts and lengths in a file. A truncated or crafted file makes them fail with
any error, or use unbounded time and memory. Reads no weights.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from npd.errors import ModelError

_STRING, _ARRAY = 8, 9
# Of each kind of value: how `struct` reads it.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_MAX_FIELDS, _MAX_TENSORS, _MAX_STRINGS, _MAX_DIMENSIONS = 2**16, 2**20, 2**24, 8
# The last part of a field's name -> its largest value. Only what is not every model's may be 0.
_SIZES = {"block_count": 10_000, "embedding_length": 2**22, "vocab_size": 2**26}
_SIZES |= {"feed_forward_length": 2**24, "context_length": 2**31, "attention.head_count": 2**22}
_MAY_BE_NONE = ("feed_forward_length", "attention.head_count")
_ALIGNMENT = "general.alignment"


class _BadHeaderError(Exception):
    """What is wrong with a file."""


def check_gguf(path: Path) -> None:
    """Check that a GGUF file holds all that its header says.

    Raises:
        ModelError: it does not, or is no GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Cursor(data), len(data))
    except (_BadHeaderError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{str(path)!r} cannot be read ({error}): copy it again, whole") from error


def _check(cursor: _Cursor, size: int) -> None:
    if cursor.take(4) != b"GGUF":
        raise _BadHeaderError("it is no GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise _BadHeaderError(f"it has version {version}, and 2 and 3 are known")
    num_tensors = cursor.count(_MAX_TENSORS, "tensors")
    num_fields = cursor.count(_MAX_FIELDS, "fields")
    alignment = 32
    for _ in range(num_fields):
        name, value = cursor.text(), cursor.value(cursor.number("I"))
        _check_size(name, value)
        if name == _ALIGNMENT and isinstance(value, int):
            alignment = max(1, value)
    ends = [_end_of(cursor) for _ in range(num_tensors)]
    start = -(-cursor.at // alignment) * alignment
    if start + max(ends, default=0) > size:
        missing = start + max(ends) - size
        raise _BadHeaderError(f"it is cut short: {missing:,} bytes of its weights are missing")


def _check_size(name: str, value: object) -> None:
    _, _, key = name.partition(".")
    most = _SIZES.get(key)
    least = 0 if key in _MAY_BE_NONE else 1
    if most is not None and isinstance(value, int) and not least <= value <= most:
        raise _BadHeaderError(f"it says {name} is {value:,}")


def _end_of(cursor: _Cursor) -> int:
    """Where a tensor's numbers end, from the start of all."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise _BadHeaderError(f"its tensor {name} has {dimensions:,} dimensions")
    numel = math.prod(cursor.number("Q") for _ in range(dimensions))
    kind, offset = cursor.number("I"), cursor.number("Q")
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(offset + -(-numel // block) * num_bytes)


class _Cursor:
    """A place in the file, which moves on with what is read; never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def take(self, length: int) -> bytes:
        """The next bytes."""
        start = self._skip(length)
        return self._data[start : self.at]

    def number(self, kind: str) -> int:
        """The next number; `kind` as in `struct`."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0])

    def count(self, most: int, what: str) -> int:
        """The next number, which says how many there are of `what`."""
        found = self.number("Q")
        if found > most:
            raise _BadHeaderError(f"it says it has {found:,} {what}")
        return found

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> int | None:
        """Pass over the next value of a field; what it is, where it is a whole number."""
        if kind == _STRING:
            self._skip(self.number("Q"))
        elif kind == _ARRAY:
            self._pass_array()
        elif kind not in _NUMBERS:
            raise _BadHeaderError(f"it has a value of an unknown kind ({kind})")
        elif _NUMBERS[kind] in "fd":
            self._skip(struct.calcsize(_NUMBERS[kind]))
        else:
            return self.number(_NUMBERS[kind])
        return None

    def _pass_array(self) -> None:
        kind = self.number("I")
        if kind in _NUMBERS:
            self._skip(self.number("Q") * struct.calcsize(_NUMBERS[kind]))
            return
        if kind != _STRING:
            raise _BadHeaderError("it has lists of lists")
        for _ in range(self.count(_MAX_STRINGS, "texts in a list")):
            self._skip(self.number("Q"))

    def _skip(self, length: int) -> int:
        start, end = self.at, self.at + length
        if end > len(self._data):
            raise _BadHeaderError("it is cut short: its header does not end")
        self.at = end
        return start

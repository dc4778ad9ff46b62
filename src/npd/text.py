"""Numbers and user input in messages: `1 step`, `2 steps`, `'a long na…me'`."""

from __future__ import annotations

from npd.redaction import mask

# Real paths and the names in them are shorter; what is longer would bury the message.
_LONGEST_PATH, _LONGEST_NAME = 500, 255


def counted(count: int, noun: str) -> str:
    """A count with its noun in the right number.

    >>> counted(1, "step"), counted(1200, "held-out prompt")
    ('1 step', '1,200 held-out prompts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty.

    >>> first_line(ValueError("bad shape\\nat line 3")), first_line(ValueError())
    ('bad shape', 'ValueError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(text: object, most: int = 80) -> str:
    """User input for a message: quoted, on one line, control characters escaped, its middle cut.

    >>> shown("runs/a"), shown("a\\nb"), shown("x" * 100, most=11)
    ('runs/a', 'a\\\\nb', 'xxxxx…xxxxx')
    """
    text = mask(str(text))  # before cutting: half a secret would not be recognised
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: 4 * most])
    tail = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[-most:])
    if len(plain) <= most and len(text) <= 4 * most:
        return plain
    half = most // 2
    return f"{plain[:half]}…{tail[-half:]}"


def shown_path(path: object) -> str:
    """A path for a message: as `shown`, but whole if it can be one, so that it can be opened."""
    is_path = all(len(name) <= _LONGEST_NAME for name in str(path).split("/"))
    return shown(path, most=_LONGEST_PATH) if is_path else shown(path)

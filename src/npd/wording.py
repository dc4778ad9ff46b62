"""How numbers are put into words: one step, two steps."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A count with its noun in the right number.

    >>> counted(1, "step"), counted(1200, "held-out prompt")
    ('1 step', '1,200 held-out prompts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

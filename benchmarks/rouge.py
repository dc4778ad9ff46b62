"""ROUGE-L (Lin, 2004): how much of two texts is the same words in the same order.

Words are runs of letters and digits, in lower case; no stemming. F1 of precision and recall, as
most report it (beta = 1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words that are compared.

    >>> words("It's 3.5 km.")
    ['it', 's', '3', '5', 'km']
    """
    return _WORD.findall(text.lower())


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    >>> common_length("abcd", "axcd")
    3
    """
    row = [0] * (len(b) + 1)
    for item in a:
        diagonal = 0
        for i, other in enumerate(b, 1):
            diagonal, row[i] = row[i], diagonal + 1 if item == other else max(row[i], row[i - 1])
    return row[-1]


def rouge_l(text: str, reference: str) -> float:
    """F1 of `text` against `reference`, 0 to 1; two texts without words are the same, 1."""
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common_length(ours, theirs) / (len(ours) + len(theirs))

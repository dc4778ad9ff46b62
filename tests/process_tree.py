"""What Linux says of a process's children; elsewhere none are seen."""

from __future__ import annotations

import os


def children(pid: int | str) -> set[str]:
    """Process ids of a process's children, all that there are although its threads come and go.

    A thread that ends leaves its children to another, which may have been read already: where one
    ended meanwhile all are read anew.
    """
    found: set[str] = set()
    is_whole = False
    while not is_whole:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except (FileNotFoundError, NotADirectoryError):
            return set()
        read = [_of_thread(f"/proc/{pid}/task/{thread}/children") for thread in threads]
        is_whole = None not in read
        found = {child for own in read for child in own or ()}
    return found


def _of_thread(path: str) -> list[str] | None:
    """Those that a thread started or was left; None if it has ended."""
    try:
        with open(path) as file:
            return file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return None

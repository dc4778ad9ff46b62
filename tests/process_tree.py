"""What Linux says of a process's children; elsewhere none are seen."""

from __future__ import annotations

from pathlib import Path


def children(pid: int | str) -> set[str]:
    """Process ids of a process's children, all that there are although its threads come and go.

    A thread that ends between being listed and being read leaves its children to another one:
    they are read anew.
    """
    while True:
        found = Path(f"/proc/{pid}/task").glob("*/children")
        try:
            return {child for file in found for child in file.read_text().split()}
        except OSError:
            if not Path(f"/proc/{pid}").exists():
                return set()

"""The proof that a server holds the weights it should, by the checksums of its tensors.

Promises: a tensor that is the old snapshot's, or no longer agrees where it did, is found. Says
nothing of tensors that the engine keeps in another shape than the file. Changes nothing on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from npd.servers.proof import StaleWeights


class Checksums:
    """Compares a server's checksums with those of snapshots, over the refreshes of one server.

    Engines fuse, pad and re-lay tensors, so that a digest that differs says nothing by itself. One
    that once agreed must agree again, and one that equals the old snapshot's is stale.
    """

    def __init__(self) -> None:
        self._comparable: set[str] = set()
        self._old: dict[str, str] = {}

    def check(
        self, name: str, what: str, found: Mapping[str, str], directory: Path
    ) -> tuple[int, int]:
        """How many tensors agree with the snapshot in `directory`, and how many of them are new.

        Raises:
            StaleWeights: a tensor is the old snapshot's, or no longer agrees.
        """
        if not found:
            return 0, 0
        new = tensor_digests(directory, found)
        changed = {key for key, digest in new.items() if digest != self._old.get(key, digest)}
        stale = sorted(key for key in changed if found[key] == self._old[key])
        lost = sorted(key for key in self._comparable & set(new) if found[key] != new[key])
        if stale or lost:
            key = (stale or lost)[0]
            raise StaleWeights(
                f"{name} does not hold {what}: by checksum {key} is "
                f"{'that of the snapshot before' if stale else 'not the one of the snapshot'} "
                f"({len(stale or lost)} such tensors). Its reload did not take: update the server, "
                "or restart it with the snapshot as its model"
            )
        same = {key for key, digest in new.items() if found[key] == digest}
        self._comparable, self._old = same, new
        return len(same), len(same & changed)


def tensor_digests(directory: Path, names: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of those tensors of a model directory that are in `names`, by name."""
    import torch
    from safetensors import safe_open

    digests: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in set(tensors.keys()) & set(names):
                raw = tensors.get_tensor(key).contiguous().view(-1).view(torch.uint8).numpy()
                digests[key] = hashlib.sha256(raw.tobytes()).hexdigest()
    return digests

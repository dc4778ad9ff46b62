"""The proof that a server holds the weights it should, by probes; see `checksums` for the other.

Promises: a server left on old weights, or on a mixture of old and new (an LM head that a reload
forgot), is found as soon as its log-probs can tell; rounding of another engine is not. What could
not be told is in the `Evidence`, not silently taken for a proof. Changes nothing on the server.

The probe's reasoning. With n the log-probs of the snapshot, o those of the one before, s the
server's, on the same tokens: s = n + noise where the load worked, s = o + noise where nothing was
loaded, something between where part was. So `staleness` = <s - n, o - n> / |o - n|^2 is 0, 1, or
between, and its standard error follows from what is left of s - n. A mean over some 250 tokens sees
a change a third the size of the noise on one token. n and o are exact (float32): noise of theirs
would pass for staleness. Where the change is smaller still, a load that did nothing is seen by
answers that are those of before to the last digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from npd.errors import RunError
from npd.probe import Probe
from npd.servers.base import EngineServer

# Staleness that counts, and how sure it must be: one false alarm in 30,000 refreshes by chance.
_STALE, _SIGMAS = 0.2, 4.0
# A change of weights that moves log-probs by less than this (nats) may be lost in bfloat16.
_LEAST_CHANGE = 1e-3


class StaleWeights(RunError):
    """A server does not hold the weights it was given."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a proof found: mean |s - n| in nats a token; staleness and its standard error (None: no
    older snapshot to tell from); tensors whose checksums agree, and those of them that changed."""

    difference: float
    staleness: float | None = None
    error: float | None = None
    num_tensors: int = 0
    num_changed: int = 0

    @property
    def can_tell(self) -> bool:
        """Whether old weights would have been seen."""
        return self.error is not None and self.error * _SIGMAS < 1.0

    def __str__(self) -> str:
        parts = [f"log-probs within {self.difference:.4f} nats/token of the snapshot's"]
        if self.staleness is not None:
            parts.append(f"staleness {self.staleness:.2f} ± {self.error:.2f}")
            if not self.can_tell:
                parts[-1] = "too like the snapshot before it to tell a part of that from rounding"
        if self.num_tensors:
            new = f", {self.num_changed} of them new" if self.num_changed else ""
            parts.append(f"{self.num_tensors} tensors equal by checksum{new}")
        return ", ".join(parts)


async def read_probe(server: EngineServer, probe: Probe, *, model: str | None = None) -> Probe:
    """The server's own log-probs on the sequences of `probe`."""
    # In turn: vLLM 0.32 with --enable-lora dies of log-probs of several prompts in one batch.
    found = [await server.read(ids.tolist(), 0, model=model) for ids in probe.sequences]
    return Probe(probe.sequences, tuple(item.logprobs for item in found))


def judge(
    name: str,
    what: str,
    found: Probe,
    new: Probe,
    old: Probe | None,
    tolerance: float,
    before: Probe | None = None,
) -> Evidence:
    """The evidence of a server's probe; `name` and `what` (it should hold) are for the message.

    `before` is what the server itself said while it held the snapshot of `old`.

    Raises:
        StaleWeights: these are not the weights of `new`.
    """
    off = found.flat.astype(np.float64) - new.flat
    difference = float(np.abs(off).mean())
    if not difference <= tolerance:  # NaN too
        raise StaleWeights(
            f"{name} does not hold {what}: its log-probs on fixed texts differ from the snapshot's "
            f"by {difference:.3f} nats a token (at most {tolerance:g}). It holds other weights, or "
            "computes at another precision: then raise generate.probe_tolerance"
        )
    if old is None or _sequences_differ(old, new):
        return Evidence(difference)
    change = old.flat.astype(np.float64) - new.flat
    size = float(change @ change)
    if size == 0.0:
        return Evidence(difference)
    is_changed = math.sqrt(size / len(change)) > _LEAST_CHANGE
    if is_changed and before is not None and np.array_equal(found.flat, before.flat):
        raise StaleWeights(
            f"{name} does not hold {what} but still holds the snapshot before it: on fixed texts "
            "its log-probs are the same as then to the last digit. Its reload did not take: update "
            "the server, or restart it with the snapshot as its model"
        )
    staleness = float(off @ change) / size
    left = off - staleness * change
    error = math.sqrt(float(left @ left) / max(1, len(left) - 1) / size)
    if staleness > max(_STALE, _SIGMAS * error):
        share = "still holds the snapshot before it" if staleness > 0.8 else "holds it only in part"
        raise StaleWeights(
            f"{name} does not hold {what} but {share}: on fixed texts its log-probs are "
            f"{staleness:.0%} (± {error:.0%}) of the way back to the old ones. Its reload did not "
            "take: update the server, or restart it with the snapshot as its model"
        )
    return Evidence(difference, staleness, error)


def _sequences_differ(one: Probe, other: Probe) -> bool:
    pairs = zip(one.sequences, other.sequences, strict=False)
    same = len(one.sequences) == len(other.sequences)
    return not (same and all(np.array_equal(ids, others) for ids, others in pairs))

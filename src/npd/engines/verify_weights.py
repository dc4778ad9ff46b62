"""Verifies the weights of a server by its log-probs on fixed texts (the fingerprint).

Promises: old weights are detected if they move the log-probs by more than rounding. A mixture of
old and new weights (e.g. an old LM head after a partial reload) is detected if it moves the
log-probs a fifth of the way back, or by the tolerance on average; a smaller part is not. Rounding
by another engine raises no alarm. The `Verification` says whether old weights would have been
detected. Changes no server.

Let n, o and s be the log-probs of the snapshot, of an earlier snapshot and of the server, on the
same tokens. Then s = n + noise after a complete load, and s = o + noise after a load without
effect; a partial load lies between the two. Hence the share of old weights,
<s - n, o - n> / |o - n|^2, is 0, 1, or between them. Its standard error follows from the residual
of s - n. A mean over some 250 tokens detects a change a third the size of the noise on one token.
n and o are computed in float32, because their noise would look like old weights. For smaller
changes, a load without effect is detected by log-probs that are identical before and after it.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from npd.engines.base import EngineServer, SamplingSettings
from npd.errors import ConfigError, RunError
from npd.models import fingerprint
from npd.models.fingerprint import Fingerprint

DoubleArray: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# The least share that is an error, and its significance in standard errors, which allows one
# false alarm in 30,000 refreshes.
_MAX_OLD_SHARE, _SIGMAS = 0.2, 4.0
# A change of weights that moves log-probs by less than this (nats) may be lost in bfloat16.
_LEAST_CHANGE = 1e-3
# Prompt tokens and generated tokens of the request of `check_untempered`.
_PROMPT, _GENERATED = 16, 16


_RELOAD_REMEDY = "update the server's engine, or restart it with the snapshot as its model"


class WrongWeights(RunError):
    """A server does not serve the weights that were loaded into it."""


@dataclass(frozen=True, slots=True)
class ServedSnapshot:
    """A snapshot to be served: its directory, its version, and the tag that servers report.

    `adapter` is the name of a LoRA snapshot on the server, or None for full weights. `fingerprint`
    is None for a model that is not verified (a teacher).
    """

    path: Path
    version: int
    tag: str
    adapter: str | None
    fingerprint: Fingerprint | None


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing a server with its snapshot.

    `difference` is the mean |s - n| in nats per token. `old_share`, the share of old weights, and
    its standard error `error` are None if there is no earlier snapshot. `reading` is the server's
    own log-probs, for comparison after the next load.
    """

    difference: float
    old_share: float | None = None
    error: float | None = None
    reading: Fingerprint | None = field(default=None, repr=False, compare=False)

    @property
    def can_tell(self) -> bool:
        """Whether old weights would have been detected, as surely as good ones raise no alarm.

        Their share is 1, and is measured below the threshold only if it is off by `_SIGMAS` too.
        """
        return self.error is not None and 2 * _SIGMAS * self.error < 1.0

    def __str__(self) -> str:
        within = f"log-probs within {self.difference:.4f} nats/token of the snapshot's"
        if self.old_share is None:
            return within
        if not self.can_tell:
            return f"{within}, too close to the previous snapshot to detect a partial update"
        return f"{within}, share of old weights {self.old_share:.2f} ± {self.error:.2f}"


async def read_fingerprint(
    server: EngineServer, fingerprint: Fingerprint, *, model: str | None = None
) -> Fingerprint:
    """The server's log-probs on the sequences of `fingerprint`; `model` names an adapter."""
    # One at a time: vLLM 0.32 with --enable-lora crashes on prompt log-probs of a larger batch.
    found = [await server.read(ids.tolist(), 0, model=model) for ids in fingerprint.sequences]
    return Fingerprint(fingerprint.sequences, tuple(item.logprobs for item in found))


def verify(
    name: str,
    what: str,
    found: Fingerprint,
    new: Fingerprint,
    old: Fingerprint | None,
    tolerance: float,
    before: Fingerprint | None = None,
) -> Verification:
    """Verify a server's reading `found` against the fingerprint `new` of its snapshot.

    `name` is the server and `what` the snapshot, for messages. `old` is the fingerprint of an
    earlier snapshot, and `before` the server's reading when it served that snapshot. `tolerance` is
    in nats per token.

    Raises:
        WrongWeights: the server does not serve `what`.
    """
    noise = found.flat.astype(np.float64) - new.flat
    difference = float(np.abs(noise).mean())
    if not difference <= tolerance:  # NaN too
        raise WrongWeights(
            f"{name} does not serve {what}: its log-probs on fixed texts differ from the expected "
            f"ones by {difference:.3f} nats per token (at most {tolerance:g}). Load the right "
            "weights, or raise generate.probe_tolerance if only its precision differs"
        )
    if old is None or _sequences_differ(old, new):
        return Verification(difference, reading=found)
    change = old.flat.astype(np.float64) - new.flat
    if not change.any():
        return Verification(difference, reading=found)
    if before is not None:
        _check_answers_changed(name, what, found, before, change)
    old_share, error = _old_share(noise, change)
    if old_share > max(_MAX_OLD_SHARE, _SIGMAS * error):
        share = "an earlier snapshot" if old_share > 0.8 else "only a part of it"
        raise WrongWeights(
            f"{name} does not serve {what} but {share}: on fixed texts its log-probs are "
            f"{old_share:.0%} (± {error:.0%}) of the way back to the earlier ones. Its reload "
            f"failed: {_RELOAD_REMEDY}"
        )
    return Verification(difference, old_share, error, found)


def _check_answers_changed(
    name: str, what: str, found: Fingerprint, before: Fingerprint, change: DoubleArray
) -> None:
    """Raise WrongWeights if `found` equals `before` although `change` is visible."""
    is_visible = math.sqrt(float(change @ change) / len(change)) > _LEAST_CHANGE
    if is_visible and np.array_equal(found.flat, before.flat):
        raise WrongWeights(
            f"{name} does not serve {what} but an earlier snapshot: on fixed texts its log-probs "
            f"are identical to those before the reload. Its reload failed: {_RELOAD_REMEDY}"
        )


def _old_share(noise: DoubleArray, change: DoubleArray) -> tuple[float, float]:
    """The share of `change` [N] in `noise` [N] (0: none, 1: all), and its standard error."""
    size = float(change @ change)
    old_share = float(noise @ change) / size
    residual = noise - old_share * change
    return old_share, math.sqrt(float(residual @ residual) / max(1, len(residual) - 1) / size)


def _sequences_differ(one: Fingerprint, other: Fingerprint) -> bool:
    pairs = zip(one.sequences, other.sequences, strict=False)
    same = len(one.sequences) == len(other.sequences)
    return not (same and all(np.array_equal(ids, others) for ids, others in pairs))


class WeightVerifier:
    """Verifies the servers of one generator against the snapshots of a run.

    A server is compared with every earlier snapshot. Fingerprints (a few KiB each) are stored in
    `directory` for restarted workers, or in memory only if it is None.
    """

    def __init__(self, tolerance: float, directory: Path | None) -> None:
        self._tolerance, self._directory = tolerance, directory
        self._fingerprints: dict[int, Fingerprint] = {}

    async def measure(self, path: Path, version: int, trust_remote_code: bool) -> Fingerprint:
        """Compute the fingerprint of a snapshot from its files, and store it."""
        # In a thread: it takes seconds, and the event loop must keep receiving responses.
        work = partial(fingerprint.of_directory, path, trust_remote_code)
        found = await asyncio.to_thread(work)
        if not self._fingerprints:
            self._fingerprints = self._stored()
        self._fingerprints[version] = found
        if self._directory is not None:
            fingerprint.write(found, self._directory / f"v{version:06d}")
        return found

    async def verify(
        self, server: EngineServer, snapshot: ServedSnapshot, before: Fingerprint | None = None
    ) -> Verification:
        """Compare a server with `snapshot` and with every earlier one.

        `before` is the server's reading when it served an earlier snapshot, if known. The result
        refers to the newest earlier snapshot.

        Raises:
            WrongWeights: the server does not serve `snapshot`.
        """
        new = snapshot.fingerprint
        assert new is not None, "a teacher is served without verification"
        found = await read_fingerprint(server, new, model=snapshot.adapter)
        check = partial(verify, server.name, f"snapshot v{snapshot.version}", found, new)
        verification = check(None, self._tolerance)
        for version in sorted(v for v in self._fingerprints if v != snapshot.version):
            verification = check(self._fingerprints[version], self._tolerance, before)
        return verification

    def _stored(self) -> dict[int, Fingerprint]:
        """The fingerprints in the directory, from earlier processes of this worker, by version."""
        if self._directory is None:
            return {}
        found = {
            int(path.name[1:]): fingerprint.read(path) for path in self._directory.glob("v[0-9]*")
        }
        return {version: stored for version, stored in found.items() if stored is not None}


async def check_untempered(
    server: EngineServer, snapshot: ServedSnapshot, sampling: SamplingSettings, tolerance: float
) -> None:
    """Raise ConfigError if a server reports log-probs after temperature and top-p.

    Compares the log-probs of a short generated response with its prompt log-probs. Sends no request
    if the sampling changes nothing (temperature 1 and top_p 1) or is greedy.
    """
    is_plain = sampling.temperature in (0.0, 1.0) and sampling.top_p == 1.0
    if snapshot.fingerprint is None or is_plain:
        return
    prompt = snapshot.fingerprint.sequences[0][:_PROMPT].tolist()
    short = replace(sampling, max_new_tokens=_GENERATED)
    response = await server.complete(prompt, short, seed=None, model=snapshot.adapter)
    scored = await server.read([*prompt, *response.ids.tolist()], 0, model=snapshot.adapter)
    off = np.abs(scored.logprobs[len(prompt) - 1 :] - response.logprobs)
    if off.mean() > tolerance:
        raise ConfigError(
            f"{server.name} reports log-probs after temperature and top-p ({off.mean():.2f} nats "
            "per token off the model's own): start it with --logprobs-mode raw_logprobs, or set "
            "generate.temperature: 1 and generate.top_p: 1"
        )

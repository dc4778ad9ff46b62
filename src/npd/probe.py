"""A model's fingerprint in log-probs: what it says of a few fixed texts, kept beside its weights.

Promises: two models that differ enough to write differently differ here; the same weights agree to
rounding, whatever engine reads them. Measured from the files of a snapshot, in float32, so that
nothing but the other engine's own rounding is left between two readings: were it measured in
bfloat16, its rounding would look like weights that went half of the way. Does not judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npd.errors import ModelError, StoreError
from npd.servers.sizes import size_of
from npd.store import files
from npd.store.snapshots import MANIFEST
from npd.types import FloatArray, IntArray

FILE = "probe.json"
_FORMAT = 1
# Enough positions that rounding averages out (a bf16 log-prob is off by some 0.05 nats).
MAX_TOKENS = 128
"""The longest sequence of a probe; a server that is to read it needs room for one more."""
CHEAP = 1_000_000_000
"""Parameters of the largest model that is loaded only to compare with: seconds, and 4 GB."""
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. By evening "
    "both have walked to the river, where an old man sells apples, bread and today's newspaper.",
    "Question: A train travels 60 miles in 45 minutes. What is its speed in miles per hour?\n"
    "Answer: 45 minutes is 3/4 of an hour, so the speed is 60 / (3/4) = 80 miles per hour.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values) if values else float('nan')\n",
    "Water boils at 100 degrees Celsius at sea level. At higher altitudes the air pressure is "
    "lower, so it boils at a lower temperature, and food takes longer to cook.",
    "Dear Ms. Alvarez,\n\nThank you for your letter of March 3rd. We are pleased to confirm your "
    "booking for two nights; breakfast is served from 7 to 10 a.m.\n\nKind regards,",
)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Fixed sequences of token ids, and log p of each of their tokens but the first (nats)."""

    sequences: tuple[IntArray, ...]
    logprobs: tuple[FloatArray, ...]

    def within(self, room: int) -> Probe:
        """The part of it that a server of `room` tokens reads (it draws one more)."""
        fits = [i for i, ids in enumerate(self.sequences) if len(ids) < room]
        sequences = tuple(self.sequences[i] for i in fits)
        return Probe(sequences, tuple(self.logprobs[i] for i in fits))

    @property
    def flat(self) -> FloatArray:
        """All log-probs in a row."""
        return np.concatenate(self.logprobs)


def probe_sequences(tokenizer: Any, longest: int) -> list[IntArray]:
    """The fixed texts as token ids of this tokenizer, none longer than `longest`."""
    encoded = tokenizer(list(_TEXTS), add_special_tokens=False)["input_ids"]
    limit = min(MAX_TOKENS, longest)
    return [np.array(ids[:limit], np.int32) for ids in encoded if len(ids) > 1]


def measure(model: Any, sequences: Sequence[IntArray]) -> Probe:
    """What a loaded model (`npd.modeling`) says of `sequences`."""
    import torch

    from npd.head import head_of
    from npd.reading import response_hidden

    head, found = head_of(model), {}
    with torch.no_grad():
        pairs = [(ids[:1], ids[1:]) for ids in sequences]
        for row, hidden in response_hidden(model, pairs, max(map(len, sequences))):
            parts = torch.split(hidden, [len(pairs[i][1]) for i in row])
            for i, states in zip(row, parts, strict=True):
                targets = torch.from_numpy(pairs[i][1].astype(np.int64)).to(states.device)
                logprobs = head.logits(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                found[i] = logprobs.float().cpu().numpy()
    return Probe(tuple(sequences), tuple(found[i] for i in range(len(sequences))))


def of_directory(directory: Path, trust_remote_code: bool = False) -> Probe:
    """The probe kept in a model directory; where there is none, its model is loaded for one.

    That takes the model's parameters as float32 in this machine's memory, for a few seconds. Of a
    published snapshot the probe is kept, for the other workers and for a resumed run.

    Raises:
        ModelError: the directory holds no model that can be loaded.
    """
    kept = read(directory)
    if kept is not None:
        return kept
    from npd.chat import Chat
    from npd.lora import base_of
    from npd.modeling import load_model

    source = base_of(directory) or directory  # an adapter has no tokenizer of its own
    tokenizer = Chat.load(source, trust_remote_code=trust_remote_code).tokenizer
    # On the CPU: the devices may be the servers' own.
    model = load_model(directory, dtype="float32", trust_remote_code=trust_remote_code)
    found = measure(model, probe_sequences(tokenizer, _longest(model)))
    if (directory / MANIFEST).exists():
        write(found, directory)
    return found


def of_cheap(model: str, trust_remote_code: bool = False) -> Probe | None:
    """The probe of a model directory where it is kept or takes seconds to measure; else None.

    None as well of a hub's name, of weights that are elsewhere, and of a model that only servers
    can read.
    """
    directory = Path(model)
    kept = read(directory)
    if kept is not None:
        return kept
    size = size_of(model)
    if size is None or size.parameters > CHEAP:
        return None
    with suppress(ModelError):
        return of_directory(directory, trust_remote_code)
    return None


def _longest(model: Any) -> int:
    """Tokens a server can read of this model, which draws one more each time."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return MAX_TOKENS if limit is None else int(limit) - 1


def write(probe: Probe, directory: Path) -> None:
    """Put a probe beside the weights it is of."""
    content = {
        "format": _FORMAT,
        "sequences": [ids.tolist() for ids in probe.sequences],
        "logprobs": [[round(float(value), 6) for value in row] for row in probe.logprobs],
    }
    files.write_json(directory / FILE, content)


def read(directory: Path) -> Probe | None:
    """The probe of a model directory; None where there is none.

    Raises:
        StoreError: it is there and unreadable.
    """
    path = directory / FILE
    if not path.exists():
        return None
    content = files.read_json(path)
    if content.get("format") != _FORMAT:
        raise StoreError(f"{path} is of another version of npd: delete it to have it measured anew")
    return Probe(
        tuple(np.array(ids, np.int32) for ids in content["sequences"]),
        tuple(np.array(row, np.float32) for row in content["logprobs"]),
    )

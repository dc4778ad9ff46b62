"""A model's fingerprint: its log-probs on a few fixed texts, kept beside its weights.

Promises: different models have different fingerprints. With the same weights, fingerprints of all
engines agree up to rounding. Measured from the files of a snapshot in float32, so that only the
server's engine adds rounding; a fingerprint in bfloat16 would add its own, which looks like a
partial load. Does not compare fingerprints (`engines.verify_weights` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npd.errors import ModelError, StoreError
from npd.models.metadata import context_of, size_of
from npd.store import files
from npd.store.snapshots import MANIFEST
from npd.types import FloatArray, IntArray

FILE = "probe.json"
_FORMAT = 1
# Enough positions that rounding averages out (a bf16 log-prob is off by some 0.05 nats).
MAX_TOKENS = 128
"""The longest sequence of a fingerprint in tokens; a server needs a context of one more."""
CHEAP = 1_000_000_000
"""The largest model, in parameters, that is loaded only for a fingerprint: seconds, and 4 GB."""
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
class Fingerprint:
    """Fixed sequences of token ids, and log p (nats) of every token but each sequence's first."""

    sequences: tuple[IntArray, ...]
    logprobs: tuple[FloatArray, ...]

    def within(self, room: int) -> Fingerprint:
        """The sequences that fit a server's context of `room` tokens, plus one generated token."""
        fits = [i for i, ids in enumerate(self.sequences) if len(ids) < room]
        sequences = tuple(self.sequences[i] for i in fits)
        return Fingerprint(sequences, tuple(self.logprobs[i] for i in fits))

    @property
    def flat(self) -> FloatArray:
        """All log-probs, concatenated."""
        return np.concatenate(self.logprobs)


def fingerprint_texts(tokenizer: Any, longest: int) -> list[IntArray]:
    """The fixed texts as token ids of this tokenizer, none longer than `longest`."""
    encoded = tokenizer(list(_TEXTS), add_special_tokens=False)["input_ids"]
    limit = min(MAX_TOKENS, longest)
    return [np.array(ids[:limit], np.int32) for ids in encoded if len(ids) > 1]


def measure(model: Any, sequences: Sequence[IntArray]) -> Fingerprint:
    """The fingerprint of a loaded model (`npd.models.loading`) on `sequences`."""
    import torch

    from npd.models.lm_head import head_of
    from npd.models.response_states import response_hidden

    head, found = head_of(model), {}
    with torch.no_grad():
        pairs = [(ids[:1], ids[1:]) for ids in sequences]
        for row, hidden in response_hidden(model, pairs, max(map(len, sequences))):
            parts = torch.split(hidden, [len(pairs[i][1]) for i in row])
            for i, states in zip(row, parts, strict=True):
                targets = torch.from_numpy(pairs[i][1].astype(np.int64)).to(states.device)
                logprobs = head.logits(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                found[i] = logprobs.float().cpu().numpy()
    return Fingerprint(tuple(sequences), tuple(found[i] for i in range(len(sequences))))


def of_directory(directory: Path, trust_remote_code: bool = False) -> Fingerprint:
    """The fingerprint of a model directory: read from its file, or measured on the loaded model.

    Measuring loads the parameters in float32 into this machine's memory, for a few seconds. For a
    published snapshot the result is stored, for other workers and for a resumed run.

    Raises:
        ModelError: the model cannot be loaded.
    """
    kept = read(directory)
    if kept is not None:
        return kept
    from npd.data.chat_tokenizer import ChatTokenizer
    from npd.models.loading import load_model
    from npd.models.lora import base_of

    source = base_of(directory) or directory  # an adapter has no tokenizer of its own
    tokenizer = ChatTokenizer.load(source, trust_remote_code=trust_remote_code).tokenizer
    # On the CPU, because servers may occupy the GPUs.
    model = load_model(
        directory, role="snapshot", dtype="float32", trust_remote_code=trust_remote_code
    )
    found = measure(model, fingerprint_texts(tokenizer, _longest(model)))
    if (directory / MANIFEST).exists():
        write(found, directory)
    return found


def of_cheap(model: str, trust_remote_code: bool = False) -> Fingerprint | None:
    """The fingerprint of a model directory if it is stored or takes seconds to measure, else None.

    Also None for a hub name, for weights on another machine, and for a model that only servers can
    load.
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
    """The longest sequence that fits the model's context with one more generated token."""
    limit = context_of(model.config)
    return MAX_TOKENS if limit is None else limit - 1


def write(fingerprint: Fingerprint, directory: Path) -> None:
    """Store a fingerprint in a model directory."""
    content = {
        "format": _FORMAT,
        "sequences": [ids.tolist() for ids in fingerprint.sequences],
        "logprobs": [[round(float(value), 6) for value in row] for row in fingerprint.logprobs],
    }
    files.write_json(directory / FILE, content)


def read(directory: Path) -> Fingerprint | None:
    """The fingerprint stored in a model directory; None if there is none.

    Raises:
        StoreError: its file is unreadable.
    """
    path = directory / FILE
    if not path.exists():
        return None
    content = files.read_json(path)
    if content.get("format") != _FORMAT:
        raise StoreError(
            f"{path} is from another version of npd: delete it, and npd measures it again"
        )
    return Fingerprint(
        tuple(np.array(ids, np.int32) for ids in content["sequences"]),
        tuple(np.array(row, np.float32) for row in content["logprobs"]),
    )

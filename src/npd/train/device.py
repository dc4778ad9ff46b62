"""A trainer's device: its random numbers for a step, its autocast, and how much memory it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch


@contextmanager
def step_randomness(device: str, seed: int, step: int, rank: int) -> Iterator[None]:
    """Dropout's random numbers from (seed, step, rank); the caller's generator is left alone."""
    state = np.random.SeedSequence([seed % 2**63, step, rank]).generate_state(1, np.uint64)
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(state[0]) % 2**63)
        yield


def autocast(
    device: torch.device, *, is_on: bool, keeps_casts: bool = True
) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or none; nothing at all on a device that has no autocast."""
    if not (is_on or torch.amp.is_autocast_available(device.type)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on, cache_enabled=keeps_casts)


def peak_memory_mib(device: str) -> float:
    """Peak memory in MiB: of the device on CUDA, of the whole process elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

"""Who writes the responses, and with what. Import-light, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from npd.fields import Dtype, Positive, Section
from npd.served import ServedConfig


class _Writing(Section):
    """What is written, and how it is sampled."""

    source: Literal["student", "teacher", "dataset"] = "student"
    """Who writes: the student's snapshot, the teacher, or the data's own completions."""
    engine: Literal["transformers", "vllm", "sglang"] = "transformers"
    """What decodes: in process, or a server (see `urls` and `launch`)."""
    samples_per_prompt: Positive = 1
    """Responses to a prompt each time it is asked."""
    max_new_tokens: Positive = 512
    """Longest response; a longer one is truncated."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0 is greedy. At 1 with top_p 1 the samples are the snapshot's own distribution."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: 1 is the whole distribution."""
    batch_size: Positive = 32
    """Sequences decoded together; with a server, requests it has at once."""
    shard_size: Positive = 32
    """Samples asked for, stored and scored together."""
    workers: Positive = 1
    """Generators, each with a model of its own; servers at `urls` are dealt out to them."""
    dtype: Dtype = "bfloat16"
    """Type of the weights that decode."""
    admin_urls: tuple[str, ...] = ()
    """Each server behind the load balancers of `urls`: a refresh must reach every one. None: `urls`
    are the servers themselves."""
    refresh_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds in which a server must have drained and loaded a snapshot."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] = 0.15
    """Mean difference (nats/token) a server may show from the snapshot's own log-probs."""


class GenerateConfig(ServedConfig, _Writing):
    """Who writes the responses, how they are sampled, and what decodes."""

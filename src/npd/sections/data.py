"""Prompts, and what is held out of them. Import-light, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from npd.fields import Positive, Section


class DataConfig(Section):
    """Where prompts come from and how long they may be (token counts)."""

    train: str | None = None
    """JSONL or Parquet file, or a Hugging Face dataset name (`name` or `name:config`)."""
    split: str = "train"
    """Split of a Hugging Face dataset; files have none."""
    heldout: str | None = None
    """Held-out prompts, same forms as `train`; None takes `heldout_size` off the end of `train`."""
    heldout_split: str = "test"
    """Split of `heldout` where that is a Hugging Face dataset."""
    heldout_size: Annotated[int, Field(ge=0)] = 64
    """Prompts kept from the end of `train` for evaluation."""
    limit: Positive | None = None
    """Use only the first so many training prompts."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: our column name -> the data's, e.g. `{prompt: question, completion: answer}`."""
    system: str | None = None
    """System message put before every conversation that has none."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt, chat template included."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with a longer one: stop, or drop and count it."""
    on_bad_record: Literal["error", "drop"] = "error"
    """What to do with an empty or malformed record: stop with its line, or drop and count it."""


class EvalConfig(Section):
    """Held-out evaluation: at the start, every so many steps, and at the end."""

    every_steps: Positive | None = None
    """Steps between evaluations; None evaluates at the start and the end."""
    source: Literal["teacher", "completion", "none"] = "teacher"
    """Whose responses the held-out KL is measured on."""
    max_new_tokens: Positive = 64
    """Longest held-out response."""
    batch_size: Positive = 32
    """Sequences decoded together."""
    num_samples: Annotated[int, Field(ge=0)] = 4
    """Student responses shown in the report."""

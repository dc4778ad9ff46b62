"""The sections `data` and `eval`: every setting with its default, its bounds and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from npd.config.base import Count, Name, Positive, Section, Text, Texts

DataFormat = Literal["auto", "messages", "prompt", "sharegpt", "alpaca", "question"]


class SourceConfig(Section):
    """One of several sources of prompts. `math: FILE` is short for `math: {train: FILE}`."""

    train: Name
    """Training prompts, given like `data.train`."""
    weight: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    """Its part of the prompts, relative to the other weights; the rest of larger sources is left
    out. None, for all sources or for none: every prompt is used."""
    split: Text | None = None
    """Split of a Hugging Face dataset; None is `data.split`."""
    format: DataFormat | None = None
    """Form of its records; None is `data.format`."""
    columns: dict[str, Text] | None = None
    """Its columns, given like `data.columns`; None is `data.columns`."""


def _as_source(value: Any) -> Any:
    """`math: FILE` is short for `math: {train: FILE}`."""
    return {"train": value} if isinstance(value, str) else value


NamedSource = Annotated[SourceConfig, BeforeValidator(_as_source)]


class DataConfig(Section):
    """The prompts: their source, their columns and their maximum length in tokens."""

    train: Name | None = None
    """File (JSONL, JSON, CSV, TSV or Parquet; also `.gz` or `.zst` of it), folder of such files, or
    Hugging Face dataset name (`name` or `name:config`)."""
    mix: dict[str, NamedSource] = Field(default_factory=dict)
    """Several sources in place of `train`, by name, e.g. `{math: {train: FILE, weight: 2}, chat:
    {train: FILE, weight: 1}}`."""
    format: DataFormat = "auto"
    """Form of the records: `messages`, `prompt` (with `completion`), `sharegpt` (`conversations`),
    `alpaca` (`instruction`, `input`, `output`) or `question` (with `answer` or `response`); `auto`
    recognises it from their keys."""
    split: Text = "train"
    """Split of a Hugging Face dataset; files have no splits."""
    heldout: Name | None = None
    """Held-out prompts, given like `train`; None draws `heldout_size` prompts from `train`."""
    heldout_split: Text = "test"
    """Split of `heldout` if it is a Hugging Face dataset."""
    heldout_size: Count | None = None
    """Number of `train` prompts held out for evaluation, drawn with `seed`; None is 64, or a tenth
    of the prompts if that is less."""
    limit: Positive | None = None
    """Use only the first `limit` training prompts."""
    heldout_limit: Positive | None = None
    """Use only the first `heldout_limit` held-out prompts."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """npd's column names -> the data's, e.g. `{prompt: body, completion: reply}`."""
    leave_out: Texts = ()
    """Columns and message keys to ignore; other message keys go to the chat template unchanged."""
    system: str | None = None
    """System message for every conversation without one."""
    system_as: Literal["system", "user"] = "system"
    """`user` puts system messages before the user's text, for templates without a system role."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Jinja file, or the text of a template, in place of the student's own; saved students get
    it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Switches of the chat template for every conversation, e.g. `{enable_thinking: false}`. A
    record's own `chat_template_kwargs` go first."""
    max_prompt_tokens: Positive = 1024
    """Maximum prompt length, chat template included."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """For a longer prompt: stop, or drop and count it."""
    max_completion_tokens: Positive | None = None
    """Maximum length of a completion to train on (`generate.source: dataset`), end token included;
    None: what fits in a row after the prompt. Completions are never truncated."""
    on_long_completion: Literal["error", "drop"] = "error"
    """For a longer completion: stop, or drop and count its record."""
    on_bad_record: Literal["error", "drop"] = "error"
    """For an empty or malformed record: stop and name its line, or drop and count it."""


class EvalConfig(Section):
    """Held-out evaluation: at the start, every `every_steps` steps, and at the end."""

    every_steps: Positive | None = None
    """Steps between evaluations; None evaluates at the start and the end only."""
    source: Literal["teacher", "completion", "none"] = "teacher"
    """Responses for the held-out KL: the teacher's, the data's completions, or `none` for no
    evaluation."""
    max_new_tokens: Positive = 64
    """Maximum length of a held-out response in tokens."""
    batch_size: Positive = 32
    """Sequences decoded together."""
    num_samples: Count = 4
    """Student responses shown in the report."""

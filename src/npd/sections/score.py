"""What is kept of the teacher, and which samples are trained on. Import-light, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from npd.fields import Dtype, Positive, Section, Share
from npd.served import ServedConfig


class _Scoring(Section):
    """What is kept of the teacher, and what reads."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher: in process, or a server (see `urls` and `launch`)."""
    top_k: Positive = 10
    """Teacher ids kept at each position (drawn ones for `loss.target: sampled`)."""
    row_tokens: Positive = 4096
    """Tokens of one packed prefill; with a server, prompt tokens it has at once."""
    head_chunk: Positive = 512
    """Response positions whose logits exist at once."""
    student_pass: Literal["auto", "always"] = "auto"
    """`auto` takes the student's conditional NLL from the rollout where the rollout has it."""
    workers: Positive = 1
    """Scorers, each with all teachers, which it loads as they are asked."""
    ranks: Positive = 1
    """Processes (on GPUs: one each) that hold a teacher together, a part of every layer each: for
    one larger than a device. For a server see docs/servers.md; `npd score` is one always."""
    dtype: Dtype = "bfloat16"
    """Type of the weights that score."""


class ScoreConfig(ServedConfig, _Scoring):
    """What is kept of the teacher at each response position, and what runs it."""


class FilterConfig(Section):
    """Which samples are trained on. The pre-filters run before the teacher is paid for."""

    name: Literal["none", "delta_ifd", "outlier", "random", "teacher_nll", "overlap", "length"] = (
        "delta_ifd"
    )
    """Δ-IFD; what the student finds far harder than usual (`outlier`; told from the scores, so the
    run needs a teacher); or a control that keeps as many as Δ-IFD by something simpler; with every
    one, `none` too, the pre-filters below stay on (`drop_truncated`, `min_response_tokens`,
    `max_repeat`)."""
    ratio: Literal["nll", "ppl"] = "nll"
    """IFD divides mean NLLs, or perplexities."""
    bounds: Literal["fixed", "quantile"] = "fixed"
    """Δ-IFD within `low` and `high`, or within quantiles of recent samples."""
    low: float = 0.0
    """Lower bound of Δ-IFD: below, the sample is not from the student's policy."""
    high: float = 0.8
    """Upper bound of Δ-IFD: above, the teacher finds the text almost impossible."""
    low_quantile: Share = 0.05
    """Quantile that is the lower bound, with `bounds: quantile`."""
    high_quantile: Share = 0.95
    """Quantile that is the upper bound, with `bounds: quantile`."""
    history: Positive = 512
    """Most recent scored samples whose quantiles, or median, set the bounds."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.05
    """Slack below `low`; 0 is the paper's rule to the letter."""
    min_nll: Annotated[float, Field(ge=0.0)] = 0.05
    """Below this conditional NLL (nats/token, both models) the ratio says nothing: keep."""
    deviations: Annotated[float, Field(gt=0.0)] = 3.0
    """`outlier` keeps up to so many median deviations above the median of the student's NLL."""
    usual_nll: Annotated[float, Field(ge=0.0)] = 0.2
    """`outlier` keeps up to this NLL of the student (nats/token), whatever the median."""
    keep: Share | None = None
    """Share a control keeps; None keeps as many as delta_ifd would of the same samples."""
    drop_truncated: bool = True
    """Pre-filter: reject responses that reached `generate.max_new_tokens`; `false` turns it off."""
    min_response_tokens: Positive = 4
    """Pre-filter: reject shorter responses; 1 turns it off."""
    max_repeat: Share = 0.5
    """Pre-filter: largest share of repeated 4-grams; 1 turns it off."""

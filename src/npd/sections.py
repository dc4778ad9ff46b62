"""The sections of a config: every value, its default, its bounds and its meaning.

Each is valid by itself; which values make sense together is `npd.config`. Import-light, no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from npd.fields import Decay, Dtype, Positive, Section, Share
from npd.served import ServedConfig


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
    """Scorers, each with a teacher of its own."""
    dtype: Dtype = "bfloat16"
    """Type of the weights that score."""


class ScoreConfig(ServedConfig, _Scoring):
    """What is kept of the teacher at each response position, and what runs it."""


class FilterConfig(Section):
    """Which samples are trained on. The pre-filters run before the teacher is paid for."""

    name: Literal["none", "delta_ifd", "random", "teacher_nll", "overlap", "length"] = "delta_ifd"
    """Δ-IFD, or a control that keeps as many by something simpler."""
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
    """Most recent scored samples whose quantiles set the bounds."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.05
    """Slack below `low`; 0 is the paper's rule to the letter."""
    min_nll: Annotated[float, Field(ge=0.0)] = 0.05
    """Below this conditional NLL (nats/token, both models) the ratio says nothing: keep."""
    keep: Share | None = None
    """Share a control keeps; None keeps as many as delta_ifd would of the same samples."""
    drop_truncated: bool = True
    """Reject responses that reached `generate.max_new_tokens`."""
    min_response_tokens: Positive = 4
    """Reject shorter responses."""
    max_repeat: Share = 0.5
    """Largest share of repeated 4-grams."""


class LossConfig(Section):
    """L = (1 - kd_weight) * CE + kd_weight * KD, on response tokens, token mean over the step."""

    kd_weight: Share = 0.9
    """Weight of the distillation term; 0 is plain cross-entropy."""
    target: Literal["topk", "renorm", "tail", "sampled"] = "topk"
    """How the teacher's mass outside its support counts (docs/method.md)."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), its reverse, or the generalised JSD between them."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Mixture of the generalised JSD (towards 0 forward, towards 1 reverse)."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Softens both sides within the support."""
    impl: Literal["chunked", "reference"] = "chunked"
    """`reference` holds full logits and is for tests."""
    chunk: Positive = 1024
    """Response positions whose logits exist at once."""


class LoraConfig(Section):
    """Low-rank adapters (peft) that are trained in place of the student's own weights.

    Embeddings, norms and LM head stay as they are. Needs `pip install 'npd[lora]'`.
    """

    rank: Positive = 16
    """Rank of each adapter: what it can learn, and its size."""
    alpha: Positive = 32
    """Strength: an adapter's output is multiplied by alpha / rank."""
    dropout: Decay = 0.0
    """Dropout on an adapter's input while it trains."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which linear layers get one: all but the LM head, or by name, e.g. `[q_proj, v_proj]`."""


class TrainConfig(Section):
    """The optimiser and what a step is made of."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Learning rate after warmup; a cosine takes it to `min_lr`."""
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    """Learning rate at the end of the run."""
    warmup: Share = 0.0
    """Share of the run over which lr rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """On matrices only: not on norms, biases, embeddings or LM head."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm."""
    batch_size: Positive = 64
    """Samples a step; they are packed into as many rows as they need."""
    row_tokens: Positive = 32768
    """Capacity of a packed row: what one forward and backward pass holds."""
    dtype: Dtype = "bfloat16"
    """Compute type; what is trained and the optimiser's state stay float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only; null trains every weight."""
    ranks: Positive = 1
    """Processes (on GPUs: one each) that share the student and the rows of a step; `npd train` is
    one always."""


class Refresh(Section):
    """When the generating snapshot is replaced; exactly one rule, or none of them (never)."""

    every_steps: Positive | None = None
    """Refresh every so many optimiser steps."""
    at_epochs: tuple[Positive, ...] | None = None
    """Refresh once each of these epochs is done."""
    drift: Annotated[float, Field(gt=0.0)] | None = None
    """Refresh when the mean KL(theta || gen) of a segment passes this (nats per token)."""
    min_steps: Positive = 1
    """Fewest steps between two refreshes by drift."""
    in_flight: Literal["finish", "abort", "mix"] = "finish"
    """What becomes of responses being written when a snapshot is published: they are finished by
    the old one, begun again by the new one, or gone on with by the new one (servers only)."""

    @property
    def is_never(self) -> bool:
        """Whether the first snapshot writes everything."""
        return self.every_steps is None and self.at_epochs is None and self.drift is None


def _parse_refresh(value: Any) -> Any:
    return {} if value == "never" else value


class ScheduleConfig(Section):
    """Four numbers that span the family of methods, and how long the run is."""

    epochs: Positive | None = None
    """Passes over the prompts, counted in uses of samples (one that leaves early counts as used
    up); or else `steps`."""
    steps: Positive | None = None
    """Optimiser steps; prompts repeat as needed."""
    window: Positive | Literal["all"] = "all"
    """Samples kept live."""
    reuse: Positive = 5
    """Times a sample is trained on."""
    refresh: Annotated[Refresh, BeforeValidator(_parse_refresh)] = Refresh(at_epochs=(5,))
    max_lag: Annotated[int, Field(ge=0)] = 1
    """Snapshots a sample may be behind and still be trained on."""
    overlap: bool | Literal["auto"] = "auto"
    """Whether stages run at the same time; auto: yes with several processes, no inline."""
    segment_steps: Positive = 8
    """Steps handed to the trainer at once."""
    max_tries: Positive = 3
    """Tries at a shard, or at a call of the trainer, before it is given up."""


class RuntimeConfig(Section):
    """Where workers live."""

    kind: Literal["inline", "local"] = "local"
    """A thread for each worker, or a process."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: Positive | None = None
    """CPU threads a worker may use; None shares the machine's cores out."""
    call_timeout: Annotated[float, Field(gt=0.0)] = 3600.0
    """Seconds after which a worker that has not answered counts as lost."""


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


class CheckpointConfig(Section):
    """When the trainer's state is saved for `--resume` (also at the end of the run)."""

    every_steps: Positive | None = 100
    """Steps between checkpoints; None saves at the end only."""
    keep: Positive = 1
    """Newest checkpoints kept."""


class ObserveConfig(Section):
    """What a run leaves for people to look at."""

    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where metrics go besides `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` at the end."""
    trace: bool = True
    """Write trace.json for Perfetto (the spans themselves are always kept)."""

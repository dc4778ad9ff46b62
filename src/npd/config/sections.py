"""The sections of a config: every setting with its default, its bounds and its meaning.

Each section is validated alone; `npd.config.checks` validates across sections. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from npd.config.base import (
    Count,
    Decay,
    Directory,
    Dtype,
    Gpus,
    LaunchConfig,
    Minutes,
    Name,
    Positive,
    Processes,
    Seconds,
    Section,
    ServedConfig,
    Share,
    Text,
    Texts,
)
from npd.config.length import DEFAULT_AT_EPOCHS, DEFAULT_EPOCHS, DEFAULT_REUSE, following

Model = Name


class TeacherConfig(Section):
    """One of several teachers: its model, and its servers unless it runs in process."""

    model: Model
    """A Hugging Face directory or name. It must share the student's vocabulary."""
    urls: Texts = ()
    """Running servers of this model, if `score.engine` is a server."""
    launch: LaunchConfig | None = None
    """Start a server for this model in each scorer."""


def _as_section(value: Any) -> Any:
    """`math: DIR` is short for `math: {model: DIR}`."""
    return {"model": value} if isinstance(value, str) else value


NamedTeacher = Annotated[TeacherConfig, BeforeValidator(_as_section)]


class _Generation(Section):
    """The source of the responses, and how they are sampled."""

    source: Literal["student", "teacher", "dataset"] = "student"
    """Source of the responses: the student's snapshot, the teacher, or the dataset."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Responses per prompt each time it is sampled."""
    max_new_tokens: Positive = 512
    """Maximum response length in tokens; a longer response is truncated."""
    stop_ids: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Additional token ids that end a response, besides the end tokens of student and teachers."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Sampling temperature; 0 is greedy. With 1 and top_p 1 the samples follow the snapshot's own
    distribution."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: 1 is the whole distribution."""
    seeded: bool = False
    """Send each sample's seed to the server, which then draws row by row: slower, and equal text is
    not promised even so. In process every sample is drawn by its seed."""
    batch_size: Positive | Literal["auto"] = "auto"
    """Sequences decoded together; with a server, concurrent requests. `auto`: 32 in process, 256
    with each server."""
    shard_size: Positive | Literal["auto"] = "auto"
    """Samples requested, stored and scored together. `auto`: 32 in process; with servers up to
    1,024, at most a quarter of the window for each server (all of it if stages take turns)."""
    shards_in_flight: Processes | Literal["auto"] = "auto"
    """Shards that a generator has at once, so that its servers are busy while the longest responses
    of one end. `auto`: 2 for each of its servers. In process it is 1."""
    workers: Processes = 1
    """Number of generators. Each loads its own model; the servers at `urls` are divided among
    them."""
    gpus: Gpus = ()
    """GPUs of the generators, in turn, with `runtime.kind: local`: indices among those that npd
    sees. Empty: those that trainer and scorers leave."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights for decoding."""
    admin_urls: Texts = ()
    """Every server behind the load balancers at `urls`, since a refresh must reach each one. Empty:
    `urls` are the servers themselves."""
    refresh_timeout: Seconds = 600.0
    """Timeout in seconds for a server to drain its requests and load a snapshot."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] = 0.15
    """Largest mean difference (nats/token) between a server's log-probs and the snapshot's own."""


# `generate.batch_size: auto`. An engine's speed grows with the requests that it has at once.
_AT_ONCE, _AT_ONCE_SERVED = 32, 256


class GenerateConfig(ServedConfig, _Generation):
    """The source of the responses, how they are sampled, and the engine that decodes."""

    @property
    def at_once(self) -> int:
        """Sequences decoded together, or concurrent requests of a server."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return _AT_ONCE_SERVED if self.is_served else _AT_ONCE

    @property
    def num_in_flight(self) -> int:
        """Shards that a generator has at once."""
        if not self.is_served:
            return 1
        if isinstance(self.shards_in_flight, int):
            return self.shards_in_flight
        return 2 * -(-self.num_servers // self.workers)

    @property
    def num_servers(self) -> int:
        """Servers of all generators; one a generator that decodes in process."""
        return max(self.workers, len(self.urls))


class ScoreSizes(NamedTuple):
    """How much a scorer reads at once: tokens of a row, and positions with logits."""

    row_tokens: int
    head_chunk: int


# What `auto` comes to on a GPU: the first that fits by forecast. On a CPU, and for servers, it is
# the last. On GPUs not measured.
SCORE_SIZES = (ScoreSizes(16_384, 2048), ScoreSizes(8192, 1024), ScoreSizes(4096, 512))
SIZES_ON_GPU, SIZES_ON_CPU = SCORE_SIZES[0], SCORE_SIZES[-1]


class _Scoring(Section):
    """The teacher's outputs to store, and how the teacher scores."""

    top_k: Positive = 10
    """Teacher token ids stored per position: the top k, or k sampled ids with
    `loss.target: sampled`."""
    row_tokens: Positive | Literal["auto"] = "auto"
    """Tokens in one packed prefill; with a server, concurrent prompt tokens. `auto`: 4,096 on a CPU
    and for a server, 16,384 on GPUs or, if by forecast that would not fit, less."""
    head_chunk: Positive | Literal["auto"] = "auto"
    """Number of response positions whose logits exist at once. `auto`: 512 on a CPU, 2,048 on GPUs
    or, if by forecast that would not fit, less."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers of teachers and snapshots in process with torch.compile. `auto`: on GPUs
    with a compiler and Triton (never measured on one). Not with `ranks`."""
    student_pass: Literal["auto", "always"] = "auto"
    """`auto` takes the student's conditional NLL from the rollout if it is there; `always` computes
    it."""
    workers: Processes = 1
    """Number of scorers. Each loads every teacher, at its first request."""
    ranks: Processes = 1
    """Processes (on GPUs: one each) that share a teacher too large for one device, each with a part
    of every layer. For servers see docs/servers.md; `npd score` always uses one."""
    gpus: Gpus = ()
    """GPUs of the scorers (and their ranks), in turn, as in `generate.gpus`. Empty: those that the
    trainer leaves."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights for scoring."""


class ScoreConfig(ServedConfig, _Scoring):
    """The teacher's outputs to store at each response position, and the engine that scores."""

    @property
    def least_row_tokens(self) -> int:
        """Tokens that a row holds wherever it is; the least that `auto` comes to."""
        return SIZES_ON_CPU.row_tokens if self.row_tokens == "auto" else self.row_tokens

    @property
    def sizes(self) -> ScoreSizes:
        """Rows and head chunks, `auto` being decided."""
        assert self.row_tokens != "auto"
        assert self.head_chunk != "auto"
        return ScoreSizes(self.row_tokens, self.head_chunk)

    def with_sizes(self, sizes: ScoreSizes) -> Self:
        """The section with these in place of `auto`."""
        autos = {name: n for name, n in sizes._asdict().items() if getattr(self, name) == "auto"}
        return self.model_copy(update=autos) if autos else self


class FilterConfig(Section):
    """The filters, which choose the samples to train on. Pre-filters run before scoring."""

    name: Literal["none", "delta_ifd", "outlier", "random", "teacher_nll", "overlap", "length"] = (
        "delta_ifd"
    )
    """`delta_ifd`; `outlier`, which rejects text that the student finds far harder than usual (it
    needs the teacher's scores); or a control, which keeps as many samples as `delta_ifd` by a
    simpler rule. The pre-filters (`drop_truncated`, `min_response_tokens`, `max_repeat`) are on
    with every name, `none` included."""
    ratio: Literal["nll", "ppl"] = "nll"
    """Whether IFD is a ratio of mean NLLs or of perplexities."""
    bounds: Literal["fixed", "quantile"] = "fixed"
    """Bounds of Δ-IFD: `low` and `high`, or quantiles of recent samples."""
    low: float = 0.0
    """Lower bound of Δ-IFD. Below it, the sample is not from the student's policy."""
    high: float = 0.8
    """Upper bound of Δ-IFD. Above it, the teacher finds the text almost impossible."""
    low_quantile: Share = 0.05
    """Quantile for the lower bound, with `bounds: quantile`."""
    high_quantile: Share = 0.95
    """Quantile for the upper bound, with `bounds: quantile`."""
    history: Positive = 512
    """Number of recent scored samples whose quantiles, or median, set the bounds."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.05
    """Slack below `low`; 0 is exactly the paper's rule."""
    min_nll: Annotated[float, Field(ge=0.0)] = 0.05
    """Keep a sample if both models' conditional NLL (nats/token) is below this, where the ratio is
    noise."""
    deviations: Annotated[float, Field(gt=0.0)] = 3.0
    """`outlier` keeps up to this many median deviations above the median of the student's NLL."""
    usual_nll: Annotated[float, Field(ge=0.0)] = 0.2
    """`outlier` keeps every sample up to this student NLL (nats/token), whatever the median."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of samples that a control keeps; None: as many as delta_ifd would keep."""
    drop_truncated: bool = True
    """Pre-filter: reject responses that reached `generate.max_new_tokens`; with `false` they are
    trained on as they are, without an end token."""
    min_response_tokens: Positive = 4
    """Pre-filter: reject shorter responses; 1 disables it."""
    max_repeat: Share = 0.5
    """Pre-filter: reject responses with a larger share of repeated 4-grams; 1 disables it."""


def _listed(value: Any) -> Any:
    """`15` is short for `[15]`."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Points = Annotated[tuple[Positive, ...], Field(strict=False), BeforeValidator(_listed)]


class Refresh(Section):
    """When a new snapshot replaces the one that generates: one rule, or `never`."""

    every_steps: Positive | None = None
    """Refresh every this many optimiser steps."""
    at_epochs: Points | None = None
    """Refresh at the end of each of these epochs."""
    at_steps: Points | None = None
    """Refresh after each of these steps, if the run's length is set in `steps`."""
    drift: Annotated[float, Field(gt=0.0)] | None = None
    """Refresh when the mean KL(theta || gen) of a segment exceeds this (nats per token)."""
    min_steps: Positive = 1
    """Minimum number of steps between two refreshes by drift."""
    in_flight: Literal["finish", "mix"] = "finish"
    """For responses in flight when a snapshot is published: `finish` them with the old snapshot, or
    `mix`: the new snapshot continues them (servers only)."""

    @property
    def is_never(self) -> bool:
        """Whether the first snapshot writes every sample."""
        rules = (self.every_steps, self.at_epochs, self.at_steps, self.drift)
        return all(rule is None for rule in rules)


def _parse_refresh(value: Any) -> Any:
    return {} if value == "never" else value


class ScheduleConfig(Section):
    """The length of the run, and the settings that move it from off-policy to on-policy."""

    epochs: Positive | None = None
    """Passes over the prompts, counted in uses of samples (a dropped sample counts as used up). Set
    `epochs` or `steps`; the default is 10 epochs."""
    steps: Positive | None = None
    """Optimiser steps; prompts repeat as needed."""
    window: Positive | Literal["all"] = "all"
    """Maximum number of live samples (requested and not yet finalized); `all` is one pass over the
    prompts."""
    reuse: Positive = DEFAULT_REUSE
    """Number of times each sample is trained on. If only the length is set, it follows from the
    length."""
    refresh: Annotated[Refresh, BeforeValidator(_parse_refresh)] = Refresh(
        at_epochs=DEFAULT_AT_EPOCHS
    )
    max_lag: Count = 1
    """Number of snapshots a sample may be behind and still be trained on."""
    overlap: bool | Literal["auto"] = "auto"
    """Whether stages run at the same time; `auto`: yes, unless `runtime.kind` is inline or
    `runtime.share` is phases."""
    segment_steps: Positive = 8
    """Steps sent to the trainer at once."""
    max_tries: Positive = 3
    """Attempts at a shard, or at a trainer call, before the run gives up."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Adds the default length if none is given, and the values that follow from the length."""
        if not isinstance(values, Mapping):
            return values
        has_length = values.keys() & {"epochs", "steps"}
        given = dict(values) if has_length else {"epochs": DEFAULT_EPOCHS, **values}
        return given | _nested(following(_DEFAULTS, _flat(given)), given)


_DEFAULTS = {
    "epochs": DEFAULT_EPOCHS,
    "reuse": DEFAULT_REUSE,
    "refresh.at_epochs": DEFAULT_AT_EPOCHS,
}


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the section by dotted path, and `refresh` itself if it is given."""
    refresh = given.get("refresh")
    flat = {key: value for key, value in given.items() if key != "refresh"}
    if isinstance(refresh, BaseModel):
        refresh = refresh.model_dump()
    if isinstance(refresh, Mapping):
        flat |= {f"refresh.{key}": value for key, value in refresh.items()}
    return flat | ({"refresh": refresh} if "refresh" in given else {})


def _nested(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    rules = {key.removeprefix("refresh."): v for key, v in found.items() if "." in key}
    values = {key: value for key, value in found.items() if "." not in key}
    return values | ({"refresh": rules} if rules and "refresh" not in given else {})


class RayConfig(Section):
    """The Ray cluster, and the GPUs that each worker requests (`runtime.kind: ray`)."""

    address: Text | None = None
    """`auto` (the cluster this machine belongs to) or `HOST:PORT`; null uses the environment
    variable RAY_ADDRESS."""
    gpus: dict[Literal["generator", "scorer", "trainer"], Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict
    )
    """GPUs per worker of a role, e.g. `{generator: 2}` for vLLM on two GPUs. The default is one for
    each worker that holds a model, if the cluster has GPUs."""
    start_timeout: Seconds = 600.0
    """Timeout in seconds for a worker to be scheduled on the cluster and started."""


class RuntimeConfig(Section):
    """Where workers run."""

    kind: Literal["inline", "local", "ray"] = "local"
    """Each worker is a thread (`inline`), a process (`local`), or an actor on a Ray cluster."""
    ray: RayConfig = RayConfig()
    share: Literal["auto", "together", "phases"] = "auto"
    """How generators, scorers and trainer share a device. `together` keeps all models on it.
    `phases` keeps one role's: the window is generated, then scored, then trained on, and between
    phases the models leave the device. `auto` is `phases` where all use the same one GPU, if the
    window is `all` or they do not fit together. Not yet run on a GPU."""
    device: Text = "auto"
    """`auto` (`cuda` if there is one, else `cpu`), `cpu`, `cuda` or `cuda:N` (AMD's GPUs too, by
    ROCm), or another kind of device that torch knows, such as `xpu`. npd has been run on CPUs and
    NVIDIA's GPUs only."""
    threads: Processes | None = None
    """CPU threads per worker; None divides the machine's cores among workers."""
    call_timeout: Seconds = 3600.0
    """Seconds after which a worker that has not answered is considered lost."""
    shared: str | None = None
    """URL (`s3://bucket/runs`) through which workers exchange files; None uses the run
    directory."""
    scratch: Directory | None = None
    """With `shared`, the folder for each machine's local copies; None uses its temporary
    directory."""

    @property
    def device_kind(self) -> str:
        """The kind of `device`: `cuda` of `cuda:1`."""
        return self.device.partition(":")[0]

    @property
    def names_one_gpu(self) -> bool:
        """Whether `device` is one GPU, by its number, for every worker."""
        return ":" in self.device

    @property
    def assigns_gpus(self) -> bool:
        """Whether each process on this machine is given GPUs of its own, if there are any."""
        return self.kind == "local" and self.device != "cpu" and not self.names_one_gpu


class CheckpointConfig(Section):
    """When the trainer's state is saved for `--resume`. It is also saved at the end of the run.

    It is copied at the end of a step, and written while training goes on.
    """

    every_steps: Positive | None = 100
    """Steps between checkpoints; None saves by time and at the end only."""
    every_minutes: Minutes | None = 15.0
    """Minutes after the last checkpoint until the next is saved, at the end of a segment; None
    saves by steps only."""
    keep: Positive = 1
    """Number of newest checkpoints to keep."""


class ObserveConfig(Section):
    """Trackers, report and trace."""

    trackers: Annotated[tuple[Literal["tensorboard"], ...], Field(strict=False)] = ()
    """Trackers that receive the metrics, besides `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` at the end; its charts need `pip install 'npd[report]'`."""
    trace: bool = True
    """Write trace.json for Perfetto (trace.jsonl is written in any case)."""


# Logits that exist at once: 32 MiB of bfloat16 on a CPU, at most 1.2 GiB elsewhere. Chunks smaller
# than the minimum slow down matmuls and the sum of the head's gradient (us/token, CPU: 64 tokens
# 614, 128 472, 256 408, 512 396, 1,024 391; H200 with kernels, V = 151,936: 128 27.4, 832 5.7,
# 1,024 4.6). Each chunk reads and writes that sum once, so on a GPU four times as many tokens at
# once move a quarter (not measured beyond 1,024). The size does not change the result.
_LOGITS, _LOGITS_ON_CPU = 608 * 2**20, 2**24
_LEAST_CHUNK, _LARGEST_CHUNK = 256, 4096


def chunk_for(vocabulary: int, *, is_cpu: bool) -> int:
    """The default number of tokens whose logits exist at once: at least 256, on GPUs to 4,096."""
    tokens = (_LOGITS_ON_CPU if is_cpu else _LOGITS) // max(1, vocabulary) // 64 * 64
    return max(_LEAST_CHUNK, tokens if is_cpu else min(_LARGEST_CHUNK, tokens))


class LossConfig(Section):
    """L = (1 - kd_weight) * CE + kd_weight * KD, on response tokens, token mean over the step."""

    kd_weight: Share = 0.9
    """Weight of the distillation term; 0 is plain cross-entropy."""
    target: Literal["topk", "renorm", "tail", "sampled"] = "topk"
    """How the teacher's probability outside its support is treated (docs/method.md)."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), its reverse, or the generalised JSD between them."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Mixture of the generalised JSD (0: forward, 1: reverse)."""
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Softens both distributions within the support."""
    impl: Literal["auto", "chunked", "triton", "reference"] = "auto"
    """`triton` fuses the operations of `chunked` between matmuls (CUDA only; elsewhere `chunked`
    runs); `auto` is `triton` where it runs; `reference` holds full logits and is for tests."""
    chunk: Positive | None = None
    """Number of response positions whose logits exist at once; null chooses by vocabulary and
    device: at least 256 on a CPU, up to 4,096 on GPUs, or less if by forecast that would not
    fit."""
    skip_after: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Exclude from the loss the `skip_tokens` tokens after a token whose teacher probability is
    below this, e.g. 0.01 (docs/method.md). Metrics cover the tokens trained on. 0 excludes none."""
    skip_tokens: Positive = 3
    """Number of tokens excluded after each such token; an excluded token can be such a token
    too."""

    @property
    def of_tokens(self) -> dict[str, Any]:
        """The options of `near_policy_loss`: all except the options that choose the tokens."""
        return self.model_dump(exclude={"skip_after", "skip_tokens"})


class LoraConfig(Section):
    """Low-rank adapters (peft), trained instead of the student's own weights.

    Embeddings, norms and LM head stay frozen. Needs `pip install 'npd[lora]'`.
    """

    rank: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Rank of each adapter, which sets its capacity and size."""
    alpha: Positive = 32
    """Strength: an adapter's output is multiplied by alpha / rank."""
    dropout: Decay = 0.0
    """Dropout on an adapter's input during training."""
    targets: (
        Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    ) = "all-linear"
    """Linear layers with an adapter: all but the LM head, or a list such as `[q_proj, v_proj]`."""


class TrainConfig(Section):
    """The optimiser, the size of a step, and how the student is trained."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Learning rate after warmup; it decays to `min_lr` on a cosine."""
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    """Learning rate at the end of the run."""
    warmup: Share = 0.0
    """Share of the run over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """AdamW's weight decay, on matrices only: not on norms, biases, embeddings or LM head."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` stores AdamW's moments in 8 bits, with a scale for every 256 of them: weights,
    gradients and moments take 10 bytes a parameter instead of 16."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm."""
    batch_size: Positive = 64
    """Samples per step; they are packed into as many rows as they need."""
    row_tokens: Positive = 32768
    """Tokens in a packed row, which is one forward and backward pass."""
    dtype: Dtype = "bfloat16"
    """Compute data type; trained weights and the optimiser's state stay float32."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, more time. `auto`: if by forecast a
    full row would not fit the trainer's GPU beside what else is there. Never on CPUs or Ray."""
    compile: bool = False
    """Compile the student's layers with torch.compile; needs a compiler, and on GPUs Triton."""
    deterministic: bool = False
    """Train with deterministic algorithms only, so that on a GPU too the same rows give the same
    weights, bit for bit. Not yet run on a GPU; on a CPU no digit changes."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only; null trains every weight."""
    ranks: Processes = 1
    """Processes (on GPUs: one each) that share the student and the rows of a step; `npd train`
    always uses one."""
    shard: Literal["auto", "full", "optimizer"] = "auto"
    """What ranks share: `full` (`auto`): weights, gradients and AdamW's moments (ZeRO-3), with
    which each layer's weights are sent twice a row; `optimizer`: each rank keeps all weights from a
    row's forward to its backward pass (ZeRO-2), with which they are sent once. `optimizer` is for
    students of some 3B parameters or less and for slow links. With one GPU, `full` lets FSDP cast
    the weights in place of autocast (not yet run on a GPU)."""
    gpus: Gpus = ()
    """GPUs of the trainer's ranks, as in `generate.gpus`. Empty: the first ones."""

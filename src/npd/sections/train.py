"""The loss and the optimiser. Import-light, no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from npd.fields import Decay, Dtype, Positive, Section, Share

# Logits at once: 32 MiB of bfloat16 on a CPU, 304 MiB elsewhere. Fewer tokens than the least make
# matmuls and the sum of the head's gradient slower (us/token, CPU: 64 tokens 614, 128 472, 256 408,
# 512 396, 1,024 391; H200 with kernels, V = 151,936: 128 27.4, 832 5.7, 1,024 4.6). No size changes
# the result.
_LOGITS, _LOGITS_ON_CPU, _LEAST_CHUNK = 152 * 2**20, 2**24, 256


def chunk_for(vocabulary: int, *, is_cpu: bool) -> int:
    """How many tokens should have logits at once where nobody says: at least 256."""
    tokens = (_LOGITS_ON_CPU if is_cpu else _LOGITS) // vocabulary
    return max(_LEAST_CHUNK, tokens // 64 * 64)


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
    impl: Literal["chunked", "triton", "reference"] = "chunked"
    """`triton` fuses what `chunked` does between matmuls (CUDA; else as `chunked`); `reference`
    holds full logits and is for tests."""
    chunk: Positive | None = None
    """Response positions whose logits exist at once; null chooses by vocabulary and device."""
    skip_after: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Leave out of the loss what follows a token that the teacher finds less likely than this, such
    as 0.01 (docs/method.md). Metrics are of the tokens trained on. 0 leaves out nothing."""
    skip_tokens: Positive = 3
    """How many tokens after each such one, those left out included, are left out."""

    @property
    def of_tokens(self) -> dict[str, Any]:
        """The options of `near_policy_loss`; the others say which tokens it gets."""
        return self.model_dump(exclude={"skip_after", "skip_tokens"})


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
    compile: bool = False
    """Put the student's layers through torch.compile; needs a compiler (GPUs: and Triton)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only; null trains every weight."""
    ranks: Positive = 1
    """Processes (on GPUs: one each) that share the student and the rows of a step; `npd train` is
    one always."""

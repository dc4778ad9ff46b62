"""What a trainer reports, as frozen records: of a step, a segment, an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step measured; means are over its response tokens, all ranks together,
    but for the `skipped_tokens` that `loss.skip_after` leaves out.

    `drift` estimates KL(theta || gen) and `drift_k3` KL(gen || theta) in nats per token on samples
    of the newest snapshot, None when the step held none or no behaviour log-probs exist. `ess` is
    the effective sample size of the importance ratios as a share of tokens, in (0, 1]. `overlap`
    is the share of the support whose ids the student puts before every other id.
    """

    step: int
    loss: float
    ce: float
    kd: float | None
    grad_norm: float
    lr: float
    num_samples: int
    response_tokens: int
    total_tokens: int
    num_rows: int
    fill: float
    seconds: float
    teacher_mass: float | None = None
    student_mass: float | None = None
    agreement: float | None = None
    entropy: float | None = None
    drift: float | None = None
    drift_k3: float | None = None
    ess: float | None = None
    lag_mean: float = 0.0
    lag_max: int = 0
    overlap: float | None = None
    skipped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """A trained segment: one report a step, and the peak memory of the trainer in MiB."""

    segment: int
    steps: tuple[StepReport, ...]
    peak_memory_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Held-out quality at a step.

    `kl` is the tail-bucket KL(teacher || student) in nats per token on fixed held-out responses,
    `kl_sums` that of each response in all, `agreement` the share of positions where both argmaxes
    agree, `exact_match` the share of the `num_answers` prompts with an `answer` that end in it when
    greedy.
    `teacher_kls` are (teacher's name, `kl` on its prompts) where there are several.
    """

    step: int
    kl: float | None
    agreement: float | None
    exact_match: float | None
    num_prompts: int
    num_tokens: int
    seconds: float
    samples: tuple[tuple[str, str], ...] = ()
    kl_sums: tuple[float, ...] = ()
    num_answers: int = 0
    teacher_kls: tuple[tuple[str, float], ...] = ()

"""Fakes with known distributions, for tests of everything that talks to models through a protocol.

`FakeLM` is a language model small enough to check by hand; `FakeGenerator` and `FakeScorer` satisfy
the same contracts as the real ones over it, and `FakeTrainer` keeps a list of what it was given.
All are deterministic, picklable, and free of torch. They do not imitate speed or numerics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npd.errors import WorkerLostError
from npd.types import (
    EncodedPrompt,
    FinishReason,
    IntArray,
    Rollout,
    SampleRef,
    SampleRequest,
    Scored,
    Segment,
    SegmentReport,
    Step,
    StepReport,
)

END = 1  # token 0 opens a header, token 1 ends a response, the rest are words


class FakeLM:
    """log p(next | document) = log_softmax(first[document[0]] + previous[document[-1]]) over V ids.

    It depends on the document's first token so that a response is harder or easier without its
    prompt. `end_bias` is added to the end token's logit: larger means shorter responses.
    """

    def __init__(self, vocab_size: int = 32, seed: int = 0, end_bias: float = 2.5) -> None:
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.first = rng.normal(0.0, 1.0, (vocab_size, vocab_size))
        self.previous = rng.normal(0.0, 1.0, (vocab_size, vocab_size))
        self.previous[:, END] += end_bias

    def next_logprobs(self, document: IntArray) -> NDArray[np.float64]:
        """Log-probabilities [V] of the token after `document`."""
        logits = self.first[document[0]] + self.previous[document[-1]]
        return logits - np.logaddexp.reduce(logits)

    def response_logprobs(self, context: IntArray, response: IntArray) -> NDArray[np.float64]:
        """Log-probabilities [L, V] at each position of `response` written after `context`."""
        whole = np.concatenate([context, response])
        return np.stack(
            [self.next_logprobs(whole[: len(context) + t]) for t in range(len(response))]
        )

    def token_logprobs(self, context: IntArray, response: IntArray) -> NDArray[np.float64]:
        """log p(y_t) [L] of `response` after `context`."""
        return self.response_logprobs(context, response)[np.arange(len(response)), response]

    def sample(
        self, context: IntArray, seed: int, max_new_tokens: int, length: int | None = None
    ) -> IntArray:
        """A response drawn with `seed`; `length` forces where the end token comes."""
        rng, whole = np.random.default_rng(seed), list(context)
        limit = max_new_tokens if length is None else min(length, max_new_tokens)
        for t in range(limit):
            p = np.exp(self.next_logprobs(np.array(whole, dtype=np.int32)))
            if length is not None:
                p = p * ((np.arange(self.vocab_size) == END) == (t == length - 1))
            whole.append(int(rng.choice(self.vocab_size, p=p / p.sum())))
            if whole[-1] == END:
                break
        return np.array(whole[len(context) :], dtype=np.int32)


def make_prompts(count: int, vocab_size: int = 32, seed: int = 0) -> list[EncodedPrompt]:
    """`count` prompts of 2 to 9 tokens; the header is token 0, reference responses of 1 to 6."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> IntArray:
        return rng.integers(2, vocab_size, rng.integers(low, high)).astype(np.int32)

    return [
        EncodedPrompt(
            index=index,
            prompt_ids=words(2, 10),
            header_ids=np.array([0], dtype=np.int32),
            completion_ids=np.append(words(1, 6), END).astype(np.int32),
        )
        for index in range(count)
    ]


def make_requests(count: int, vocab_size: int = 32, seed: int = 0) -> list[SampleRequest]:
    """One ask for each of `make_prompts(count)`; sample id = prompt index, seed = 1000 + index."""
    prompts = make_prompts(count, vocab_size, seed)
    return [SampleRequest(sample_id=p.index, seed=1000 + p.index, prompt=p) for p in prompts]


def make_rollouts(
    count: int, vocab_size: int = 32, seed: int = 0, **kwargs: object
) -> list[Rollout]:
    """Rollouts of a loaded `FakeGenerator` over `make_requests(count)`."""
    generator = FakeGenerator(FakeLM(vocab_size, seed), **kwargs)  # type: ignore[arg-type]
    generator.load(Path("snapshot"), 0)
    return generator.generate(make_requests(count, vocab_size, seed))


class FakeGenerator:
    """A Generator over a FakeLM: a sample is decided by its seed and prompt alone.

    `fail_on` are the 1-based `generate` calls that raise `error`; `length(seed)` forces response
    lengths (else they follow the distribution); `loaded` records every (snapshot, version).
    """

    def __init__(
        self,
        lm: FakeLM | None = None,
        *,
        max_new_tokens: int = 16,
        fail_on: Collection[int] = (),
        error: type[Exception] = WorkerLostError,
        length: Callable[[int], int] | None = None,
        needs_load: bool = True,
        with_logprobs: bool = True,
    ) -> None:
        self.lm = lm or FakeLM()
        self.max_new_tokens = max_new_tokens
        self.fail_on, self.error = frozenset(fail_on), error
        self.length = length
        self.needs_load = needs_load
        self.with_logprobs = with_logprobs
        self.loaded: list[tuple[Path, int]] = []
        self.calls = 0
        self.is_closed = False

    @property
    def version(self) -> int:
        """The version samples are stamped with."""
        return self.loaded[-1][1] if self.loaded else 0

    def load(self, snapshot: Path, version: int) -> None:
        """Write as `version` from now on."""
        self.loaded.append((Path(snapshot), version))

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout an ask, in order."""
        assert not self.is_closed, "generate after close"
        assert self.loaded or not self.needs_load, "generate before load"
        self.calls += 1
        if self.calls in self.fail_on:
            raise self.error(f"fake generator fails on call {self.calls}")
        return [self._write(ask) for ask in requests]

    def close(self) -> None:
        """No call is allowed after it."""
        self.is_closed = True

    def _write(self, ask: SampleRequest) -> Rollout:
        prompt = ask.prompt
        length = None if self.length is None else self.length(ask.seed)
        response = self.lm.sample(prompt.prompt_ids, ask.seed, self.max_new_tokens, length)
        logprobs = self.lm.token_logprobs(prompt.prompt_ids, response).astype(np.float32)
        return Rollout(
            sample_id=ask.sample_id,
            prompt_index=prompt.index,
            version=self.version,
            prompt_ids=prompt.prompt_ids,
            header_ids=prompt.header_ids,
            response_ids=response,
            logprobs=logprobs if self.with_logprobs else None,
            finish=FinishReason.STOP if response[-1] == END else FinishReason.LENGTH,
            seed=ask.seed,
        )


class FakeScorer:
    """A Scorer over two FakeLMs, teacher and snapshot. `fail_on` as in FakeGenerator."""

    def __init__(
        self,
        teacher: FakeLM | None = None,
        student: FakeLM | None = None,
        *,
        top_k: int = 4,
        needs_ifd: bool = True,
        needs_student_pass: bool = False,
        support: Literal["topk", "sampled"] = "topk",
        seed: int = 0,
        fail_on: Collection[int] = (),
        error: type[Exception] = WorkerLostError,
    ) -> None:
        self.teacher = teacher or FakeLM(seed=1)
        self.student = student or FakeLM(seed=0)
        self.top_k, self.support, self.seed = top_k, support, seed
        self.needs_ifd, self.needs_student_pass = needs_ifd, needs_student_pass
        self.fail_on, self.error = frozenset(fail_on), error
        self.loaded: list[tuple[Path, int]] = []
        self.calls = 0
        self.is_closed = False

    def load_student(self, snapshot: Path, version: int) -> None:
        """Score the student's side as `version` from now on."""
        self.loaded.append((Path(snapshot), version))

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """One record a rollout, in order."""
        assert not self.is_closed, "score after close"
        needs_student = self.needs_ifd or self.needs_student_pass
        assert self.loaded or not needs_student, "score before load_student"
        self.calls += 1
        if self.calls in self.fail_on:
            raise self.error(f"fake scorer fails on call {self.calls}")
        return [self._score(rollout) for rollout in rollouts]

    def close(self) -> None:
        """No call is allowed after it."""
        self.is_closed = True

    def _support(self, logprobs: NDArray[np.float64], sample_id: int) -> NDArray[np.int64]:
        k = min(self.top_k, self.teacher.vocab_size)
        if self.support == "topk":
            return np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
        rng = np.random.default_rng([self.seed, sample_id])
        return np.stack([rng.choice(len(row), k, p=np.exp(row)) for row in logprobs])

    def _score(self, rollout: Rollout) -> Scored:
        prompt, header, y = rollout.prompt_ids, rollout.header_ids, rollout.response_ids
        logprobs = self.teacher.response_logprobs(prompt, y)
        ids = self._support(logprobs, rollout.sample_id)
        of_y = logprobs[np.arange(len(y)), y]
        is_measured = self.needs_student_pass or (self.needs_ifd and rollout.logprobs is None)
        student = self.student.response_logprobs(prompt, y) if is_measured else None
        return Scored(
            rollout=rollout,
            topk_ids=ids.astype(np.int32),
            topk_logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
            teacher_logprobs=of_y.astype(np.float32),
            nll_teacher=float(-of_y.mean()),
            nll_teacher_alone=_nll(self.teacher, header, y) if self.needs_ifd else None,
            nll_student=self._nll_student(rollout, is_measured),
            nll_student_alone=_nll(self.student, header, y) if self.needs_ifd else None,
            overlap=None if student is None else _overlap(logprobs, student, self.top_k),
        )

    def _nll_student(self, rollout: Rollout, is_measured: bool) -> float | None:
        if is_measured:
            return _nll(self.student, rollout.prompt_ids, rollout.response_ids)
        recorded = rollout.logprobs
        return None if recorded is None else float(-recorded.mean(dtype=np.float64))


def _nll(lm: FakeLM, context: IntArray, response: IntArray) -> float:
    return float(-lm.token_logprobs(context, response).mean())


def _overlap(teacher: NDArray[np.float64], student: NDArray[np.float64], k: int) -> float:
    tops = zip(np.argsort(-teacher)[:, :k], np.argsort(-student)[:, :k], strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in tops]))


class FakeTrainer:
    """A Trainer that only remembers. `steps` and `trained` (sample ids of each step) are its state.

    `read` is called for every sample it is given, as the real one does; `drift(step)` is what it
    reports; `fail_on` are the 1-based `train` calls that raise `error` before any step.
    """

    def __init__(
        self,
        *,
        read: Callable[[SampleRef], Rollout | Scored] | None = None,
        drift: Callable[[int], float | None] = lambda step: 0.01 * step,
        fail_on: Collection[int] = (),
        error: type[Exception] = WorkerLostError,
    ) -> None:
        self.read, self.drift = read, drift
        self.fail_on, self.error = frozenset(fail_on), error
        self.steps: list[int] = []
        self.trained: list[list[int]] = []
        self.calls = 0

    def train(
        self, segment: Segment, *, on_step: Callable[[StepReport], None] | None = None
    ) -> SegmentReport:
        """Remember the segment's steps; steps must follow each other without gap or repetition."""
        self.calls += 1
        if self.calls in self.fail_on:
            raise self.error(f"fake trainer fails on call {self.calls}")
        reports = []
        for step in segment.steps:
            assert not self.steps or step.index == self.steps[-1] + 1, "steps out of order"
            reports.append(self._step(step, segment.version))
            if on_step is not None:
                on_step(reports[-1])
        return SegmentReport(segment.index, tuple(reports), peak_memory_mib=1.0)

    def save_pretrained(self, directory: Path, dtype: str = "bfloat16") -> None:
        """Write a small file that says after how many steps it was written."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "model.json").write_text(json.dumps({"steps": self.steps}))

    publish = save_pretrained

    def save_checkpoint(self, directory: Path) -> None:
        """Write `trainer.json`: the steps trained and their samples."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        state = {"steps": self.steps, "trained": self.trained}
        (Path(directory) / "trainer.json").write_text(json.dumps(state))

    def load_checkpoint(self, directory: Path) -> None:
        """Become what was saved."""
        state = json.loads((Path(directory) / "trainer.json").read_text())
        self.steps, self.trained = state["steps"], state["trained"]

    def close(self) -> None:
        """Nothing is held."""

    def _step(self, step: Step, version: int) -> StepReport:
        rows = [row for rank in step.ranks for row in rank]
        refs = [ref for row in rows for ref in row.samples]
        records = [self.read(ref) for ref in refs] if self.read else []
        rollouts = [r.rollout if isinstance(r, Scored) else r for r in records]
        self.steps.append(step.index)
        self.trained.append([ref.sample_id for ref in refs])
        lags = [version - ref.version for ref in refs]
        loss = 1.0 / (1 + step.index)
        return StepReport(
            step=step.index,
            loss=loss,
            ce=loss,
            kd=loss,
            grad_norm=1.0,
            lr=step.lr,
            num_samples=len(refs),
            response_tokens=sum(len(r.response_ids) for r in rollouts) or len(refs),
            total_tokens=sum(ref.num_tokens for ref in refs),
            num_rows=len(rows),
            fill=1.0,
            seconds=0.0,
            drift=self.drift(step.index),
            lag_mean=float(np.mean(lags)) if lags else 0.0,
            lag_max=max(lags, default=0),
        )

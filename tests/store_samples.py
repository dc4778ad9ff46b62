"""Samples for the tests of the store, and a system that refuses to write."""

import resource
from contextlib import contextmanager

import numpy as np

from npd.types import FinishReason, Rollout, SampleRef, Scored

ROLLOUT_ARRAYS = ("prompt_ids", "header_ids", "response_ids", "logprobs")


def make_rollout(sample_id, length=5, *, has_logprobs=True, seed=None):
    rng = np.random.default_rng(sample_id)

    def ids(n):
        return rng.integers(0, 150_000, n, dtype=np.int32)

    logprobs = -rng.exponential(2.0, length).astype(np.float32) if has_logprobs else None
    return Rollout(
        sample_id=sample_id,
        prompt_index=sample_id // 2,
        version=3,
        prompt_ids=ids(1 + sample_id % 7),
        header_ids=ids(1 + sample_id % 3),
        response_ids=ids(length),
        logprobs=logprobs,
        finish=FinishReason.STOP if sample_id % 2 else FinishReason.LENGTH,
        seed=sample_id if seed is None else seed,
    )


def make_scored(sample_id, length=5, k=4, **optional):
    rng = np.random.default_rng(1000 + sample_id)
    logits = rng.normal(0.0, 3.0, (length, 50)).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :k].astype(np.int32)
    return Scored(
        rollout=make_rollout(sample_id, length),
        topk_ids=order,
        topk_logprobs=np.take_along_axis(logprobs, order, axis=1),
        teacher_logprobs=logprobs[:, 0],
        nll_teacher=float(rng.uniform(0, 3)),
        **optional,
    )


def ref(sample_id, shard=0):
    return SampleRef(sample_id, shard, 3, 10)


def assert_same_rollout(got, want):
    for name in ("sample_id", "prompt_index", "version", "finish", "seed"):
        assert getattr(got, name) == getattr(want, name)
    assert isinstance(got.finish, FinishReason)
    for name in ROLLOUT_ARRAYS:
        a, b = getattr(got, name), getattr(want, name)
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@contextmanager
def file_size_limit(limit):
    """A real refusal to write by the system, as a full disk or a quota gives it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

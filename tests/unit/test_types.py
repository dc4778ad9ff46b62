"""Records on their way between processes: the same on the other side."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from npd.types import EncodedPrompt, Row, SampleRef, SampleRequest


def ids(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("completion", [None, ids(), ids(5, 6)])
def test_a_prompt_is_the_same_once_sent_and_can_be_written_to(completion):
    prompt = EncodedPrompt(3, ids(1, 2, 3, 4)[::2], ids(9), completion, "42", "mathematics")
    (ask,) = pickle.loads(pickle.dumps((SampleRequest(7, 2**62, prompt),)))
    assert (ask.sample_id, ask.seed) == (7, 2**62)
    for name in ("index", "answer", "teacher"):
        assert getattr(ask.prompt, name) == getattr(prompt, name)
    for name in ("prompt_ids", "header_ids", "completion_ids"):
        got, want = getattr(ask.prompt, name), getattr(prompt, name)
        assert (got is None) == (want is None)
        if want is not None:
            assert got.dtype == np.int32
            assert got.flags.writeable
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_row_is_the_same_once_sent(count):
    row = Row(tuple(SampleRef(i, 2, 1, 50 + i) for i in range(count)))
    again = pickle.loads(pickle.dumps(row))
    assert again == row
    assert all(isinstance(ref, SampleRef) for ref in again.samples)

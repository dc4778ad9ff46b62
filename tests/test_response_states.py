"""Responses after one context: fed once, each response's states are what they are by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npd.models.loading import load_model
from npd.models.response_states import (
    _MIN_SHARED,
    _first_fit,
    _groups,
    _laid_out,
    _size,
    response_hidden,
)
from test_packed_models import PACKABLE, family_dir

# Of three contexts, one too short to share; responses of one token feed nothing of their own.
LENGTHS = {20: (7, 1, 12, 1, 3), 33: (4, 9), 5: (6, 2)}


def make_pairs(vocab=64, seed=0):
    """Responses to each context, in an order that parts those of one context."""
    rng = np.random.default_rng(seed)

    def ids(count):
        return rng.integers(0, vocab, count).astype(np.int32)

    contexts = {size: ids(size) for size in LENGTHS}
    pairs = [(contexts[size], ids(n)) for size, lengths in LENGTHS.items() for n in lengths]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@torch.no_grad()
def states_of(model, pairs, row_tokens, share):
    found, fed = {}, []
    backbone = getattr(model, model.base_model_prefix)
    hook = backbone.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for row, hidden in response_hidden(model, pairs, row_tokens, share=share):
        found |= zip(row, hidden.split([len(pairs[i][1]) for i in row]), strict=True)
    hook.remove()
    return [found[i] for i in range(len(pairs))], fed


@pytest.mark.parametrize("row_tokens", [1, 30, 60, 1000])
@pytest.mark.parametrize("family", PACKABLE)
def test_a_shared_context_changes_no_state(family, row_tokens, tmp_path):
    model = load_model(family_dir(family, PACKABLE[family], tmp_path, 0.2))
    pairs = make_pairs()
    shared, fed = states_of(model, pairs, row_tokens, share=True)
    apart, _ = states_of(model, pairs, 1, share=False)
    for got, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    own = sum(len(response) - 1 for _, response in pairs)
    if row_tokens == 1000:
        assert fed == [own + 20 + 33 + 5 * 2]


def test_a_context_is_fed_again_where_a_row_is_full(tmp_path):
    model = load_model(family_dir("Llama", PACKABLE["Llama"], tmp_path, 0.2))
    _, fed = states_of(model, make_pairs(), 42, share=True)
    assert max(fed) <= 42
    assert 63 + 36 < sum(fed) < sum(len(c) + len(y) - 1 for c, y in make_pairs())


def test_whole_documents_are_no_more_than_four_times_a_row():
    """Attention lays them out: a row of short responses to one long context would be many times."""
    context = np.arange(400, dtype=np.int32)
    pairs = [(context, np.arange(6, dtype=np.int32)) for _ in range(64)]
    groups = _groups(pairs, 800)
    assert sorted(i for group in groups for i in group.members) == list(range(64))
    assert [len(group.members) for group in groups] == [7] * 9 + [1]
    rows = _first_fit([(_size(g, pairs), _laid_out(g, pairs)) for g in groups], 800)
    assert all(sum(_laid_out(groups[i], pairs) for i in row) <= 4 * 800 for row in rows)


def test_a_window_reaches_back_from_a_response_into_the_context_it_shares(tmp_path):
    settings = {**PACKABLE["Llama"], "sliding_window": 6}
    model = load_model(family_dir("Mistral", settings, tmp_path, 0.2))
    shared, _ = states_of(model, make_pairs(), 1000, share=True)
    apart, _ = states_of(model, make_pairs(), 1000, share=False)
    for got, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@given(
    st.lists(st.tuples(st.sampled_from([3, _MIN_SHARED, 21]), st.integers(1, 30)), max_size=30),
    st.integers(1, 120),
)
def test_groups_hold_each_pair_once_within_a_row(shapes, capacity):
    pairs = [(np.full(c, c, np.int32), np.zeros(n, np.int32)) for c, n in shapes]
    groups = _groups(pairs, capacity)
    assert sorted(i for group in groups for i in group.members) == list(range(len(pairs)))
    for group in groups:
        assert all(len(pairs[i][0]) == len(group.context) for i in group.members)
        assert len(group.members) == 1 or _size(group, pairs) <= capacity
        assert len(group.members) == 1 or len(group.context) >= _MIN_SHARED

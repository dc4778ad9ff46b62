"""Packing against a naive best-fit-decreasing, exhaustive search, and its stated bounds."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npd.errors import InputError
from npd.pack import _FewOpenRows, _OpenRows, balance, efficiency, pack, pack_stream, row_cost

CAPACITIES = st.integers(1, 5000)


@st.composite
def problems(draw, max_size=60):
    capacity = draw(CAPACITIES)
    lengths = draw(st.lists(st.integers(1, capacity), max_size=max_size))
    return lengths, capacity


def naive_rooms(lengths, capacity):
    """Room left in each row by best-fit decreasing, written the slow and obvious way."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= length
    return rooms


def fewest_rows(lengths, capacity):
    """The optimum, by trying every assignment (small inputs only)."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best and index < len(lengths):
            return
        if index == len(lengths):
            best = min(best, len(rooms))
            return
        for i, room in enumerate(rooms):
            if room >= lengths[index]:
                place(index + 1, [*rooms[:i], room - lengths[index], *rooms[i + 1 :]])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


@given(problems())
def test_every_document_lies_in_one_row_that_holds_it(problem):
    lengths, capacity = problem
    rows = pack(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows)
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) >= math.ceil(sum(lengths) / capacity)


@given(problems())
def test_rows_are_those_of_naive_best_fit_decreasing(problem):
    lengths, capacity = problem
    rooms = [capacity - sum(lengths[i] for i in row) for row in pack(lengths, capacity)]
    assert sorted(rooms) == sorted(naive_rooms(lengths, capacity))


@given(problems(max_size=7))
def test_rows_are_within_the_bound_of_the_optimum(problem):
    lengths, capacity = problem
    assert len(pack(lengths, capacity)) <= 11 / 9 * fewest_rows(lengths, capacity) + 1


@pytest.mark.parametrize("capacity", [1, 2, 1023, 1024, 1025, 2047, 2048, 4097, 70_000])
@pytest.mark.parametrize("count", [200, 1100])
def test_capacities_around_word_borders(capacity, count):
    """Few documents and many: their open rows are kept in different ways."""
    rng = random.Random(capacity)
    sizes = [1, capacity, max(1, capacity - 1), max(1, capacity // 2), max(1, capacity // 3)]
    lengths = sizes + [rng.randint(1, capacity) for _ in range(count)]
    rooms = [capacity - sum(lengths[i] for i in row) for row in pack(lengths, capacity)]
    assert sorted(rooms) == sorted(naive_rooms(lengths, capacity))


@given(problems())
def test_open_rows_of_few_and_of_many_documents_are_found_alike(problem):
    lengths, capacity = problem
    few, many = _FewOpenRows(), _OpenRows(capacity)
    for row, length in enumerate(lengths):
        assert few.take(length) == many.take(length)
        few.add(capacity - length, row)
        many.add(capacity - length, row)


def test_order_is_decided_by_length_then_index():
    assert pack([3, 9, 5, 1], capacity=10) == [[1, 3], [2, 0]]
    assert pack([4, 4, 4, 4], capacity=8) == [[0, 1], [2, 3]]
    assert pack(np.array([4, 4, 4, 4], dtype=np.int32), capacity=8) == [[0, 1], [2, 3]]


def test_nothing_packs_to_nothing():
    assert pack([], capacity=8) == []
    assert efficiency([], [], 8) == 1.0


def test_a_document_that_fits_no_row_is_the_users_error():
    with pytest.raises(InputError, match=r"document 1 has 9 tokens, but a row holds 8.*row_tokens"):
        pack([8, 9, 1], capacity=8)


def test_an_empty_document_is_our_error():
    with pytest.raises(AssertionError):
        pack([4, 0], capacity=8)


def test_efficiency_is_the_share_of_room_used():
    assert efficiency([[1, 3], [2, 0]], [3, 9, 5, 1], 10) == pytest.approx(0.9)
    assert efficiency([[0]], [10], 10) == 1.0


def test_log_normal_lengths_fill_long_rows():
    rng = np.random.default_rng(0)
    lengths = (
        np.clip(rng.lognormal(math.log(454) - 0.32, 0.8, 20_000), 1, 4096).astype(int).tolist()
    )
    rows = pack(lengths, 32_768)
    assert efficiency(rows, lengths, 32_768) >= 0.99


# Documents that come one by one.


def naive_stream(lengths, capacity, window):
    """The rule of the stream, the slow and obvious way: rows, and what came before each went."""
    waiting, rows = [], []
    for index in range(len(lengths)):
        waiting.append(index)
        if len(waiting) == window:
            row, room = [], capacity
            while fitting := [i for i in waiting if lengths[i] <= room]:
                taken = max(fitting, key=lambda i: (lengths[i], -i)) if row else fitting[0]
                waiting.remove(taken)
                row.append(taken)
                room -= lengths[taken]
            rows.append(row)
    left = pack([lengths[i] for i in waiting], capacity)
    return rows, [[waiting[i] for i in row] for row in left]


@given(problems(), st.integers(1, 12))
def test_a_stream_gives_the_oldest_and_then_the_longest_that_fit(problem, window):
    lengths, capacity = problem
    early, late = naive_stream(lengths, capacity, window)
    assert list(pack_stream(lengths, capacity, window=window)) == early + late


@given(problems(), st.integers(1, 12))
def test_no_document_of_a_stream_waits_for_more_rows_than_the_window(problem, window):
    lengths, capacity = problem
    came = 0

    def arriving():
        nonlocal came
        for length in lengths:
            came += 1
            yield length

    gone, entered = set(), {}
    for place, row in enumerate(pack_stream(arriving(), capacity, window=window)):
        entered |= dict.fromkeys(set(range(came)) - set(entered), place)
        assert len(entered) - len(gone) <= window
        gone |= set(row)
        if came < len(lengths):
            assert all(place - entered[index] < window for index in row)
    assert gone == set(range(len(lengths)))


def test_a_stream_refuses_what_fits_no_row_when_it_comes():
    rows = pack_stream(iter([8, 7, 9]), capacity=8, window=1)
    assert [next(rows), next(rows)] == [[0], [1]]
    with pytest.raises(InputError, match=r"document 2 has 9 tokens, but a row holds 8"):
        next(rows)
    with pytest.raises(AssertionError):
        next(pack_stream([0], capacity=8))


def test_a_stream_fills_long_rows_nearly_as_well():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(454) - 0.32, 0.8, 5_000), 1, 4096).astype(int).tolist()
    assert efficiency(list(pack_stream(lengths, 32_768)), lengths, 32_768) >= 0.985


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 9))
def test_balance_gives_every_row_once_and_every_rank_some(costs, ranks):
    shares = balance(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert sum(map(bool, shares)) == min(ranks, len(costs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def in_step(costs, shares):
    """The time of ranks that wait for each other after every row."""
    turns = itertools.zip_longest(*([costs[i] for i in share] for share in shares), fillvalue=0)
    return sum(map(max, turns))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 3))
def test_no_other_assignment_takes_less(costs, ranks):
    found = in_step(costs, balance(costs, ranks))
    indices = range(len(costs))
    for order in itertools.permutations(indices):
        for ranked in itertools.product(range(ranks), repeat=len(costs)):
            shares = [[i for i in order if ranked[i] == rank] for rank in range(ranks)]
            assert found <= in_step(costs, shares)


def test_a_rows_cost_is_its_tokens_and_its_attention():
    assert row_cost([]) == 0.0
    assert row_cost([4096] * 8) < row_cost([32_768]) < 3 * row_cost([4096] * 8)
    # One long document beside three rows of short ones: two turns, not three.
    costs = [row_cost([32_768]), *[row_cost([1000] * 32)] * 3]
    assert [len(share) for share in balance(costs, 2)] == [2, 2]


def test_balance_by_hand():
    assert balance([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert balance([1.0], 3) == [[0], [], []]
    assert balance([0.0, 0.0, 0.0], 2) == [[0, 2], [1]]
    assert balance([3, 5, 4], 1) == [[1, 2, 0]]

"""Sampling is a function of (seed, epoch, position): nothing else may change it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.batches import batch, order, split
from atoll.errors import Invalid

rows = st.integers(1, 60)
seeds = st.integers(0, 2**40)


@given(st.integers(0, 200), st.floats(0, 1, exclude_max=True), seeds)
def test_split_covers_all_rows_once_and_leaves_some_on_each_side(count, holdout, seed):
    train, heldout = split(count, holdout, seed)
    assert sorted([*train, *heldout]) == list(range(count))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(heldout, np.sort(heldout))
    if holdout == 0:
        assert heldout.size == 0
    elif count >= 2:
        assert abs(heldout.size - count * holdout) <= 1
        assert train.size
        assert heldout.size


def test_split_is_drawn_by_the_seed():
    first, again, other = split(100, 0.2, 1), split(100, 0.2, 1), split(100, 0.2, 2)
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    assert first[1].size == 20


def test_random_numbers_stay_the_same_in_all_releases():
    assert order(0, 0, 10).tolist() == [4, 1, 6, 5, 9, 2, 8, 3, 7, 0]
    assert split(10, 0.3, 7)[1].tolist() == [2, 5, 9]


def test_epochs_have_orders_of_their_own_that_none_can_write_to():
    assert not np.array_equal(order(3, 0, 50), order(3, 1, 50))
    with pytest.raises(ValueError, match="read-only"):
        order(3, 0, 50)[0] = 1


@given(rows, st.integers(1, 90), seeds)
def test_each_example_comes_once_per_epoch_even_when_the_size_does_not_divide_the_rows(count, size, seed):
    batches = -(-3 * count // size)
    taken = np.concatenate([batch(seed, count, i * size, size) for i in range(batches)])
    for epoch in range(3):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(rows, st.integers(1, 90), seeds, st.integers(0, 500), st.integers(1, 7))
def test_ranks_together_take_the_batch_of_one_rank_in_near_equal_shares(count, size, seed, position, ranks):
    shares = [batch(seed, count, position, size, rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(shares), batch(seed, count, position, size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(rows, seeds, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=6))
def test_a_run_resumed_with_other_ranks_and_sizes_sees_the_same_stream(count, seed, legs):
    position, seen = 0, []
    for size, ranks in legs:
        seen += [i for rank in range(ranks) for i in batch(seed, count, position, size, rank, ranks)]
        position += size
    assert seen == batch(seed, count, 0, position).tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": 0, "position": 0, "size": 1}, "rows 0"),
        ({"rows": 5, "position": -1, "size": 1}, "position -1"),
        ({"rows": 5, "position": 0, "size": 0}, "size 0"),
        ({"rows": 5, "position": 0, "size": 2, "rank": 2, "ranks": 2}, "rank 2 of 2"),
        ({"rows": 5, "position": 0, "size": 4, "ranks": 2, "shares": (3, 2)}, r"shares \[3, 2\]: needs 2 .* to 4"),
        ({"rows": 5, "position": 0, "size": 4, "ranks": 2, "shares": (4,)}, "needs 2 numbers"),
        ({"rows": 5, "position": 0, "size": 4, "ranks": 2, "shares": (5, -1)}, "0 or more"),
    ],
)
def test_a_batch_from_nothing_is_refused(arguments, words):
    with pytest.raises(Invalid, match=words):
        batch(0, **arguments)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(holdout):
    with pytest.raises(Invalid, match="holdout"):
        split(10, holdout, 0)

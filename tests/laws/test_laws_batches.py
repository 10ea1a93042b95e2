"""The law of exact resume: an epoch has every example once, whoever takes it, in whatever shares, however often that
changes on the way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.batches import batch, order

seeds = st.integers(0, 2**40)


@st.composite
def legs(draw):
    """Return a group as it is for some batches: their size, and how they are cut, None for evenly."""
    ranks = draw(st.integers(1, 6))
    cut = draw(st.none() | st.lists(st.integers(1, 12), min_size=ranks, max_size=ranks).map(tuple))
    size = draw(st.integers(1, 40)) if cut is None else sum(cut)
    return draw(st.integers(1, 8)), size, ranks, cut


def seen(seed, rows, plan):
    """Return what all ranks take, batch by batch, in rank order; `plan` is of legs."""
    position, taken = 0, []
    for batches, size, ranks, cut in plan:
        for _ in range(batches):
            taken += [batch(seed, rows, position, size, rank, ranks, cut) for rank in range(ranks)]
            position += size
    return np.concatenate(taken)


@given(seeds, st.integers(1, 60), st.lists(legs(), min_size=1, max_size=8))
def test_an_epoch_has_each_example_once_when_ranks_and_shares_change_in_its_middle(seed, rows, plan):
    taken = seen(seed, rows, plan)
    whole, rest = divmod(len(taken), rows)
    for epoch in range(whole):
        assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len(set(taken[whole * rows :])) == rest


@given(seeds, st.integers(1, 60), st.lists(legs(), min_size=1, max_size=8))
def test_the_order_of_examples_does_not_depend_on_who_takes_them(seed, rows, plan):
    taken = seen(seed, rows, plan)
    epochs = [order(seed, epoch, rows) for epoch in range(len(taken) // rows + 1)]
    assert np.array_equal(taken, np.concatenate(epochs)[: len(taken)])


@given(seeds, st.integers(1, 60), legs(), st.integers(0, 400))
def test_each_rank_has_the_share_that_it_was_given(seed, rows, leg, position):
    _, size, ranks, cut = leg
    lengths = [len(batch(seed, rows, position, size, rank, ranks, cut)) for rank in range(ranks)]
    assert sum(lengths) == size
    if cut is None:
        assert max(lengths) - min(lengths) <= 1
    else:
        assert lengths == list(cut)


def test_a_run_that_lost_two_of_three_ranks_and_got_one_back_has_every_example_of_its_epoch_once():
    rows, size = 97, 12
    plan = [(3, size, 3, None), (2, size, 1, None), (2, size, 2, (9, 3)), (2, size, 2, (8, 4))]
    taken = seen(5, rows, plan)
    assert len(taken) == 9 * size
    assert sorted(taken[:rows]) == list(range(rows))


@pytest.mark.parametrize("shares", [(0, 4), (4, 0)])
def test_a_rank_may_have_no_share_at_all(shares):
    parts = [batch(1, 9, 3, 4, rank, 2, shares) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(parts), batch(1, 9, 3, 4))

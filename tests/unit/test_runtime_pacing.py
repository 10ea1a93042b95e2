"""What a site makes of its ranks' paces: pure, and settled after a few rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.runtime.balances import Balances
from atoll.runtime.pacing import Balance, fitting, joined, rebalanced, share_of, shares, stragglers, told
from atoll.spec.pace import MOST, Pace
from atoll.spec.plan import Layout

TWO = Layout(data=2)


def pace(*seconds, steps=50, **more):
    return Pace(steps=steps, step_seconds=seconds, **more)


speeds = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(speeds, st.integers(0, 300), st.integers(0, 3))
def test_shares_are_whole_sum_to_the_batch_and_leave_nobody_below_the_least(speeds, more, least):
    batch = max(1, least * len(speeds)) + more
    cut = shares(speeds, batch, least)
    assert sum(cut) == batch
    assert min(cut) >= least
    if all(batch * speed / sum(speeds) >= least for speed in speeds):
        wanted = [batch * speed / sum(speeds) for speed in speeds]
        assert all(abs(one - want) < 1 + 1e-6 for one, want in zip(cut, wanted, strict=True))


@given(speeds, st.integers(9, 300))
def test_who_is_faster_never_gets_less(speeds, batch):
    cut = shares(speeds, batch)
    assert all(a >= b for s, a in zip(speeds, cut, strict=True) for t, b in zip(speeds, cut, strict=True) if s > t)


def test_shares_go_by_largest_remainder():
    assert shares([2.0, 1.0], 16) == (11, 5)
    assert shares([1.0, 1.0, 1.0], 10) == (4, 3, 3)
    assert shares([100.0, 1.0, 1.0], 8) == (6, 1, 1)
    assert shares([0.1] * 4, 4) == (1, 1, 1, 1)


def test_a_straggler_is_held_to_the_median_and_found_after_three_steps():
    assert stragglers([1.0, 1.1, 0.9, 2.1], 3) == {3: 2.1}
    assert stragglers([1.0, 2.0], 3) == {1: 2.0}
    assert stragglers([1.0, 1.29], 3) == {}
    assert stragglers([1.0, 2.0], 2) == {}
    assert stragglers([1.0], 9) == {}


def test_paces_of_ranks_are_joined_each_for_its_part():
    one = Pace(
        steps=9,
        examples_per_second=10.0,
        tokens_per_second=100.0,
        flops_per_second=3e9,
        mfu=0.3,
        memory_bytes=5,
        memory_peak_bytes=9,
        step_seconds=(0.1,),
        loss=0.5,
        nodes=("a",),
        straggler="what a worker says of others is not asked for",
    )
    other = one.model_copy(update={"steps": 8, "mfu": 0.1, "memory_bytes": 7, "step_seconds": (0.2,), "nodes": ("b",)})
    assert joined([one, None, other]) == Pace(
        steps=8,
        examples_per_second=20.0,
        tokens_per_second=200.0,
        flops_per_second=6e9,
        mfu=6e9 / 4e10,
        memory_bytes=7,
        memory_peak_bytes=9,
        step_seconds=(0.1, 0.2),
        loss=0.5,
        nodes=("a", "b"),
    )
    assert joined([None, None]) is None
    unknown = joined([one, Pace(step_seconds=(0.1,))])
    assert unknown is not None
    assert (unknown.tokens_per_second, unknown.flops_per_second, unknown.mfu) == (None, None, None)


def test_what_user_code_may_have_said_is_joined_within_bounds():
    most = Pace(examples_per_second=MOST, flops_per_second=MOST, mfu=1e-300)
    assert joined([most, most]) == Pace(examples_per_second=MOST, flops_per_second=MOST, mfu=0.0)
    assert joined([Pace(flops_per_second=0.0, mfu=0.5)]) == Pace(flops_per_second=0.0)


def test_the_names_of_machines_stay_but_for_the_one_that_is_told_of():
    slow = Balance(straggler="rank 1 on b takes 2.0 times the median for an example")
    assert told(pace(1, 2, nodes=("a", "b")), slow) == pace(1, 2, straggler=slow.straggler)
    assert told(None, slow) is None


@pytest.mark.parametrize(("slow", "fixed"), [(2.0, 0.0), (2.0, 0.3), (8.0, 0.0), (1.4, 0.1)])
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_shares_settle_where_all_ranks_take_about_as_long(slow, fixed, batch):
    """A rank that is `slow`, where a step takes `fixed` seconds whatever its share."""

    def taken(cut):
        return tuple(fixed + each * rate / batch for each, rate in zip(cut, (1.0, slow), strict=True))

    balance, even = Balance(), taken((batch // 2, batch // 2))
    for _ in range(12):
        before = balance
        balance = rebalanced(balance, TWO, batch, pace(*taken(fitting(balance, TWO, batch) or (batch // 2,) * 2)))
    assert balance == before, "it does not swing"
    assert fixed or balance.straggler.startswith("rank 1 takes ")
    one = max(taken((1, 1))) - fixed  # what an example more makes of it
    best = fixed + slow / (1 + slow)
    assert max(taken(balance.shares)) <= 1.08 * best + one
    assert max(taken(balance.shares)) < max(even)


@pytest.mark.parametrize(
    ("layout", "batch", "measured"),
    [
        (TWO, 16, pace(1.0, 1.04)),  # too little to gain
        (TWO, 16, pace(1.0, 2.0, steps=2)),
        (TWO, 16, pace(0.001, 0.002)),  # too short to tell
        (TWO, 16, pace(1.0)),  # a rank told none
        (TWO, 16, pace(0.0, 1.0)),
        (TWO, 16, None),
        (TWO, 6, pace(1.0, 2.0)),  # an example more is a third
        (Layout(pipeline=2, data=2), 64, pace(1.0, 1.0, 2.0, 2.0)),
        (Layout(tensor=2, data=2), 64, pace(1.0, 1.0, 1.0, 2.0)),  # only one of two ranks of a share
        (Layout(), 64, pace(1.0)),
    ],
)
def test_shares_stay_even_where_nothing_is_won_or_known(layout, batch, measured):
    assert rebalanced(Balance(), layout, batch, measured).shares == ()


def test_shares_of_equal_ranks_are_cut_by_the_slowest_of_them():
    found = rebalanced(Balance(), Layout(tensor=2, data=2), 64, pace(1.0, 1.05, 2.0, 1.95))
    assert found.shares[0] > 36
    assert sum(found.shares) == 64


def test_shares_that_were_uneven_become_even_again():
    found = Balance(shares=(11, 5), straggler="rank 1 takes 2.0 times the median for an example")
    for _ in range(4):
        cut = fitting(found, TWO, 16) or (8, 8)
        found = rebalanced(found, TWO, 16, pace(*(each / 8 for each in cut)))
    assert found == Balance()


def test_shares_of_another_batch_or_layout_are_not_taken():
    assert fitting(Balance(shares=(11, 5)), TWO, 16) == (11, 5)
    for layout, batch in ((TWO, 17), (Layout(data=3), 16), (Layout(), 16)):
        assert fitting(Balance(shares=(11, 5)), layout, batch) == ()
    assert fitting(Balance(shares=(17, -1)), TWO, 16) == ()


def test_a_straggler_is_named_with_its_machine_and_told_once():
    first = rebalanced(Balance(), TWO, 16, pace(1.0, 2.14, nodes=("a", "b")))
    assert first.straggler == "rank 1 on b takes 2.1 times the median for an example"
    cut = first.shares
    again = rebalanced(first, TWO, 16, pace(cut[0] / 8, cut[1] / 8 * 2.5, nodes=("a", "b")))
    assert again.straggler == first.straggler, "with fewer examples, and still the same"
    assert rebalanced(again, TWO, 16, pace(*(each / 8 for each in fitting(again, TWO, 16)))).straggler == ""


def test_in_a_pipeline_ranks_are_held_to_those_of_their_own_stage():
    layout = Layout(pipeline=2, data=3)
    assert rebalanced(Balance(), layout, 60, pace(1, 1, 1, 4, 4, 4)).straggler == ""
    found = rebalanced(Balance(), layout, 60, pace(1, 1, 1, 4, 4, 9.2)).straggler
    assert found.startswith("rank 5 takes 2.3 times")


def test_ranks_count_through_the_innermost_axes_first():
    layout = Layout(pipeline=2, data=2, tensor=2)
    assert [share_of(layout, rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


# --- kept on disk


def test_a_round_done_again_takes_the_shares_that_it_took(tmp_path):
    kept = Balances(tmp_path)
    assert kept.of(3) == Balance()
    kept.keep(4, Balance(shares=(9, 7)))
    kept.keep(6, Balance(shares=(10, 6)))
    again = Balances(tmp_path)
    assert [again.of(position).shares for position in (3, 4, 5, 6, 9)] == [(), (9, 7), (9, 7), (10, 6), (10, 6)]


def test_nothing_is_written_that_is_not_new_and_what_is_long_over_goes(tmp_path):
    kept = Balances(tmp_path)
    kept.keep(4, Balance())
    assert list(tmp_path.iterdir()) == []
    for position in range(4, 9):
        kept.keep(position, Balance(shares=(9 + position, 7)))
    kept.keep(9, kept.of(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["balance-7.json", "balance-8.json"]


def test_a_file_that_is_spoilt_means_even_shares(tmp_path):
    kept = Balances(tmp_path)
    kept.keep(4, Balance(shares=(9, 7)))
    (tmp_path / "balance-4.json").write_text('{"shares": "many"}')
    assert kept.of(4) == Balance()

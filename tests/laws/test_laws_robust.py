"""The laws of robust merges: they are the mean where nobody is hostile and all agree, no order tells, and each stands
up to its number of hostile sites, whatever those send, and to no majority.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.outer.advance import Advance
from atoll.outer.merge import Update
from atoll.outer.optimiser import State
from atoll.outer.wire import CHUNK
from atoll.spec.sync import Sync

SIZE = 300
SITES = 10
RULES = {
    "mean": {"merge": "mean"},
    "median": {"merge": "median"},
    "trimmed_mean": {"merge": "trimmed_mean", "trim": 0.3},
    "multi_krum": {"merge": "multi_krum", "hostile": 3},
    "geometric_median": {"merge": "geometric_median"},
    "bound": {"merge": "mean", "bound": {"times": 1.0}},
    "bounded_median": {"merge": "median", "bound": {"norm": 10.0}},
}
STANDS = {"median": 4, "trimmed_mean": 3, "multi_krum": 3, "geometric_median": 4, "bound": 4, "bounded_median": 4}
HONEST = np.random.default_rng(5).normal(1.0, 0.2, (SITES, SIZE)).astype(np.float32)
SPREAD = float(np.linalg.norm(HONEST - HONEST.mean(axis=0), axis=1).max())
WILD = (-3e38, -1e12, -50.0, 50.0, 1e12, 3e38)


def point(rule):
    return Sync.model_validate(RULES[rule])


def merged(sync, vectors, order=None, threads=2, names="abcdefghij"):
    """The merged update, as the hub's step makes it from weights of zero; sites arrive in this order."""
    updates = [Update(name, 3.0, lambda at, v=v: v[at : at + CHUNK]) for name, v in zip(names, vectors, strict=False)]
    step = Advance(
        sync, np.zeros(len(vectors[0]), np.float32), [updates[i] for i in order or range(len(updates))], State()
    )
    return np.concatenate(list(step.pieces(threads)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_of_identical_updates_every_rule_is_the_mean_to_the_bit(rule, seed):
    same = np.random.default_rng(seed).normal(0, 0.1, SIZE).astype(np.float32)
    expected = merged(point("mean"), [same] * SITES)
    np.testing.assert_array_equal(expected, same)
    # Where each update is shortened to the median norm, all are as long as that.
    np.testing.assert_array_equal(merged(point(rule), [same] * SITES), expected)


@pytest.mark.parametrize("rule", RULES)
@given(order=st.permutations(range(SITES)))
def test_the_order_of_arrival_does_not_tell_in_a_bit(rule, order):
    vectors = [*HONEST[:7], *(1e6 * HONEST[7:])]
    np.testing.assert_array_equal(merged(point(rule), vectors, order), merged(point(rule), vectors))


@pytest.mark.parametrize("rule", RULES)
@given(names=st.permutations("abcdefghij"))
def test_who_sent_which_update_does_not_tell(rule, names):
    vectors = [*HONEST[:7], *(1e3 * HONEST[7:])]
    one, other = merged(point(rule), vectors), merged(point(rule), vectors, names=names)
    if rule == "geometric_median":  # its shares are float64 sums over the sites by name
        np.testing.assert_allclose(other, one, rtol=1e-6)
    else:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("rule", STANDS)
@pytest.mark.parametrize("wild", WILD)
def test_each_rule_stands_up_to_its_number_of_hostile_sites_whatever_they_send(rule, wild):
    hostile = STANDS[rule]
    vectors = [*HONEST[hostile:], *[np.full(SIZE, wild, np.float32)] * hostile]
    away = np.linalg.norm(merged(point(rule), vectors).astype(np.float64) - HONEST[hostile:].mean(axis=0))
    # A bound on norms lets the hostile choose a direction, so it moves as far as they are long.
    most = 2 * np.linalg.norm(HONEST, axis=1).max() * hostile / SITES if rule == "bound" else 3 * SPREAD
    assert away <= most * (1 + 1e-6)


@pytest.mark.parametrize("rule", sorted(set(STANDS) - {"bound", "bounded_median"}))
def test_no_rule_stands_up_to_a_majority(rule):
    vectors = [*HONEST[:4], *[np.full(SIZE, 1e6, np.float32)] * 6]
    assert np.linalg.norm(merged(point(rule), vectors)) > 1e5 * np.linalg.norm(HONEST[0])


def test_a_mean_stands_up_to_no_hostile_site_and_a_bound_to_any_number_up_to_its_norm():
    vectors = [*HONEST[:9], np.full(SIZE, 1e12, np.float32)]
    assert np.linalg.norm(merged(point("mean"), vectors)) > 1e10
    bounded = Sync.model_validate({"merge": "mean", "bound": {"norm": 2.0}})
    for hostile in range(SITES + 1):
        vectors = [*HONEST[hostile:], *[np.full(SIZE, 1e12, np.float32)] * hostile]
        assert np.linalg.norm(merged(bounded, vectors).astype(np.float64)) <= 2.0


@pytest.mark.parametrize("rule", ["trimmed_mean", "multi_krum"])
def test_one_hostile_site_more_than_a_rule_was_set_for_is_too_many(rule):
    sync = Sync.model_validate({**RULES[rule], **({"trim": 0.1} if rule == "trimmed_mean" else {"hostile": 1})})
    for hostile, stands in ((1, True), (4, False)):
        vectors = [*HONEST[hostile:], *[np.full(SIZE, 1e6, np.float32)] * hostile]
        assert bool(np.linalg.norm(merged(sync, vectors)) < 10 * np.linalg.norm(HONEST[0])) == stands


@pytest.mark.parametrize("rule", RULES)
def test_threads_do_not_tell_in_a_bit_over_many_windows(rule):
    vectors = [np.random.default_rng(i).normal(0, 1 + i, 3 * CHUNK + 7).astype(np.float32) for i in range(9)]
    one, *others = (merged(point(rule), vectors, threads=threads) for threads in (1, 2, 4))
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("rule", RULES)
def test_of_a_fragment_a_rule_sees_that_fragment_only(rule):
    sync = Sync.model_validate({**RULES[rule], "fragments": 3, "period": 3, "keep_optimiser": True})
    first, second = (vectors[:, :100] for vectors in (HONEST, 1e4 * HONEST[::-1]))
    state, start = State(), np.zeros(SIZE, np.float32)
    for turn, part in enumerate(itertools.islice(itertools.cycle((first, second)), 3)):
        updates = [
            Update(name, 1.0, lambda at, v=v: v[at : at + CHUNK]) for name, v in zip("abcdefghij", part, strict=True)
        ]
        step = Advance(sync, start, updates, state)
        start = np.concatenate(list(step.pieces()))
        state = step.state
        np.testing.assert_array_equal(start[100 * turn : 100 * turn + 100], merged(point(rule), part))

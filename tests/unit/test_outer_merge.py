"""Sums that forget no bit, robust rules, and updates that are not whole."""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from atoll.errors import Invalid
from atoll.outer.merge import Sum, Update, comparators, cut, merge, merging, stale
from atoll.outer.wire import CHUNK
from tests.unit.vectors import noise


def update(site, vector, weight=1.0, discount=1.0):
    return Update(site, weight, lambda offset: vector[offset : offset + CHUNK], discount)


def test_a_sum_is_the_exact_one_to_its_resolution():
    vectors, weights = [noise(50, seed, 10.0 ** (seed - 2)) for seed in range(5)], [3, 17, 1, 250, 0.5]
    total = Sum(50)
    for vector, weight in zip(vectors, weights, strict=True):
        total.add(0, vector, weight)
    exact = [
        float(sum(Fraction(float(v[i])) * Fraction(w) for v, w in zip(vectors, weights, strict=True)) / 4)
        for i in range(50)
    ]
    np.testing.assert_allclose(total.mean(4.0), exact, rtol=1e-15, atol=5 * 2.0**-62)


def test_terms_that_cancel_leave_the_small_one():
    total = Sum(1)
    for value in (3e9, 1e-9, -3e9):  # in float32, and nearly in float64, the small one would drown
        total.add(0, np.array([value], np.float32), 100.0)
    assert total.mean(100.0)[0] == pytest.approx(float(np.float32(1e-9)), rel=1e-6)


def test_a_sum_can_be_read_by_window():
    total = Sum(CHUNK + 10)
    total.add(CHUNK + 2, noise(5), 2.0)
    np.testing.assert_array_equal(total.mean(2.0, CHUNK + 2, 5), noise(5).astype(np.float64))
    assert not total.mean(2.0, 0, CHUNK).any()
    assert total.mean(2.0).shape == (CHUNK + 10,)


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, 0), (CHUNK - 1, 2), (CHUNK + 9, 2), (10**12, 1), (0, CHUNK + 1)]
)
def test_a_piece_that_leaves_its_window_is_refused(offset, size):
    with pytest.raises(Invalid, match="leave their window"):
        Sum(CHUNK + 10).add(offset, np.zeros(size, np.float32), 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_values_out_of_range_are_refused_and_change_nothing(value):
    total = Sum(2)
    total.add(0, np.array([1, 2], np.float32), 1.0)
    with pytest.raises(Invalid, match=r"finite|range"):
        total.add(0, np.array([1, value], np.float32), 1.0)
    np.testing.assert_array_equal(total.mean(1.0), [1, 2])


LARGEST = np.nextafter(np.float32(2.0**41), np.float32(0))


def test_a_sum_refuses_what_could_overflow_it_in_any_order():
    total, term = Sum(1), np.array([LARGEST], np.float32)
    with pytest.raises(Invalid, match="out of range"):
        total.add(0, np.array([2.0**41], np.float32), 1.0)
    for _ in range(3276):  # 63 bits, over 51 of the term and 49 of what it may carry
        total.add(0, term, 1.0)
    for one in (term, -term):
        with pytest.raises(Invalid, match="could pass"):
            total.add(0, one, 1.0)
    assert total.mean(1.0)[0] == 3276 * float(LARGEST)


@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-61, 2.0**-60, 0.5, 2.0**-11, 3 * 2.0**-11, 1 / 3, LARGEST])
def test_one_term_is_rounded_to_the_resolution_half_to_even(value):
    for sign in (1, -1):
        total = Sum(1)
        total.add(0, np.array([sign * value], np.float32), 1.0)
        exact = round(Fraction(float(np.float32(sign * value))) * 2**60)
        assert Fraction(float(total.mean(1.0)[0])) == Fraction(exact, 2**60)


FLOATS = st.floats(-(2.0**20), 2.0**20, width=32)
PIECE = st.tuples(arrays(np.float32, 3, elements=FLOATS), st.floats(0, 1e4))


@given(st.lists(PIECE, max_size=12), st.randoms(use_true_random=False))
def test_the_order_in_which_pieces_come_changes_no_bit(pieces, random):
    mixed, plain = Sum(3), Sum(3)
    for values, weight in random.sample(pieces, len(pieces)):
        mixed.add(0, values, weight)
    for values, weight in pieces:
        plain.add(0, values, weight)
    np.testing.assert_array_equal(mixed.mean(1.0), plain.mean(1.0))


def test_whole_windows_and_parts_of_them_add_up_to_the_same_bits_however_often_the_sum_is_read():
    vectors, cut_at, total, parts = [noise(CHUNK + 9, seed) for seed in range(3)], 1000, Sum(CHUNK + 9), Sum(CHUNK + 9)
    for weight, vector in enumerate(vectors, start=1):
        for offset in (0, CHUNK):
            total.add(offset, vector[offset : offset + CHUNK], weight)
        for start, stop in ((0, cut_at), (cut_at, CHUNK), (CHUNK, CHUNK + 9)):
            parts.add(start, vector[start:stop], weight)
        np.testing.assert_array_equal(total.mean(1.0), parts.mean(1.0))


def test_a_cleared_sum_is_as_new():
    total = Sum(CHUNK + 3)
    total.add(CHUNK, noise(3), 2.0**20)
    total.clear()
    total.add(CHUNK, noise(3, 1), 1.0)
    np.testing.assert_array_equal(total.mean(1.0, CHUNK), noise(3, 1).astype(np.float64))


def test_threads_may_add_in_windows_of_their_own():
    vectors = [noise(2 * CHUNK, seed) for seed in range(3)]
    alone, together = Sum(2 * CHUNK), Sum(2 * CHUNK)

    def fill(total, window):
        place = slice(window * CHUNK, (window + 1) * CHUNK)
        for weight, vector in enumerate(vectors, start=1):
            total.add(place.start, vector[place], weight)

    for window in range(2):
        fill(alone, window)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(fill, together, window) for window in range(2)]:
            done.result(timeout=60)
    np.testing.assert_array_equal(together.mean(6.0), alone.mean(6.0))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(Invalid, match="weight"):
        Sum(1).add(0, np.ones(1, np.float32), weight)
    with pytest.raises(Invalid, match="lyon"):
        merge("weighted_mean", 1, [update("lyon", noise(1), weight)])


def test_mean_counts_sites_and_weighted_mean_examples():
    updates = [update("a", np.array([0, 4], np.float32), 30), update("b", np.array([8, 0], np.float32), 10)]
    np.testing.assert_array_equal(merge("mean", 2, updates), [4, 2])
    np.testing.assert_array_equal(merge("weighted_mean", 2, updates), [2, 3])
    assert merge("mean", 2, updates).dtype == np.float32


def test_the_mean_of_one_update_is_that_update():
    vector = noise(2 * CHUNK + 7)
    np.testing.assert_array_equal(merge("weighted_mean", vector.size, [update("a", vector, 123)]), vector)


def test_no_examples_anywhere_is_refused():
    with pytest.raises(Invalid, match="above 0"):
        merge("weighted_mean", 2, [update("a", noise(2), 0), update("b", noise(2), 0)])


def test_a_site_without_examples_does_not_count():
    updates = [update("a", noise(2, 1), 5), update("b", noise(2, 2), 0)]
    np.testing.assert_array_equal(merge("weighted_mean", 2, updates), noise(2, 1))


def test_a_stale_update_moves_the_model_less_even_alone():
    half = stale(1.0, 3, 0.5)
    assert half == 0.5
    assert stale(20.0, 0, 0.5) == 20.0
    np.testing.assert_array_equal(merge("mean", 3, [update("a", noise(3), 9, half)]), noise(3) / 2)
    np.testing.assert_array_equal(merge("weighted_mean", 3, [update("a", noise(3), 8, half)]), noise(3) / 2)


def test_an_update_from_the_future_is_refused():
    with pytest.raises(Invalid, match="2 ahead"):
        stale(1.0, -2, 0.5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_median_is_the_coordinate_median(count):
    vectors = [noise(CHUNK + 3, seed) for seed in range(count)]
    merged = merge("median", CHUNK + 3, [update(f"s{i}", vector) for i, vector in enumerate(vectors)])
    for place in (0, 17, CHUNK - 1, CHUNK + 2):
        exact = statistics.median(float(vector[place]) for vector in vectors)
        assert merged[place] == np.float32(exact)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts(count):
    """A network that sorts every row of zeros and ones sorts everything (Knuth, 5.3.4, theorem Z)."""
    rows = [column.copy() for column in (np.arange(2**count)[:, None] >> np.arange(count) & 1).T]
    ones = sum(rows)
    for low, high in comparators(count):
        rows[low], rows[high] = np.minimum(rows[low], rows[high]), np.maximum(rows[low], rows[high])
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(row, ones >= count - place)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_robust_rules_are_free_of_order_to_the_sign_of_zero(rule):
    vectors = [np.array([value], np.float32) for value in (-0.0, 0.0, -0.0, 1.0, -1.0)]
    for order in ((0, 1, 2, 3, 4), (1, 0, 2, 4, 3), (4, 2, 0, 1, 3)):
        merged = merge(rule, 1, [update(f"s{i}", vectors[i]) for i in order], trim=0.2)
        assert merged.tobytes() == bytes(4)


def test_trimmed_mean_drops_the_ends_of_each_coordinate():
    vectors = np.array([[9, 1], [1, 2], [2, 3], [3, 9], [-99, 4]], np.float32)
    merged = merge("trimmed_mean", 2, [update(f"s{i}", vector) for i, vector in enumerate(vectors)], trim=0.2)
    np.testing.assert_array_equal(merged, [2, 3])


@pytest.mark.parametrize(
    ("updates", "trim", "expected"),
    [(4, 0.1, 1), (10, 0.1, 1), (30, 0.1, 3), (11, 0.1, 2), (3, 0.4, 1), (2, 0.4, 0), (1, 0.4, 0), (5, 0.0, 0)],
)
def test_the_share_cut_is_rounded_up_and_leaves_the_middle(updates, trim, expected):
    assert cut(updates, trim) == expected


@pytest.mark.parametrize("trim", [-0.1, 0.5, math.nan])
def test_trim_has_a_range(trim):
    with pytest.raises(Invalid, match=r"sync\.trim"):
        cut(4, trim)


@pytest.mark.parametrize("rule", ["mean", "weighted_mean", "median", "trimmed_mean"])
@pytest.mark.parametrize(
    "last",
    [noise(0), noise(2), noise(4), noise(3).reshape(1, 3), np.array([0, 0, np.nan], np.float32)],
)
def test_an_update_that_is_not_whole_is_refused_by_site(rule, last):
    whole = update("bern", noise(CHUNK + 3))
    assert merge(rule, CHUNK + 3, [whole]).shape == (CHUNK + 3,)
    with pytest.raises(Invalid, match="update of lyon"):
        merge(rule, CHUNK + 3, [whole, Update("lyon", 1.0, {0: noise(CHUNK), CHUNK: last}.__getitem__)])


@pytest.mark.parametrize("rule", ["mean", "weighted_mean", "median", "trimmed_mean"])
def test_windows_may_be_merged_in_any_order(rule):
    updates = [update(f"s{i}", noise(2 * CHUNK + 3, i), 10.0 + i) for i in range(5)]
    expected, at = merge(rule, 2 * CHUNK + 3, updates, 0.2), merging(rule, 2 * CHUNK + 3, updates, 0.2)
    for offset in (2 * CHUNK, 0, CHUNK, 0):
        np.testing.assert_array_equal(at(offset), expected[offset : offset + CHUNK])


def test_an_update_out_of_range_is_refused_by_site():
    with pytest.raises(Invalid, match=r"^update of lyon: from element 0 on: .* out of range"):
        merge("mean", 1, [update("lyon", np.array([1e30], np.float32))])


def test_nothing_to_merge_and_unknown_rules_are_refused():
    with pytest.raises(Invalid, match="none to merge"):
        merge("mean", 1, [])
    with pytest.raises(Invalid, match="'krum'"):
        merge("krum", 1, [update("a", noise(1))])

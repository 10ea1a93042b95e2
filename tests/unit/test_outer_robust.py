"""What looks at whole updates: norms, distances, the middle of all; and whom it names."""

import math

import numpy as np
import pytest

from atoll.errors import Invalid
from atoll.outer.merge import Update, merge
from atoll.outer.robust import judged
from atoll.outer.wire import CHUNK
from atoll.spec.sync import Sync
from tests.unit.vectors import noise

MEDIAN = Sync(merge="geometric_median")


def updates(vectors):
    flat = [np.asarray(vector, np.float32) for vector in vectors]
    return [Update(f"s{i}", 2.0 + i, lambda at, v=vector: v[at : at + CHUNK]) for i, vector in enumerate(flat)]


def outcome(sync, vectors, threads=2):
    """The merged vector and the sites that were found odd."""
    size = len(vectors[0])
    found = judged(sync, size, updates(vectors), threads)
    return merge(found.rule, size, found.updates, sync.trim), found.outliers


def krum(vectors, hostile):
    """Blanchard et al. (2017) to the letter: who is in the mean."""
    count = len(vectors)
    scores = []
    for i, one in enumerate(vectors):
        apart = sorted(float(np.sum((one.astype(float) - other) ** 2)) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(apart[: count - hostile - 2]))
    return sorted(range(count), key=lambda i: scores[i])[: count - hostile]


@pytest.mark.parametrize("hostile", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_multi_krum_is_the_mean_of_those_nearest_to_their_neighbours(hostile, seed):
    vectors = [noise(CHUNK + 9, 20 * seed + i, 1.0 + (i % 3)) for i in range(9)]
    made, odd = outcome(Sync(merge="multi_krum", hostile=hostile), vectors)
    chosen = krum(vectors, hostile)
    np.testing.assert_array_equal(made, merge("mean", CHUNK + 9, updates([vectors[i] for i in chosen])))
    assert odd == tuple(f"s{i}" for i in range(9) if i not in chosen)


@pytest.mark.parametrize(
    ("points", "middle"),
    [
        ([(0, 0), (1, 0), (0, 1)], ((3 - math.sqrt(3)) / 6, (3 - math.sqrt(3)) / 6)),  # Fermat's point
        ([(0, 0), (2, 0), (1, math.sqrt(3))], (1, 1 / math.sqrt(3))),  # the same from each corner
        ([(-7, 1), (0, 1), (1, 1), (2, 1), (900, 1)], (1, 1)),  # on a line it is the median
        ([(0, 0), (10, 0), (0, 10), (1, 1)], (1, 1)),  # one within the others
        ([(5, 5), (5, 5), (5, 5), (0, 0), (9, 1)], (5, 5)),  # a majority
    ],
)
def test_the_geometric_median_is_where_distances_add_up_to_the_least(points, middle):
    made, odd = outcome(MEDIAN, points)
    np.testing.assert_allclose(made, middle, atol=2e-4)
    assert odd == ()
    total = [sum(math.dist(at, point) for point in points) for at in (made, np.mean(points, axis=0))]
    assert total[0] <= total[1] + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_at_the_geometric_median_the_updates_pull_to_no_side(seed):
    vectors = [noise(40, 30 * seed + i, 1.0 + 5 * (i % 2)) for i in range(3 + seed)]
    made, _ = outcome(MEDIAN, vectors)
    apart = made - np.array(vectors, np.float64)
    assert np.linalg.norm((apart / np.linalg.norm(apart, axis=1, keepdims=True)).sum(axis=0)) < 1e-5


@pytest.mark.parametrize("far", [1e3, 1e9, 1e18, 3e38])
def test_one_that_is_very_far_off_costs_the_geometric_median_no_digits(far):
    near = [noise(50, seed, 0.01) for seed in range(6)]
    made, _ = outcome(MEDIAN, [*near, np.full(50, far, np.float32)])
    other, _ = outcome(MEDIAN, [*near, np.full(50, 10.0, np.float32)])
    np.testing.assert_allclose(made, other, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_bound_scales_what_is_longer_and_leaves_the_rest(threads):
    vectors = [noise(CHUNK + 3, seed, scale) for seed, scale in enumerate((0.1, 1.0, 2.0))]
    sync = Sync.model_validate({"merge": "mean", "bound": {"norm": 600.0}})
    found = judged(sync, CHUNK + 3, updates(vectors), threads)
    assert found.outliers == ("s2",)
    for update, vector in zip(found.updates, vectors, strict=True):
        made = np.concatenate([update.window(0), update.window(CHUNK)])
        norm, before = np.linalg.norm(made.astype(float)), np.linalg.norm(vector.astype(float))
        if update.site == "s2":
            assert 600 * (1 - 1e-6) < norm <= 600 < before
            np.testing.assert_allclose(made, vector * (600 / before), rtol=1e-6)
        else:
            np.testing.assert_array_equal(made, vector)


def test_a_bound_of_the_median_norm_takes_the_lower_of_the_middle_two():
    vectors = [np.full(4, size, np.float32) for size in (1, 2, 3, 9)]
    made, odd = outcome(Sync.model_validate({"merge": "mean", "bound": {"times": 1.25}}), vectors)
    np.testing.assert_allclose(made, np.full(4, (1 + 2 + 2.5 + 2.5) / 4), rtol=1e-6)
    assert odd == ("s2", "s3")


def test_a_bound_comes_before_the_rule_and_both_name_whom_they_found():
    vectors = [[1.0, 0.0], [1.1, 0.1], [0.9, -0.1], [1.0, 0.1], [0.0, 2.0], [5.0, 0.0]]
    sync = Sync.model_validate({"merge": "multi_krum", "hostile": 1, "bound": {"norm": 1.5}})
    made, odd = outcome(sync, vectors)
    assert odd == ("s4", "s5")
    np.testing.assert_allclose(made, np.mean([*vectors[:4], [1.5, 0.0]], axis=0), rtol=1e-6)


def test_zeros_from_most_leave_nothing_of_the_others_under_a_bound_by_the_median():
    sync = Sync.model_validate({"merge": "mean", "bound": {"times": 3.0}})
    made, odd = outcome(sync, [np.zeros(3), np.zeros(3), np.ones(3)])
    np.testing.assert_array_equal(made, np.zeros(3))
    assert odd == ("s2",)


@pytest.mark.parametrize("merge", ["mean", "weighted_mean", "median", "trimmed_mean"])
def test_nothing_is_read_where_no_whole_update_is_looked_at(merge):
    def unread(offset):
        raise AssertionError(offset)

    given = [Update(name, 1.0, unread) for name in "abc"]
    found = judged(Sync(merge=merge), 5, given)
    assert (found.rule, list(found.updates), found.outliers) == (merge, given, ())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sync", [MEDIAN, Sync(merge="multi_krum", hostile=0)])
def test_an_update_that_is_not_finite_or_not_whole_is_refused_by_site(sync, bad):
    whole = [noise(5, seed) for seed in range(3)]
    with pytest.raises(Invalid, match="update of s3: not finite in the window at 0"):
        judged(sync, 5, updates([*whole, [0, 0, bad, 0, 0]]))
    with pytest.raises(Invalid, match=r"update of s3: \(4,\) values at 0 where 5 are due"):
        judged(sync, 5, updates([*whole, np.zeros(4)]))


def test_too_few_updates_are_refused_in_the_words_of_the_sync():
    with pytest.raises(Invalid, match=r"^sync\.merge: multi_krum: needs 7 updates .* lower hostile to 1"):
        judged(Sync(merge="multi_krum", hostile=2), 5, updates([noise(5)] * 6))


def test_memory_does_not_grow_with_the_model():
    """Only so much of each update is held at a time as a window, whatever its size."""
    asked = []

    def window(offset):
        asked.append(offset)
        return np.ones(min(CHUNK, 40 * CHUNK - offset), np.float32)

    found = judged(Sync(merge="multi_krum", hostile=0), 40 * CHUNK, [Update(n, 1.0, window) for n in "abc"], threads=1)
    assert asked == [at for at in range(0, 40 * CHUNK, CHUNK) for _ in "abc"]
    assert len(found.updates) == 3

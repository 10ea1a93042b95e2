"""Graphs of the rows that two answers share: a cut of few rows is found wherever there is one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.cuts import divisible, shared

EDGES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=21)


@given(EDGES, st.integers(1, 9))
def test_vertices_can_be_parted_exactly_where_some_cut_has_fewer_rows(edges, least):
    one, two, rows = map(np.array, zip(*edges, strict=True))
    vertices = sorted({0, *one, *two})
    cuts = [
        sum(some for first, second, some in edges if (first in part) != (second in part))
        for size in range(1, len(vertices))
        for part in itertools.combinations(vertices, size)
    ]
    assert divisible(one, two, rows, least) == (min(cuts, default=least) < least)


def ring(vertices, rows, width):
    """Return edges from each vertex to the next ``width``, around a ring."""
    one = np.repeat(np.arange(vertices), width)
    two = (one + np.tile(np.arange(1, width + 1), vertices)) % vertices
    return one, two, np.full(len(one), rows)


@pytest.mark.parametrize(("vertices", "width", "rows"), [(3, 1, 4), (40, 3, 2), (101, 5, 1)])
def test_a_graph_of_light_edges_alone_is_told_exactly(vertices, width, rows):
    lightest = 2 * width * rows  # around one vertex: any more of them have more edges out
    assert not divisible(*ring(vertices, rows, width), lightest)
    assert divisible(*ring(vertices, rows, width), lightest + 1)


def test_what_would_take_long_to_tell_is_told_as_if_it_could_be_parted():
    assert divisible(*ring(2000, 1, 10), 20)
    assert not divisible(*ring(2000, 1, 10), 1)


def test_two_dense_parts_with_a_thin_bridge_are_parted_there():
    one, two, rows = ring(50, 2, 10)
    one, two, rows = np.r_[one, one + 50, 7], np.r_[two, two + 50, 81], np.r_[rows, rows, 3]
    assert divisible(one, two, rows, 4)
    assert not divisible(one, two, rows, 3)


def test_pairs_of_labels_are_counted_alike_where_they_are_few_and_where_they_are_many():
    one, two = np.array([0, 1, 1, 3], np.uint32), np.array([2, 0, 0, 1], np.uint32)
    assert [part.tolist() for part in shared(one, two, 3)] == [[0, 1, 3], [2, 0, 1], [1, 2, 1]]
    assert [part.tolist() for part in shared(one * 1000, two, 3)] == [[0, 1000, 3000], [2, 0, 1], [1, 2, 1]]

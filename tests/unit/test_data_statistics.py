"""Pooled moments equal those of the pooled rows, and no row is needed for them."""

import decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.statistics import column_sums, pool
from atoll.errors import Invalid, NotFound
from atoll.spec.event import ColumnSums
from atoll.spec.model import Moments

values = st.lists(st.none() | st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=30)


@given(st.lists(values, min_size=1, max_size=4))
def test_pooled_moments_equal_the_moments_of_all_rows(sites):
    tables = [pa.table({"x": pa.array(site, pa.float64())}) for site in sites]
    moments = pool(column_sums(table, ["x"]) for table in tables)["x"]
    present = np.array([x for site in sites for x in site if x is not None and x == x])
    assert moments.count == present.size
    if present.size == 0:
        assert (moments.mean, moments.std) == (0.0, 1.0)
        return
    scale = np.abs(present).max()
    assert moments.mean == pytest.approx(present.mean(), abs=1e-12 * scale)
    if moments.std != 1.0:
        subnormal = np.finfo(float).tiny  # squares below it keep fewer digits than a float has
        assert moments.std**2 == pytest.approx(present.var(), abs=max(1e-13 * scale**2, subnormal))
    else:
        assert present.std() <= 2e-7 * scale or present.std() == pytest.approx(1.0)


def test_only_the_given_rows_are_summed():
    table = pa.table({"age": [10, 20, None, 40], "well": [True, False, True, None]})
    sums = column_sums(table, ["age", "well"], np.array([0, 2, 3]))
    assert sums["age"] == ColumnSums(count=2, total=50.0, squares=1700.0)
    assert sums["well"] == ColumnSums(count=2, total=2.0, squares=2.0)


def test_each_numeric_type_is_summed_and_what_is_no_number_left_out():
    table = pa.table(
        {
            "i": pa.array([1, None, 3], pa.int16()),
            "f": pa.array([1.5, float("inf"), float("nan")], pa.float32()),
            "d": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.50")]),
            "c": pa.array([5, 5, None]).dictionary_encode(),
            "huge": [1e300, 2.0, -1e200],
        }
    )
    sums = column_sums(table, table.column_names)
    assert {name: (s.count, s.total) for name, s in sums.items()} == {
        "i": (2, 4.0),
        "f": (1, 1.5),
        "d": (2, 4.0),
        "c": (2, 10.0),
        "huge": (1, 2.0),
    }


@pytest.mark.parametrize("value", [0.0, 0.1, -37.7, 1e9 / 3])
def test_a_constant_column_has_deviation_one(value):
    tables = [pa.table({"x": [value] * n}) for n in (3, 700, 41)]
    moments = pool(column_sums(table, ["x"]) for table in tables)["x"]
    assert moments.std == 1.0
    assert moments.mean == pytest.approx(value, rel=1e-12)


def test_a_column_missing_at_one_site_is_pooled_from_the_others():
    empty, full = pa.table({"x": pa.array([None], pa.float64())}), pa.table({"x": [1.0, 3.0]})
    assert pool([column_sums(empty, ["x"]), column_sums(full, ["x"])])["x"] == Moments(count=2, mean=2.0, std=1.0)
    assert pool([column_sums(empty, ["x"])])["x"] == Moments(count=0, mean=0.0, std=1.0)


def test_a_column_of_text_is_refused_by_name_and_type():
    with pytest.raises(Invalid, match="'sex' is string"):
        column_sums(pa.table({"sex": ["m"]}), ["sex"])


def test_an_unknown_column_gets_its_near_miss():
    with pytest.raises(NotFound, match="did you mean 'age'"):
        column_sums(pa.table({"age": [1]}), ["agee"])


@pytest.mark.parametrize(
    "forged",
    [
        ColumnSums(count=0, total=1.0, squares=1.0),
        ColumnSums(count=1, total=1e300, squares=1.0),
        ColumnSums(count=5, total=1.0, squares=-1.0),
        ColumnSums(count=1, total=1.0, squares=1.7e308),
    ],
)
def test_sums_that_no_column_has_are_refused(forged):
    with pytest.raises(Invalid, match="'x'"):
        pool([{"x": ColumnSums(count=2, total=1.0, squares=1.0)}, {"x": forged}])

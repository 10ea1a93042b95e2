"""Rows of a request: typed like the training data, refused field by field."""

from datetime import date

import pyarrow as pa
import pytest

from atoll.errors import Invalid
from atoll.serving.rows import Columns

TYPES = {
    "age": "int64",
    "chol": "double",
    "ratio": "float",
    "sex": "string",
    "fbs": "bool",
    "ward": "dictionary<values=string, indices=int32, ordered=0>",
    "pixels": "list<item: float>",
    "pair": "fixed_size_list<element: int32 not null>[2]",
    "seen": "date32[day]",
    "at": "timestamp[ns, tz=UTC]",
    "address": "struct<street: string>",
}
GOOD = {
    "age": 54,
    "chol": 233,
    "ratio": 0.5,
    "sex": "Male",
    "fbs": True,
    "ward": "b",
    "pixels": [0, 0.5],
    "pair": [1, 2],
    "seen": "2026-11-02",
    "at": "2026-11-02T08:00:00+00:00",
}


def test_a_row_becomes_the_datasets_columns_in_its_order():
    columns = Columns(TYPES)
    columns.check(GOOD)
    table = columns.table([dict(reversed(GOOD.items()))])
    assert table.column_names == list(TYPES)
    assert table.schema.field("age").type == pa.int64()
    assert table.schema.field("pixels").type == pa.list_(pa.float32())
    row = table.to_pylist()[0]
    assert (row["chol"], row["sex"], row["seen"], row["pair"]) == (233.0, "Male", date(2026, 11, 2), [1, 2])
    assert row["address"] is None


def test_what_a_row_leaves_out_is_a_null_of_its_type():
    table = Columns({"age": "int64", "sex": "string"}).table([{}, {"age": None, "sex": "Male"}])
    assert table.schema.types == [pa.int64(), pa.string()]
    assert table.to_pylist() == [{"age": None, "sex": None}, {"age": None, "sex": "Male"}]


def test_a_whole_number_written_with_a_point_is_an_integer():
    columns = Columns({"age": "int64"})
    columns.check({"age": 54.0})
    assert columns.table([{"age": 54.0}]).to_pylist() == [{"age": 54}]


def test_an_integer_beyond_64_bits_is_a_double_like_any_other():
    columns = Columns({"chol": "double"})
    columns.check({"chol": 10**25})
    assert columns.table([{"chol": 10**25}]).to_pylist() == [{"chol": 1e25}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"agee": 1}, "rows.0: unknown field 'agee'; did you mean 'age'?"),
        ({"age": "old"}, "rows.0.age: 'old' is not a int64; send a whole number"),
        ({"age": 3.7}, "rows.0.age: 3.7 is not a int64"),
        ({"age": 1 << 70}, "rows.0.age: 1180591620717411303424 is not"),
        ({"age": True}, "rows.0.age: True is not"),
        ({"chol": True}, "rows.0.chol: True is not a double; send a finite number"),
        ({"chol": float("nan")}, "rows.0.chol: nan is not"),
        ({"chol": 10**400}, "rows.0.chol: 1000"),
        ({"ratio": 1e300}, "rows.0.ratio: 1e+300 is not a float"),
        ({"sex": 1}, "rows.0.sex: 1 is not a string; send a text"),
        ({"sex": "\ud800"}, "rows.0.sex: '\\ud800' is not a string"),
        ({"sex": {"a": 1}}, "rows.0.sex: a table is not a string"),
        ({"fbs": 1}, "rows.0.fbs: 1 is not a bool; send true or false"),
        ({"ward": 3}, "rows.0.ward: 3 is not a dictionary"),
        ({"pixels": [1, "a"]}, "rows.0.pixels: [1, 'a'] is not a list<item: float>; send a list"),
        ({"pixels": 1}, "rows.0.pixels: 1 is not"),
        ({"pair": [1]}, "rows.0.pair: [1] is not"),
        ({"seen": "yesterday"}, "rows.0.seen: 'yesterday' is not a date32[day]; send an ISO 8601 text"),
        ({"at": "9999-01-01"}, "rows.0.at: '9999-01-01' is not"),
        ({"address": "x"}, "rows.0.address: a column of type struct<street: string> cannot be sent"),
    ],
)
def test_a_row_that_cannot_be_an_input_is_told_by_field_and_value(row, words):
    with pytest.raises(Invalid) as caught:
        Columns(TYPES).check(row)
    assert str(caught.value).startswith(words)


def test_without_columns_types_follow_from_the_values():
    columns = Columns({})
    rows = [{"prompt": "def ", "n": 3}, {"prompt": None, "n": 1.5, "on": True, "xs": [1, 2]}]
    for row in rows:
        columns.check(row)
    table = columns.table(rows)
    assert table.schema.types == [pa.string(), pa.float64(), pa.bool_(), pa.list_(pa.float64())]
    assert table.to_pylist()[1] == {"prompt": None, "n": 1.5, "on": True, "xs": [1.0, 2.0]}


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], float("inf"), "\udc00"])
def test_without_columns_a_value_is_still_checked(value):
    with pytest.raises(Invalid, match=r"^rows\.0\.x: "):
        Columns({}).check({"x": value})


def test_without_columns_rows_that_disagree_are_told():
    with pytest.raises(Invalid, match="'x' are not all of one type"):
        Columns({}).table([{"x": 1}, {"x": "one"}])

"""Rows of a request checked one by one and turned into a typed Arrow table, before anything is computed."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds

from atoll.errors import Invalid
from atoll.spec.document import near_miss

Row = Mapping[str, Any]  # column -> JSON value

_LIST = re.compile(r"(large_)?list<\w+: (.+?)( not null)?>")
_FIXED = re.compile(r"fixed_size_list<\w+: (.+?)( not null)?>\[(\d{1,6})\]")
_DICTIONARY = re.compile(r"dictionary<values=(\w+), indices=\w+, ordered=[01]>")
_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), tz=([\w/+:-]{1,40})\]")


class Columns:
    """The columns a model was trained on; a field that a row leaves out is a null of its column's type.

    Without any, a row may have any fields: numbers become double, texts string, truth values bool.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._types = {name: _arrow(text) for name, text in columns.items()}
        self._words = dict(columns)

    def check(self, row: Row, place: str = "rows.0") -> None:
        """Raise `Invalid`, naming the field and its value, when the row cannot be an input."""
        for name, value in row.items():
            where = f"{place}.{name}"
            if not self._types:
                _free(name, value, where)
            elif name not in self._types:
                raise Invalid(f"{place}: unknown field {name!r}{near_miss(name, list(self._types))}")
            elif value is not None:
                self._fitting(name, value, where)

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Return checked rows as a table with one row each, its columns in the dataset's order."""
        types = self._types or _free_types(rows)
        return pa.table({name: _array(name, [row.get(name) for row in rows], kind) for name, kind in types.items()})

    def _fitting(self, name: str, value: Any, where: str) -> None:
        kind = self._types[name]
        if kind is None:
            raise Invalid(f"{where}: a column of type {self._words[name]} cannot be sent in a request; leave it out")
        if not _fits(value, kind):
            raise Invalid(f"{where}: {_shown(value)} is not a {self._words[name]}; send {_wanted(kind)}")


def _arrow(text: str) -> pa.DataType | None:
    """Parse the name of an Arrow type; None for one that JSON cannot carry."""
    if found := _LIST.fullmatch(text):
        inner = _plain(found[2])
        return None if inner is None else pa.large_list(inner) if found[1] else pa.list_(inner)
    if found := _FIXED.fullmatch(text):
        inner = _plain(found[1])
        return None if inner is None else pa.list_(inner, int(found[3]))
    if found := _DICTIONARY.fullmatch(text):
        inner = _plain(found[1])
        return None if inner is None else pa.dictionary(pa.int32(), inner)
    if found := _ZONED.fullmatch(text):
        return pa.timestamp(found[1], found[2])
    kind = _plain(text)
    return _of(text, kinds.is_date, kinds.is_timestamp) if kind is None else kind


def _plain(text: str) -> pa.DataType | None:
    return _of(text, kinds.is_boolean, kinds.is_integer, kinds.is_floating, _is_text)


def _of(text: str, *allowed: Callable[[pa.DataType], bool]) -> pa.DataType | None:
    try:
        kind = pa.type_for_alias(text)
    except ValueError:
        return None
    return kind if any(is_kind(kind) for is_kind in allowed) else None


def _fits(value: Any, kind: pa.DataType) -> bool:
    # Arrow alone would cut 3.7 to 3, take true for 1.0 and turn 1e300 into an infinite float32.
    if kinds.is_dictionary(kind):
        return _fits(value, kind.value_type)
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        sized = not kinds.is_fixed_size_list(kind) or (isinstance(value, list) and len(value) == kind.list_size)
        return isinstance(value, list) and sized and all(_fits(one, kind.value_type) for one in value)
    if kinds.is_boolean(kind):
        return isinstance(value, bool)
    if kinds.is_date(kind) or kinds.is_timestamp(kind):
        return isinstance(value, str) and _moment(value, kind) is not None
    if _is_text(kind):
        return _is_unicode(value)
    return _number_fits(value, kind)


def _number_fits(value: Any, kind: pa.DataType) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        exact = float(value)
        if kinds.is_float64(kind):
            return math.isfinite(exact)
        if kinds.is_integer(kind) and not (isinstance(value, int) or exact.is_integer()):
            return False
        return math.isfinite(exact) and math.isfinite(
            pa.scalar(exact if kinds.is_floating(kind) else int(value), kind).as_py()
        )
    except (OverflowError, pa.ArrowInvalid):
        return False


def _moment(text: str, kind: pa.DataType) -> date | datetime | None:
    try:
        moment = date.fromisoformat(text) if kinds.is_date(kind) else datetime.fromisoformat(text)
        pa.scalar(moment, kind)  # nanoseconds end in the year 2262
    except (ValueError, OverflowError):
        return None
    return moment


def _array(name: str, values: list[Any], kind: pa.DataType | None) -> pa.Array:
    if kind is None:
        return pa.nulls(len(values))
    try:
        if kinds.is_date(kind) or kinds.is_timestamp(kind):
            values = [value and _moment(value, kind) for value in values]
        elif kinds.is_integer(kind) or kinds.is_floating(kind):  # Arrow takes no integer beyond 64 bits for a double
            number = int if kinds.is_integer(kind) else float
            values = [value if value is None else number(value) for value in values]
        return pa.array(values, type=kind)
    except (ValueError, TypeError) as error:  # free rows may disagree: 1 in one, "one" in another
        raise Invalid(f"rows: the values of {name!r} are not all of one type ({error}); send them alike") from None


def _is_unicode(value: Any) -> bool:
    # JSON can spell half of a surrogate pair, which is no text and has no UTF-8.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _free(name: str, value: Any, where: str) -> None:
    if not _is_unicode(name):
        raise Invalid(f"{where!r}: the field's name is not Unicode text")
    flat = value if isinstance(value, list) else [value]
    for one in flat:
        if not (one is None or isinstance(one, bool) or _is_unicode(one) or _number_fits(one, pa.float64())):
            raise Invalid(f"{where}: {_shown(one)} is not a number, a text, a truth value or a list of them")


def _free_types(rows: Sequence[Row]) -> dict[str, pa.DataType | None]:
    types: dict[str, pa.DataType | None] = {}
    for row in rows:
        for name, value in row.items():
            if types.get(name) is None:
                types[name] = _free_type(value)
    return types


def _free_type(value: Any) -> pa.DataType | None:
    if isinstance(value, list):
        inner = next((kind for one in value if (kind := _free_type(one)) is not None), pa.float64())
        return pa.list_(inner)
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, str):
        return pa.string()
    return None if value is None else pa.float64()


def _is_text(kind: pa.DataType) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _wanted(kind: pa.DataType) -> str:
    if kinds.is_boolean(kind):
        return "true or false"
    if kinds.is_integer(kind):
        return "a whole number in its range, or null"
    if kinds.is_floating(kind):
        return "a finite number, or null"
    if kinds.is_date(kind) or kinds.is_timestamp(kind):
        return "an ISO 8601 text such as 2026-11-02"
    return "a text, or null" if _is_text(kind) or kinds.is_dictionary(kind) else "a list of such values"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

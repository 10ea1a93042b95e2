"""SQL where the data are: each site answers with partial aggregates of groups large enough, and the hub merges them.

What a site gives away: for each group its key, its row count and the partials. A group with fewer rows than the
dataset's minimum is held back, and so is one in which an aggregate rests on fewer values than that (but on some: that
none is there at all may be told), or in which its CAST leaves out or changes so few: they are what it differs in from
the column itself. That groups were held back is told where they have that many rows together; how many is not, as that
could hang on one row. The minimum and maximum of a group are exact values of one row each; an owner who minds must
refuse queries by policy. Which rows an answer tells of goes to `answered`, against those who ask twice and subtract.

Errors tell too. So a computation that fails on a row (overflow, a cast that does not fit) yields a missing value
instead, as do infinities, NaN and values of 1e140 or more, and no message quotes the data.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.data.answered import Selection
from atoll.data.catalogue import require_columns
from atoll.data.engine import connect
from atoll.data.expression import quoted
from atoll.data.grammar import Order, Output, Query, parse
from atoll.errors import Invalid, Unavailable
from atoll.spec.event import Group, Result

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

__all__ = ["Query", "answer", "merge", "parse"]

MOST_GROUPS = 10_000
_LARGEST = 1e140  # squares of smaller values, summed over any table that exists, stay finite
_INTEGERS = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_REALS = ("FLOAT", "DOUBLE", "HUGEINT", "UHUGEINT", "DECIMAL")
_TIMES = ("DATE", "TIME", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS")
_SPREADS = ("var_pop", "var_samp", "stddev_pop", "stddev_samp")

Value = str | int | float | bool | None


def answer(
    query: Query, table: "pa.Table", min_group: int, admit: Callable[[Selection], object]
) -> tuple[tuple[Group, ...], bool]:
    """Answer at a site; return its groups and whether it held some back. ``admit`` is told before which rows that tells
    of, and raises where it must not.

    A partial is (n,) for count, (n, sum) for sum and mean, (n, value) for min and max, and (n, mean, sum of squared
    deviations) for variance and deviation, n being the number of values present. Integer sums are exact, others are
    Kahan sums in float64. Keys that are dates or times are given as text. Raises `NotFound` for a missing column,
    `Invalid` where an aggregate or a key does not fit a column's type, `Unavailable` when memory does not suffice.
    """
    import duckdb

    require_columns(query.columns, table.column_names, f"sql: dataset {query.dataset!r}")
    try:
        with connect() as engine:
            engine.register("dataset", _finite(table, query.columns))
            rows, suppressed, selection = _grouped(engine, query, table.num_rows, min_group)
    except duckdb.BinderException as error:  # it knows names and types, no values
        raise Invalid(f"sql: {str(error).splitlines()[0].rstrip('.')}; change the expression") from None
    except duckdb.OutOfMemoryException:
        raise Unavailable("sql: the query needs more memory than a site gives it; group by fewer columns") from None
    except duckdb.Error as error:
        raise Invalid(f"sql: it cannot be computed here ({type(error).__name__}); ask something simpler") from None
    admit(selection)
    return tuple(_group(query, row) for row in rows), suppressed


def merge(query: Query, parts: Iterable[tuple[Sequence[Group], bool]]) -> Result:
    """Merge what `answer` gave at each site into the answer over all rows that were not held back.

    Counts and integer sums are exact. Other sums are added without further rounding (`math.fsum`), and variances
    by the formula of Chan, Golub and LeVeque (1983), which does not cancel: both agree with one engine over the
    pooled rows to about 1e-12 of their size. Without ORDER BY, rows come in the order of their keys. Raises
    `Invalid` for groups that do not fit the query.
    """
    gathered: dict[tuple[Value, ...], list[Group]] = {}
    suppressed = False
    for groups, held_back in parts:
        if len(groups) > MOST_GROUPS:
            raise Invalid(f"sql: a site answered with {len(groups)} groups; {MOST_GROUPS} is the most")
        suppressed = suppressed or held_back
        for group in groups:
            _check(query, group)
            gathered.setdefault(group.key, []).append(group)
    rows: list[tuple[Value, ...]] = []
    for key, groups in gathered.items():
        keys = iter(key)
        rows.append(
            tuple(next(keys) if output.function is None else _merged(output, groups) for output in query.outputs)
        )
    by_key = tuple(Order(index, False, False) for index, out in enumerate(query.outputs) if out.function is None)
    for order in reversed((*query.order, *by_key)):  # stable: the last criterion first
        rows.sort(key=lambda row, order=order: _rank(row[order.output], order), reverse=order.descending)
    columns = tuple(output.name for output in query.outputs)
    return Result(columns=columns, rows=tuple(rows[: query.limit]), suppressed=suppressed)


# --- at the site ----------------------------------------------------------------------------------------------


def _finite(table: "pa.Table", columns: Sequence[str]) -> "pa.Table":
    """Keep only the columns asked for, with NaN and infinities as missing, and number the rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kept: dict[str, Any] = {}
    for name in columns:
        column = table.column(name)
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float32()) if pa.types.is_float16(column.type) else column  # unknown to duckdb
            missing = pa.scalar(None, column.type)
            column = pc.if_else(pc.is_finite(column), column, missing)  # pyright: ignore[reportAttributeAccessIssue]
        kept[name] = column
    return pa.table({**kept, _number(columns): np.arange(table.num_rows, dtype=np.uint32)})


def _number(columns: Sequence[str]) -> str:
    """Return a name for the rows' numbers that is no column's, whatever its case."""
    return "row" + "_" * max((len(name) for name in columns), default=0)


def _grouped(
    engine: "duckdb.DuckDBPyConnection", query: Query, count: int, min_group: int
) -> tuple[list[tuple[Any, ...]], bool, Selection]:
    """Return a row for each group that may be told (key, row count, all partials), whether some were held back as far
    as that may be told, and which of the ``count`` rows all of this is of."""
    columns = [f"TRY({output.sql}) AS k{i}" for i, output in enumerate(query.keys)]
    columns += [f"TRY({output.sql or 'true'}) AS x{i}" for i, output in enumerate(query.aggregates)]
    columns += [f"{output.cast or 'NULL'} AS o{i}" for i, output in enumerate(query.aggregates)]
    conditions = " AND ".join(query.conditions)
    where = f" WHERE TRY(CAST(({conditions}) AS BOOLEAN))" if conditions else ""
    columns.append(f"{quoted(_number(query.columns))} AS number")
    rows = f"SELECT {', '.join(columns)} FROM dataset{where}"  # noqa: S608 - all of it was written by `Reader`
    types = [str(kind).partition("(")[0] for kind in engine.sql(f"{rows} LIMIT 0").types]  # DECIMAL(9,2) is DECIMAL

    split = len(query.keys)
    named = [f"{_key(output, types[i], f'k{i}')} AS g{i}" for i, output in enumerate(query.keys)]
    grouped = f" GROUP BY {', '.join(f'g{i}' for i in range(split))}" if split else ""
    named.append("count(*) AS rows")
    told = f"rows >= {min_group:d}"
    whole = "true"
    for i, output in enumerate(query.aggregates):
        kind = types[split + i]
        named += [f"{sql} AS a{i}_{j}" for j, sql in enumerate(_partials(output, kind, f"x{i}"))]
        told += f" AND (a{i}_0 = 0 OR a{i}_0 >= {min_group:d})"
        if output.cast:
            value = f"x{i}" if kind in _INTEGERS else _real(f"x{i}")
            for odd in (f"o{i} IS NOT NULL AND {value} IS NULL", _changed(f"o{i}", value)):
                whole += f" AND count(*) FILTER ({odd}) NOT BETWEEN 1 AND {min_group - 1:d}"
    named += [f"{whole} AS whole", "list(number) AS numbers"]

    every = f"SELECT {', '.join(named)} FROM ({rows}){grouped}"  # noqa: S608
    every = f"SELECT *, {told} AND whole AS told, row_number() OVER () AS place FROM ({every})"  # noqa: S608
    engine.execute(f"CREATE TEMP TABLE groups AS {every}")
    found = engine.execute("SELECT count(*) FILTER (told), sum(rows) FILTER (NOT told) FROM groups").fetchone()
    kept, held_rows = found or (0, None)
    if kept > MOST_GROUPS:
        raise Invalid(f"sql: GROUP BY: makes {kept} groups; {MOST_GROUPS} is the most, group more coarsely")
    ours = "whole, numbers, told, place"
    groups = engine.execute(f"SELECT * EXCLUDE ({ours}) FROM groups WHERE told ORDER BY place").fetchall()  # noqa: S608
    labels = np.zeros(count, np.uint32)
    members = engine.execute("SELECT numbers FROM groups WHERE told AND rows > 0 ORDER BY place").fetchnumpy()
    for number, numbers in enumerate(members["numbers"], 1):
        labels[np.asarray(numbers, np.int64)] = number
    # Of a query without keys there is one group in any case, so that it is held back tells of no row.
    held_back = held_rows is not None and (held_rows >= min_group or not split)
    return groups, held_back, Selection(labels, _words(query, groups))


def _words(query: Query, groups: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    """Return how the rows of each group were asked for: as a condition without keys would have it."""

    def joined(*more: str) -> str:
        return " AND ".join(sorted({*query.conditions, *more}))

    keys = [output.sql for output in query.keys]
    return tuple(
        joined(*(f"({sql} = {_spelt(value)})" for sql, value in zip(keys, group, strict=False))) for group in groups
    )


def _spelt(value: Value) -> str:
    """Return a key as a condition would have it."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else str(value).lower()


def _key(output: Output, kind: str, column: str) -> str:
    if kind in _REALS:
        return _real(column)
    if kind in _TIMES:
        return f"CAST({column} AS VARCHAR)"
    if kind in _INTEGERS or kind in ("VARCHAR", '"NULL"', "NULL"):
        return column
    raise Invalid(f"sql: GROUP BY {output.name}: it is {kind} here; group by numbers, text, booleans, dates or times")


def _real(column: str) -> str:
    """Cast to float64; a value beyond what can be squared becomes missing, and so do NaN and infinities."""
    return f"CASE WHEN abs(CAST({column} AS DOUBLE)) < {_LARGEST} THEN CAST({column} AS DOUBLE) END"


def _changed(column: str, value: str) -> str:
    """Tell whether a CAST makes another number of a column's value, be that a number or text.

    Integers beyond 2**53 can be alike as float64 and are none the less others.
    """
    real, exact = ([f"TRY_CAST({one} AS {kind})" for one in (column, value)] for kind in ("DOUBLE", "HUGEINT"))
    apart = f"{real[0]} IS DISTINCT FROM {real[1]}"
    return f"{value} IS NOT NULL AND ({apart} OR (abs({real[0]}) >= 2**53 AND {exact[0]} IS DISTINCT FROM {exact[1]}))"


def _partials(output: Output, kind: str, column: str) -> list[str]:
    if output.function == "count":
        return [f"count({column if kind not in _REALS else _real(column)})"]
    if kind not in (*_INTEGERS, *_REALS, '"NULL"', "NULL"):
        raise Invalid(f"sql: {output.name}: its expression is {kind} here; it needs numbers, cast it or choose another")
    exact = kind in _INTEGERS
    value = f"CAST({column} AS HUGEINT)" if exact else _real(column)
    if output.function in ("min", "max"):
        return [f"count({value})", f"{output.function}({value})"]
    if output.function in ("sum", "mean"):
        return [f"count({value})", f"sum({value})" if exact else f"fsum({value})"]
    real = _real(column)
    return [f"count({real})", f"favg({real})", f"var_pop({real}) * count({real})"]


def _width(output: Output) -> int:
    return 1 if output.function == "count" else 3 if output.function in _SPREADS else 2


def _group(query: Query, row: tuple[Any, ...]) -> Group:
    at = len(query.keys)
    key, rows = row[:at], row[at]
    at += 1
    partials: dict[str, tuple[float | int | None, ...]] = {}
    for output in query.aggregates:
        partials[output.name] = row[at : at + _width(output)]
        at += _width(output)
    return Group(key=key, rows=rows, partials=partials)


# --- at the hub -----------------------------------------------------------------------------------------------


def _check(query: Query, group: Group) -> None:
    """Refuse a group that no site following this module could have made: it came from another party."""
    fits = len(group.key) == len(query.keys) and set(group.partials) == {out.name for out in query.aggregates}
    fits = fits and group.rows < 2**53
    if not fits or not all(_fits(output, group.partials[output.name], group.rows) for output in query.aggregates):
        raise Invalid("sql: a site answered with a group that does not fit the query; leave that site out")


def _fits(output: Output, part: Sequence[float | int | None], rows: int) -> bool:
    """Bound every number, so that merging cannot overflow."""
    if len(part) != _width(output):
        return False
    count, *values = part
    if not isinstance(count, int) or not 0 <= count <= rows:
        return False
    if count == 0:
        return all(value is None for value in values)
    if output.function in _SPREADS:
        mean, squares = values
        return _within(mean, _LARGEST) and _within(squares, count * 4 * _LARGEST**2) and (squares or 0) >= 0
    return all(_within(value, count * _LARGEST) for value in values)


def _within(value: float | int | None, bound: float) -> bool:
    return value is not None and abs(value) <= bound


def _merged(output: Output, groups: Sequence[Group]) -> float | int | None:
    parts = [part for group in groups if (part := group.partials[output.name])[0]]  # sites without a value say nothing
    count = sum(int(part[0] or 0) for part in parts)
    if output.function == "count":
        return count
    if not parts:
        return None
    if output.function in _SPREADS:
        return _spread(output.function, parts)
    values = [part[1] for part in parts if part[1] is not None]
    if output.function == "min":
        return min(values)
    if output.function == "max":
        return max(values)
    total = sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)
    return total / count if output.function == "mean" else total


def _spread(function: str | None, parts: Sequence[tuple[float | int | None, ...]]) -> float | None:
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        n, other, more = int(part[0] or 0), float(part[1] or 0), float(part[2] or 0)
        shift = other - mean
        squares += more + shift * shift * (count * n / (count + n))
        mean += shift * n / (count + n)
        count += n
    divisor = count if function in ("var_pop", "stddev_pop") else count - 1
    if divisor == 0:
        return None
    variance = squares / divisor
    return math.sqrt(variance) if function in ("stddev_pop", "stddev_samp") else variance


def _rank(value: Value, order: Order) -> tuple[int, int, Any]:
    """Sort key: nulls first or last whatever the direction, then numbers before text."""
    if value is None:
        return (0 if order.nulls_first != order.descending else 2, 0, 0)
    return (1, isinstance(value, str), value)

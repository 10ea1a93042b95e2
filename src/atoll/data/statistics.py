"""Pooled statistics of columns: each site gives count, sum and sum of squares; the hub makes mean and deviation.

A sum of squares about a shift loses fewer digits, but a good shift is the mean, which no site may know before all have
answered. So the sums are plain, in float64, and a spread below about 1e-7 of the mean cannot be told from none.
A value that is missing, not a number, or too large to be squared (1e140 and more) is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from atoll.data.catalogue import require_columns
from atoll.errors import Invalid
from atoll.spec.event import ColumnSums
from atoll.spec.model import Moments

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST = 1e140  # its square, summed over any table that exists, is finite
_NOISE = 64 * 2.0**-52  # relative rounding of a pairwise sum of squares, with room


def column_sums(table: "pa.Table", columns: Sequence[str], rows: np.ndarray | None = None) -> dict[str, ColumnSums]:
    """Sum each column over `rows` (int indices; all rows when None).

    Raises `NotFound` for a column that is not there and `Invalid` for one that is neither numeric nor boolean.
    """
    require_columns(columns, table.column_names, "data.statistics")
    sums: dict[str, ColumnSums] = {}
    for name in columns:
        values = _values(table.column(name), name)
        chosen = values if rows is None else values[rows]
        present = chosen[np.abs(chosen) < LARGEST]  # NaN compares false
        sums[name] = ColumnSums(count=present.size, total=float(present.sum()), squares=float(np.square(present).sum()))
    return sums


def pool(parts: Iterable[Mapping[str, ColumnSums]]) -> dict[str, Moments]:
    """Merge the sites' sums into mean and population standard deviation of each column.

    The merge is exact rational arithmetic; what error there is was in the sums. A constant column, or one without
    any value, has a deviation of 1.0, so that dividing by it is safe; without any value the mean is 0. Raises
    `Invalid` for sums that no column has: they came from another party.
    """
    gathered: dict[str, list[ColumnSums]] = {}
    for part in parts:
        for name, sums in part.items():
            _check(sums, name)
            gathered.setdefault(name, []).append(sums)
    return {name: _moments(all_sums) for name, all_sums in gathered.items()}


def _moments(parts: list[ColumnSums]) -> Moments:
    count = sum(part.count for part in parts)
    if not count:
        return Moments(count=0, mean=0.0, std=1.0)
    mean = sum(Fraction(part.total) for part in parts) / count
    square = sum(Fraction(part.squares) for part in parts) / count
    variance = square - mean * mean
    if variance <= square * Fraction(_NOISE):
        return Moments(count=count, mean=float(mean), std=1.0)
    return Moments(count=count, mean=float(mean), std=math.sqrt(variance))


def _check(sums: ColumnSums, name: str) -> None:
    largest = Fraction(LARGEST)
    total, squares = Fraction(sums.total), Fraction(sums.squares)
    if abs(total) > sums.count * largest or not 0 <= squares <= sums.count * largest * largest:
        raise Invalid(f"sums of column {name!r}: {sums.count} values cannot sum to these; ask that site again")


def _values(column: "pa.ChunkedArray", name: str) -> np.ndarray:
    """Return the column as float64, with NaN for a missing value."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise Invalid(f"data.statistics: column {name!r} is {kind}; name columns of numbers or booleans only")
    return column.cast(pa.float64(), safe=False).to_numpy()

"""How updates become one: exact streaming sums and robust rules, the same bits in whatever order sites arrive."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atoll.errors import Invalid
from atoll.outer.wire import CHUNK

Rule = Literal["mean", "weighted_mean", "median", "trimmed_mean"]

_PIECE = 1 << 14  # elements worked on at a time, so that the temporaries stay in cache
_HIGH = 2.0**20  # the high limb counts units of 2**-20
_LOW = 2.0**40  # the low limb counts units of 2**-60
_LIMIT = 2**63 - 1
_CARRY = 2**39  # one term moves the low limb by at most this; counted into the reach it guards both limbs


@dataclass(frozen=True, slots=True)
class Update:
    """One site's decoded update: `chunks()` gives (offset, float32 values) on the grid of `CHUNK`, in offset order.

    `weight` is its number of examples; `discount` scales it down for staleness (see `stale`). `chunks` may be called
    more than once.
    """

    site: str
    weight: float
    chunks: Callable[[], Iterator[tuple[int, np.ndarray]]]
    discount: float = 1.0


@dataclass(slots=True, eq=False)
class Sum:
    """A weighted sum of vectors that does not depend, in any bit, on the order in which pieces arrive.

    Each element is held in fixed point as two int64: a term t = float64(weight) * float64(x) adds rint(t * 2**20) to
    the high limb and the rest in units of 2**-60 to the low one. Integer addition is associative, so sites and chunks
    may come in any order, and a piece can be taken out again exactly. Resolution 2**-60; range |sum| < 2**43, less
    2**19 for each term. Memory: 16 bytes an element, however many sites.
    """

    size: int  # the receiver's own count of elements, never a number from a message
    _high: np.ndarray = field(init=False, repr=False)
    _low: np.ndarray = field(init=False, repr=False)
    _reach: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._high = np.zeros(self.size, np.int64)
        self._low = np.zeros(self.size, np.int64)
        # By window, what the sums could reach if every term had the same sign: order-free, unlike the sums themselves.
        self._reach = [0] * -(-self.size // CHUNK)

    def add(self, offset: int, values: np.ndarray, weight: float) -> None:
        """Add `weight * values` from element `offset`; a piece lies within one window of `CHUNK` elements.

        Raises `Invalid`, with the sum as it was, for a piece out of place, a weight below 0, and values that are
        not finite or out of range.
        """
        reach = self._checked(offset, values, weight)
        window = offset // CHUNK
        if self._reach[window] + reach > _LIMIT:
            raise Invalid(f"update: the sum at elements {offset} on could pass 2**43; clip updates on the wire")
        self._reach[window] += reach
        self._accumulate(offset, values, weight, np.add)

    def remove(self, offset: int, values: np.ndarray, weight: float) -> None:
        """Take out exactly what `add` with the same arguments put in, for an update that died half way."""
        reach = self._checked(offset, values, weight)
        window = offset // CHUNK
        if self._reach[window] < reach:
            raise Invalid(f"update: the piece at element {offset} was never added; remove only what was added")
        self._reach[window] -= reach
        self._accumulate(offset, values, weight, np.subtract)

    def mean(self, weight: float, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return the sum over `weight` as float64, for the whole vector or `length` elements from `offset`."""
        if not 0 < weight < math.inf:
            raise Invalid(f"weight: {weight}: the updates' total must be above 0; have a site with examples take part")
        place = slice(offset, None if length is None else offset + length)
        mean = self._low[place] / _LOW
        mean += self._high[place]
        mean /= weight * _HIGH
        return mean

    def _checked(self, offset: int, values: np.ndarray, weight: float) -> int:
        """Return the largest magnitude that this piece can add to a limb."""
        end = offset + values.size
        if (
            values.ndim != 1
            or not values.size
            or offset < 0
            or end > self.size
            or offset // CHUNK != (end - 1) // CHUNK
        ):
            raise Invalid(f"update: {values.shape} values at {offset} leave their window; cut them at {CHUNK} elements")
        top, bottom = float(values.max()), float(values.min())
        if not (math.isfinite(top) and math.isfinite(bottom)):
            raise Invalid(f"update: not finite in the piece at element {offset}; send finite values")
        if not 0 <= weight < math.inf:
            raise Invalid(f"weight: {weight}: must be finite and not below 0; send the number of examples")
        reach = max(top, -bottom) * float(weight) * _HIGH
        if reach >= _LIMIT:
            raise Invalid(
                f"update: {max(top, -bottom):g} at weight {weight:g} is out of range; clip updates on the wire"
            )
        return math.ceil(reach) + _CARRY

    def _accumulate(self, offset: int, values: np.ndarray, weight: float, combine: np.ufunc) -> None:
        for start in range(0, values.size, _PIECE):
            term = np.multiply(values[start : start + _PIECE], float(weight) * _HIGH, dtype=np.float64)
            high = np.rint(term)
            term -= high  # exact: a multiple of the term's last bit, and no larger than the term
            term *= _LOW
            place = slice(offset + start, offset + start + term.size)
            combine(self._high[place], high.astype(np.int64), out=self._high[place])
            combine(self._low[place], np.rint(term, out=term).astype(np.int64), out=self._low[place])


def stale(weight: float, versions_behind: int, exponent: float) -> float:
    """Return weight / (1 + versions behind)**exponent, the polynomial discount of FedBuff (Nguyen et al., 2022)."""
    if versions_behind < 0:
        raise Invalid(
            f"version: {-versions_behind} ahead of the hub's; an update starts from a version already given out"
        )
    return weight / (1 + versions_behind) ** exponent


def merge(rule: Rule, size: int, updates: Sequence[Update], trim: float = 0.0) -> np.ndarray:
    """Return the merged update, float32 of shape (size,), bit-equal under any order of `updates`.

    mean: every update counts 1. weighted_mean: its `weight`. Both multiply a term by its `discount` and divide by the
    undiscounted weights, so that stale updates move the model less even when they come alone (FedBuff divides by the
    buffer's size). median, trimmed_mean: by coordinate (Yin et al., 2018), without weights; trimmed_mean cuts the share
    `trim` off each end, rounded up to whole updates so that a small fleet is protected too, down to the median.
    Memory: 16 bytes an element for means, O(updates x CHUNK) for the others, besides the result.

    Raises `Invalid`, naming the site, for an update that does not cover [0, size) exactly once or is not finite.
    """
    if not updates:
        raise Invalid("updates: none to merge; wait for at least one site")
    if rule in ("mean", "weighted_mean"):
        return _weighted(size, updates, [update.weight if rule == "weighted_mean" else 1.0 for update in updates])
    if rule == "median":
        return _robust(size, updates, (len(updates) - 1) // 2)
    if rule == "trimmed_mean":
        return _robust(size, updates, cut(len(updates), trim))
    raise Invalid(f"sync.merge: {rule!r}: there is mean, weighted_mean, median, trimmed_mean")


def cut(updates: int, trim: float) -> int:
    """Return how many updates `trimmed_mean` drops at each end; at least one or two always remain."""
    if not 0 <= trim < 0.5:
        raise Invalid(f"sync.trim: {trim}: must be from 0 to below 0.5; set trim: 0.1")
    return min(math.ceil(trim * updates - 1e-9), (updates - 1) // 2)


def _weighted(size: int, updates: Sequence[Update], weights: list[float]) -> np.ndarray:
    for update, weight in zip(updates, weights, strict=True):
        if not (0 <= weight < math.inf and 0 <= update.discount <= 1):
            raise Invalid(
                f"update of {update.site}: weight {weight}, discount {update.discount}: "
                "a weight is finite and not below 0, a discount from 0 to 1; send the number of examples"
            )
    total = Sum(size)
    for update, weight in zip(updates, weights, strict=True):
        for offset, values in _windows(update, size):
            try:
                total.add(offset, values, weight * update.discount)
            except Invalid as error:
                raise Invalid(f"{update.site}: {error}") from None
    merged = np.empty(size, np.float32)
    over = math.fsum(weights)  # exactly rounded, hence free of order
    for offset in range(0, size, CHUNK):
        merged[offset : offset + CHUNK] = total.mean(over, offset, CHUNK)
    return merged


def _robust(size: int, updates: Sequence[Update], drop: int) -> np.ndarray:
    """Mean of what is left of each coordinate's sorted values; the median is this at its limit."""
    merged = np.empty(size, np.float32)
    for aligned in zip(*(_windows(update, size) for update in updates), strict=True):
        offset = aligned[0][0]
        values = np.stack([window for _, window in aligned])
        values.sort(axis=0)  # sorted first, so that the mean below adds in an order of its own
        merged[offset : offset + CHUNK] = values[drop : len(values) - drop].mean(axis=0, dtype=np.float64)
    return merged


def _windows(update: Update, size: int) -> Iterator[tuple[int, np.ndarray]]:
    expected = 0
    for offset, values in update.chunks():
        if offset != expected or offset >= size or values.shape != (min(CHUNK, size - offset),):
            raise Invalid(
                f"update of {update.site}: {values.shape} values at {offset} where element {expected} of {size} "
                "is next; send each window once, in order"
            )
        if not np.isfinite(values).all():
            raise Invalid(f"update of {update.site}: not finite in the window at element {offset}; send finite values")
        yield offset, values
        expected += values.size
    if expected != size:
        raise Invalid(f"update of {update.site}: ends at element {expected} of {size}; send it whole")

"""How updates become one: exact streaming sums and robust rules, the same bits in whatever order sites arrive."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atoll.errors import Invalid
from atoll.outer.room import PIECE, room
from atoll.outer.wire import CHUNK

Rule = Literal["mean", "weighted_mean", "median", "trimmed_mean"]  # the others of a sync come to these: `outer.robust`

_HIGH = 2.0**10  # the high limb counts units of 2**-10
_LOW = 2.0**60  # the low limb counts units of 2**-60
# In [1.5 * 2**52, 2**53) units a float64 holds whole units only: to add this rounds a small number to them, half to
# even, and its bits, taken as an integer, are then those of the constant plus that many units.
_TO_HIGH, _TO_LOW = 1.5 * 2.0**52 / _HIGH, 1.5 * 2.0**52 / _LOW
_HIGH_BITS, _LOW_BITS = (int(np.float64(number).view(np.int64)) for number in (_TO_HIGH, _TO_LOW))
_TERM = 2.0**41  # terms stay below: 2**51 units of the high limb
_LIMIT = 2**63 - 1
_WORD = 2**64
_CARRY = 2**49  # one term moves the low limb by at most this; counted into the reach it guards both limbs


@dataclass(frozen=True, slots=True)
class Update:
    """One site's decoded update: `window(offset)` gives the float32 values of the window of `CHUNK` that begins there.

    `weight` is its number of examples, and `sites` of how many sites it is the mean; `discount` scales it down for
    staleness (see `stale`). Threads may ask for windows at the same time, in any order and more than once; what a
    thread gets is good until it asks again, whichever update of the round.
    """

    site: str
    weight: float
    window: Callable[[int], np.ndarray]
    discount: float = 1.0
    sites: int = 1


@dataclass(slots=True, eq=False)
class Sum:
    """A weighted sum of vectors that does not depend, in any bit, on the order in which pieces arrive.

    Each element is held in fixed point as two int64: a term t = float64(weight) * float64(x) adds rint(t * 2**10) to
    the high limb and the rest, to units of 2**-60, to the low one. Integer addition is associative, so sites and chunks
    may come in any order. Resolution 2**-60; a term is below 2**41, a sum
    below 2**53, and at most 2**14 - 1 terms meet in an element. Memory: 16 bytes an element, however many sites.

    Threads may work at the same time, each in windows of its own: nothing is shared between windows, and numpy lets go
    of the interpreter's lock in every pass. Two threads in one window need a lock.
    """

    size: int  # the receiver's own count of elements, never a number from a message
    _high: np.ndarray = field(init=False, repr=False)
    _low: np.ndarray = field(init=False, repr=False)
    _reach: list[int] = field(init=False, repr=False)
    _owed: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._high = np.zeros(self.size, np.int64)
        self._low = np.zeros(self.size, np.int64)
        # By window, what the sums could reach if every term had the same sign: order-free, unlike the sums themselves.
        self._reach = [0] * -(-self.size // CHUNK)
        # By window, how often the limbs hold the constants besides the units. Integers modulo 2**64 forget nothing, so
        # the constants of all terms are taken off at once, when the sum is read.
        self._owed = [0] * len(self._reach)

    def add(self, offset: int, values: np.ndarray, weight: float) -> None:
        """Add `weight * values` from element `offset`; a piece lies within one window of `CHUNK` elements.

        Raises `Invalid`, with the sum as it was, for a piece out of place, a weight below 0, and values that are
        not finite or out of range.
        """
        reach = self._checked(offset, values, weight)
        window = offset // CHUNK
        if self._reach[window] + reach > _LIMIT:
            raise Invalid(f"the sum at elements {offset} on could pass 2**53 or 2**14 terms; clip updates on the wire")
        self._reach[window] += reach
        self._accumulate(offset, values, weight)

    def clear(self) -> None:
        """Set the sum back to zero, to use its memory again."""
        self._high.fill(0)
        self._low.fill(0)
        self._reach = [0] * len(self._reach)
        self._owed = [0] * len(self._owed)

    def mean(self, weight: float, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return the sum over `weight` as float64, for the whole vector or `length` elements from `offset`."""
        mean = np.empty(self.size - offset if length is None else length)
        self.mean_into(mean, weight, offset)
        return mean

    def mean_into(self, mean: np.ndarray, weight: float, offset: int = 0) -> None:
        """Write the sum over `weight`, from element `offset` on, rounded once to what `mean` holds."""
        if not 0 < weight < math.inf:
            raise Invalid(f"weight: {weight}: the updates' total must be above 0; have a site with examples take part")
        for window in range(offset // CHUNK, -(-(offset + mean.size) // CHUNK)):
            self._settle(window)
        for start in range(0, mean.size, PIECE):
            piece = mean[start : start + PIECE]
            place = slice(offset + start, offset + start + piece.size)
            units = room.first[: piece.size]
            np.multiply(self._low[place], _HIGH / _LOW, out=units)
            np.add(units, self._high[place], out=units)
            np.divide(units, weight * _HIGH, out=units)
            piece[:] = units

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
            raise Invalid(f"{values.shape} values at {offset} leave their window; cut them at {CHUNK} elements")
        top, bottom = float(values.max()), float(values.min())
        if not (math.isfinite(top) and math.isfinite(bottom)):
            raise Invalid(f"not finite in the piece at element {offset}; send finite values")
        if not 0 <= weight < math.inf:
            raise Invalid(f"weight: {weight}: must be finite and not below 0; send the number of examples")
        term = max(top, -bottom) * float(weight)
        if term >= _TERM:
            raise Invalid(f"{max(top, -bottom):g} at weight {weight:g} is out of range; clip updates on the wire")
        return math.ceil(term * _HIGH) + _CARRY

    def _accumulate(self, offset: int, values: np.ndarray, weight: float) -> None:
        for start in range(0, values.size, PIECE):
            piece = values[start : start + PIECE]
            term, high = room.first[: piece.size], room.second[: piece.size]
            place = slice(offset + start, offset + start + piece.size)
            np.copyto(term, piece)
            term *= float(weight)
            np.add(term, _TO_HIGH, out=high)
            np.add(self._high[place], high.view(np.int64), out=self._high[place])
            high -= _TO_HIGH
            term -= high  # exact: a multiple of the term's last bit, and no larger than the term
            term += _TO_LOW
            np.add(self._low[place], term.view(np.int64), out=self._low[place])
        window = offset // CHUNK
        if values.size == min(CHUNK, self.size - window * CHUNK):
            self._owed[window] += 1
        else:
            self._take_off(slice(offset, offset + values.size), 1)

    def _settle(self, window: int) -> None:
        if self._owed[window]:
            self._take_off(slice(window * CHUNK, (window + 1) * CHUNK), self._owed[window])
            self._owed[window] = 0

    def _take_off(self, place: slice, times: int) -> None:
        for limb, constant in ((self._high, _HIGH_BITS), (self._low, _LOW_BITS)):
            words = limb[place].view(np.uint64)
            words -= np.uint64(times * constant % _WORD)


def stale(weight: float, versions_behind: int, exponent: float) -> float:
    """Return weight / (1 + versions behind)**exponent, the polynomial discount of FedBuff (Nguyen et al., 2022)."""
    if versions_behind < 0:
        raise Invalid(
            f"version: {-versions_behind} ahead of the hub's; an update starts from a version already given out"
        )
    return weight / (1 + versions_behind) ** exponent


def merge(rule: Rule, size: int, updates: Sequence[Update], trim: float = 0.0) -> np.ndarray:
    """Return the merged update, float32 of shape (size,), whole; see `merging`."""
    at = merging(rule, size, updates, trim)
    merged = np.empty(size, np.float32)
    for offset in range(0, size, CHUNK):
        merged[offset : offset + CHUNK] = at(offset)
    return merged


def merging(rule: Rule, size: int, updates: Sequence[Update], trim: float = 0.0) -> Callable[[int], np.ndarray]:
    """Return what merges the window at an offset, to float32 bit-equal under any order of `updates`.

    mean: every update counts its `sites`. weighted_mean: its `weight`. Both multiply a term by its `discount` and
    divide by the undiscounted weights, so that stale updates move the model less even when they come alone (FedBuff
    divides by the buffer's size). median, trimmed_mean: by coordinate (Yin et al., 2018), without weights; trimmed_mean
    cuts the share `trim` off each end, rounded up to whole updates so that a small fleet is protected too, down to the
    median.

    Windows may be merged in any order. The function holds its own room and a result is good until its next call, so it
    is for one thread; another makes its own. Memory: O(CHUNK), and O(updates x CHUNK) for the median and trimmed mean.

    It raises `Invalid`, naming the site, for a window of another length or one that is not finite.
    """
    if not updates:
        raise Invalid("updates: none to merge; wait for at least one site")
    if rule in ("mean", "weighted_mean"):
        return _weighted(size, updates, [_counted(rule, update) for update in updates])
    if rule == "median":
        return _robust(size, updates, (len(updates) - 1) // 2)
    if rule == "trimmed_mean":
        return _robust(size, updates, cut(len(updates), trim))
    raise Invalid(f"sync.merge: {rule!r}: there is mean, weighted_mean, median, trimmed_mean")


def _counted(rule: Rule, update: Update) -> float:
    return update.weight if rule == "weighted_mean" else float(update.sites)


def cut(updates: int, trim: float) -> int:
    """Return how many updates `trimmed_mean` drops at each end; at least one or two always remain."""
    if not 0 <= trim < 0.5:
        raise Invalid(f"sync.trim: {trim}: must be from 0 to below 0.5; set trim: 0.1")
    return min(math.ceil(trim * updates - 1e-9), (updates - 1) // 2)


def _weighted(size: int, updates: Sequence[Update], weights: list[float]) -> Callable[[int], np.ndarray]:
    for update, weight in zip(updates, weights, strict=True):
        if not (0 <= weight < math.inf and 0 <= update.discount <= 1):
            raise Invalid(
                f"update of {update.site}: weight {weight}, discount {update.discount}: "
                "a weight is finite and not below 0, a discount from 0 to 1; send the number of examples"
            )
    over = math.fsum(weights)  # exactly rounded, hence free of order
    total = Sum(min(CHUNK, size))  # of one window, which stays in cache while every update is added
    merged = np.empty(total.size, np.float32)

    def at(offset: int) -> np.ndarray:
        length = min(CHUNK, size - offset)
        total.clear()
        for update, weight in zip(updates, weights, strict=True):
            values = window_of(update, offset, length)
            try:
                total.add(0, values, weight * update.discount)
            except Invalid as error:
                raise Invalid(f"update of {update.site}: from element {offset} on: {error}") from None
        total.mean_into(merged[:length], over)
        return merged[:length]

    return at


def _robust(size: int, updates: Sequence[Update], drop: int) -> Callable[[int], np.ndarray]:
    """Mean of what is left of each coordinate's sorted values; the median is this at its limit.

    Sorting by a network takes whole rows at a time, about a sixth of the time that sorting each column takes.
    """
    count, width = len(updates), min(CHUNK, size)
    *rows, spare, merged = np.empty((count + 2, width), np.float32)
    network = comparators(count)

    def at(offset: int) -> np.ndarray:
        nonlocal spare
        length = min(CHUNK, size - offset)
        for row, update in zip(rows, updates, strict=True):
            np.add(window_of(update, offset, length), np.float32(0), out=row[:length])  # -0 is 0, lest order tell
            if not np.isfinite(row[:length]).all():
                raise Invalid(f"update of {update.site}: not finite in the window at {offset}; send finite values")
        for low, high in network:
            one, other = rows[low][:length], rows[high][:length]
            np.minimum(one, other, out=spare[:length])
            np.maximum(one, other, out=other)
            rows[low], spare = spare, rows[low]
        for start in range(0, length, PIECE):
            place = slice(start, min(start + PIECE, length))
            total = room.first[: place.stop - start]
            np.copyto(total, rows[drop][place])
            for row in rows[drop + 1 : count - drop]:  # sorted first, so that this adds in an order of its own
                total += row[place]
            np.divide(total, count - 2 * drop, out=total)
            merged[place] = total
        return merged[:length]

    return at


def comparators(count: int) -> list[tuple[int, int]]:
    """Return the pairs (low, high) that put `count` values in order, one after the other (Batcher, 1968; Knuth 5.2.2).

    They are about count / 4 * log2(count)**2, always the same whatever the values are.
    """
    pairs: list[tuple[int, int]] = []
    run = 1
    while run < count:
        gap = run
        while gap:
            for start in range(gap % run, count - gap, 2 * gap):
                lows = range(start, min(start + gap, count - gap))
                pairs += [(at, at + gap) for at in lows if at // (2 * run) == (at + gap) // (2 * run)]
            gap //= 2
        run *= 2
    return pairs


def window_of(update: Update, offset: int, length: int) -> np.ndarray:
    """Return the window of an update; raise `Invalid`, naming the site, for one of another length."""
    values = update.window(offset)
    if values.shape != (length,):
        raise Invalid(f"update of {update.site}: {values.shape} values at {offset} where {length} are due; send all")
    return values

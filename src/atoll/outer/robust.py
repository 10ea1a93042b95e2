"""Rules that look at whole updates: who is too long, who is far from the others, and where the middle of all lies.

What they find is a number an update, so that the merge itself stays a mean of windows. Each number comes of sums over
the windows, in passes over the updates where they lie (decision 013), in the windows' order and in float64: neither the
sites' order nor the number of threads shows in a bit.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median, median_low

import numpy as np

from atoll.errors import Invalid
from atoll.outer.merge import Rule, Update, window_of
from atoll.outer.room import THREADS
from atoll.outer.wire import CHUNK
from atoll.spec.sync import Bound, Sync

_PIECE = 1 << 14  # elements of each update that are float64 at a time: those of ten stay in cache
_ROUNDING = 1 - 2.0**-22  # a shortened update stays within its bound after each element is rounded to float32
_SMOOTH = 1e-6  # of the median distance: nearer than that to the middle, an update pulls no harder
_STEPS = 1000  # of Weiszfeld's iteration, on as many numbers as there are updates
_SETTLED = 1e-9  # of the median distance: a step that moves the middle by less is the last


@dataclass(frozen=True, slots=True)
class Judged:
    """What a round's updates come to: a rule of `atoll.outer.merge`, and what to give to it.

    `outliers` are the sites whose updates were shortened or left out, sorted.
    """

    rule: Rule
    updates: Sequence[Update]
    outliers: tuple[str, ...] = ()


def judged(sync: Sync, size: int, updates: Sequence[Update], threads: int = THREADS) -> Judged:
    """Look at updates of `size` elements as `sync.bound` and `sync.merge` ask; nothing is read where they do not.

    bound: an update longer than it is scaled to it (norm clipping: Sun et al., 2019), before the merge's own rule.
    multi_krum (Blanchard et al., 2017): of n updates with f hostile, the mean of the n - f with the least sum of
    squared distances to their n - f - 2 nearest others; sites' names settle a tie.
    geometric_median (Pillutla et al., 2022): the point with the least sum of distances to all updates.

    Memory: O(updates x CHUNK) a thread. Time: O(updates**2 x size) for distances, once for multi_krum and twice for the
    geometric median. Raises `Invalid` for too few updates, or one that is not whole or not finite, naming the site.
    """
    if updates and (words := sync.unfit(sum(update.sites for update in updates))):
        raise Invalid(f"sync.{words}")
    look = _Pass(size, sorted(updates, key=lambda update: update.site), threads)
    long: set[str] = set()
    if sync.bound is not None and updates:
        look, long = _bounded(look, sync.bound)
    if sync.merge == "multi_krum":
        near = _nearest(look, sync.hostile or 0)
        left = {update.site for update in look.updates} - {update.site for update in near}
        return Judged("mean", near, tuple(sorted(long | left)))
    if sync.merge == "geometric_median":
        return Judged("weighted_mean", _central(look), tuple(sorted(long)))
    return Judged(sync.merge, look.updates, tuple(sorted(long)))


@dataclass(frozen=True, slots=True)
class _Pass:
    """What it takes to read all updates through, sorted by their sites' names."""

    size: int
    updates: Sequence[Update]
    threads: int

    def sum(self, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the sum of `of(rows)` over all pieces; rows are float64, one an update, of one piece each."""

        def window(offset: int) -> np.ndarray:
            rows = self._rows(offset)
            found = [of(rows[:, at : at + _PIECE].astype(np.float64)) for at in range(0, rows.shape[1], _PIECE)]
            return np.add.reduce(found)

        with ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="judge") as pool:
            total = 0.0
            for found in pool.map(window, range(0, self.size, CHUNK)):
                total = total + found
        return np.asarray(total)

    def _rows(self, offset: int) -> np.ndarray:
        length = min(CHUNK, self.size - offset)
        rows = np.empty((len(self.updates), length), np.float32)
        for row, update in zip(rows, self.updates, strict=True):
            row[:] = window_of(update, offset, length)
            if not np.isfinite(row).all():
                raise Invalid(f"update of {update.site}: not finite in the window at {offset}; send finite values")
        return rows


def _bounded(look: _Pass, bound: Bound) -> tuple[_Pass, set[str]]:
    norms = [float(norm) for norm in np.sqrt(look.sum(lambda rows: np.square(rows).sum(axis=1)))]
    most = bound.norm if bound.norm is not None else (bound.times or 0.0) * median_low(norms)
    updates = [
        replace(update, window=_scaled(update.window, most / norm * _ROUNDING)) if norm > most else update
        for update, norm in zip(look.updates, norms, strict=True)
    ]
    long = {update.site for update, norm in zip(updates, norms, strict=True) if norm > most}
    return replace(look, updates=updates), long


def _scaled(window: Callable[[int], np.ndarray], factor: float) -> Callable[[int], np.ndarray]:
    return lambda offset: np.multiply(window(offset), factor, dtype=np.float64).astype(np.float32)


def _nearest(look: _Pass, hostile: int) -> list[Update]:
    apart = look.sum(_distances)
    count = len(look.updates)
    # The first of a sorted row is the update itself.
    scores = [math.fsum(np.sort(row)[1 : count - hostile - 1]) for row in apart]
    ranked = sorted(range(count), key=lambda at: (scores[at], at))
    return [look.updates[at] for at in sorted(ranked[: count - hostile])]


def _central(look: _Pass) -> list[Update]:
    """Weiszfeld's iteration, smoothed, on the shares that the updates have in the middle.

    The middle is always a mean of the updates, so its distances to them follow from products between updates, and no
    further pass is needed. Those are taken about the update whose nearer half is nearest: about the origin, one that is
    very far off would leave nothing of the others' digits.
    """
    apart = np.sqrt(look.sum(_distances))
    near = np.sort(apart, axis=1)[:, : len(apart) // 2 + 1].sum(axis=1)
    centre = int(np.argmin(near))
    usual = median(float(distance) for distance in apart[centre])
    if not usual:  # most are the same, and then they are the middle
        return _shared(look.updates, (apart[centre] == 0).astype(np.float64))
    products = look.sum(lambda rows: _products(rows - rows[centre]))
    shares = _normal(1 / near)
    for _ in range(_STEPS):
        before, shares = shares, _normal(1 / np.maximum(_to_all(shares, products), _SMOOTH * usual))
        change = shares - before
        if (change * (products * change).sum(axis=1)).sum() <= (_SETTLED * usual) ** 2:
            break
    return _shared(look.updates, shares / shares.max())


def _shared(updates: Sequence[Update], weights: np.ndarray) -> list[Update]:
    return [replace(update, weight=float(weight)) for update, weight in zip(updates, weights, strict=True)]


def _normal(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _to_all(shares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return the distance of each update to the mean with these shares."""
    along = (products * shares).sum(axis=1)  # of the mean and each update
    squares = (along * shares).sum() - 2 * along + products.diagonal()
    return np.sqrt(np.maximum(squares, 0.0))


def _distances(rows: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row to each, zeros on the diagonal: the same to and fro, to the bit."""
    return _each_pair(rows, lambda one, other, room: np.square(np.subtract(one, other, out=room), out=room))


def _products(rows: np.ndarray) -> np.ndarray:
    return _each_pair(rows, lambda one, other, room: np.multiply(one, other, out=room))


def _each_pair(rows: np.ndarray, of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    count = len(rows)
    found, room = np.zeros((count, count)), np.empty(rows.shape[1])
    for one in range(count):
        for other in range(one + 1):
            # numpy's own sum and no BLAS, whose order depends on its threads.
            found[one, other] = found[other, one] = of(rows[one], rows[other], room).sum()
    return found

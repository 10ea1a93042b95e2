"""Which examples come next: pure functions of (seed, rows, position), so that any change of world size resumes exactly.

Random numbers are raw Philox words (Salmon et al., 2011) under a `SeedSequence`: both streams are fixed for all
releases of numpy, where `Generator.permutation` is not. Knows no table and no tensor, only row numbers.
"""

from functools import lru_cache

import numpy as np

from atoll.errors import Invalid

_SPLIT, _ORDER = 1, 2  # keeps the two uses of one seed independent


def split(rows: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the held-out rows; return (train, heldout), sorted int64 indices that are disjoint and cover all rows.

    A share above 0 holds out at least one row and leaves at least one to train on, given two rows or more. Raises
    `Invalid` for a share outside [0, 1).
    """
    count = held_out(rows, holdout)
    shuffled = _permutation(rows, _SPLIT, seed)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def held_out(rows: int, holdout: float) -> int:
    """Return how many rows `split` holds out; raise as it does."""
    if not 0 <= holdout < 1:
        raise Invalid(f"holdout: {holdout}: must be at least 0 and below 1; 0.2 keeps a fifth for evaluation")
    return 0 if holdout == 0 or rows < 2 else min(max(round(rows * holdout), 1), rows - 1)


def order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Return the permutation of ``range(rows)`` in which this epoch takes the examples; int64, read-only."""
    return _order(seed, epoch, rows)


def batch(
    seed: int,
    rows: int,
    position: int,
    size: int,
    rank: int = 0,
    ranks: int = 1,
    shares: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Return this rank's example indices, int64, of the batch that begins after `position` examples at this site.

    `position` counts examples over all ranks and epochs since the run began; the next batch begins at
    ``position + size``. A batch may cross the border of an epoch, so each example comes exactly once per epoch even
    where `size` does not divide `rows`. Ranks take contiguous shares, of so many examples as ``shares`` says for each,
    else such that differ by at most one; put together in rank order they are the batch of a single rank. Raises
    `Invalid` when there is nothing to draw from, or for shares that are not of this batch.
    """
    if rows < 1 or size < 1 or position < 0:
        raise Invalid(f"batch: rows {rows}, size {size}, position {position}: needs rows and size of 1 or more")
    if not 0 <= rank < ranks:
        raise Invalid(f"batch: rank {rank} of {ranks}: ranks count from 0 to {ranks - 1}")
    if shares is None:
        first, last = rank * size // ranks, (rank + 1) * size // ranks
    else:
        if len(shares) != ranks or sum(shares) != size or min(shares) < 0:
            raise Invalid(f"batch: shares {list(shares)}: needs {ranks} numbers of 0 or more that sum to {size}")
        first = sum(shares[:rank])
        last = first + shares[rank]
    at, end = position + first, position + last
    parts: list[np.ndarray] = []
    while at < end:
        epoch, offset = divmod(at, rows)
        taken = min(end - at, rows - offset)
        parts.append(_order(seed, epoch, rows)[offset : offset + taken])
        at += taken
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@lru_cache(maxsize=2)  # a batch looks at one epoch, or two at their border; drawing one anew costs O(rows log rows)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    drawn = _permutation(rows, _ORDER, seed, epoch)
    drawn.setflags(write=False)  # shared by all who ask
    return drawn


def _permutation(rows: int, use: int, *seeds: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence((use, rows, *seeds))).random_raw(rows)
    return np.argsort(words, kind="stable")

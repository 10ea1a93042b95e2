"""Secret batches: which examples a private step takes is known to nobody, this site's owner and its hub included."""

from collections.abc import Iterator

import numpy as np

from atoll.errors import TaskFailed
from atoll.inner.made import count
from atoll.noise import Chance
from atoll.spec.privacy import PrivateSteps
from atoll.spec.task import Arrays


def sampled(examples: Arrays, rows: int, asked: PrivateSteps, steps: int) -> Iterator[Arrays]:
    """Yield batches in which each example is by itself with the same chance (Poisson sampling); some may be empty.

    Not by the job's seed: whoever has that would know in which steps a row was, and each of them would cost as much
    privacy as one over all rows. Raises `TaskFailed` unless there is one example for each of these ``rows``.
    """
    if not count(examples) == rows == asked.rows:
        raise TaskFailed(
            f"examples() made {count(examples)} examples of {asked.rows} rows, and privacy is of a row; make one of "
            "each"
        )
    chance = Chance()
    for _ in range(steps):
        taken = np.flatnonzero(chance.take(rows) < asked.sampling)
        yield {name: array[taken] for name, array in examples.items()}

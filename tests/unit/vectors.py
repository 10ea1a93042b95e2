"""Random vectors that tests share: each is made once in a process, for drawing them costs more than what is tested."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def noise(size, seed=0, scale=1.0, tails=None):
    """Return read-only float32 noise: normal, or Student's t with so many degrees of freedom where `tails` says so."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal(size, np.float32) if tails is None else random.standard_t(tails, size)
    vector = (scale * drawn).astype(np.float32)
    vector.flags.writeable = False
    return vector

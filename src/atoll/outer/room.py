"""Room that a thread works in, a piece of a vector at a time: asking the system for it costs more than the work."""

import os
import threading

import numpy as np

THREADS = min(4, os.cpu_count() or 1)  # that a round's step has
PIECE = 1 << 17  # elements: numpy's calls are few, between which threads wait for each other, and all is in cache


class _Room(threading.local):
    """A thread's own float64 pieces. Whoever uses one is done with it before anybody else is called."""

    def __init__(self) -> None:
        self.first, self.second = np.empty(PIECE), np.empty(PIECE)


room = _Room()

"""From a round's updates to the next weights, a window at a time: merged, stepped and done with, on a few threads.

Nothing of the model's size is in memory but the weights before, the weights after, and the outer optimiser's moments,
which are stepped in place. Elements do not know of each other, so the result is the same for any number of threads.
"""

import os
import queue
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from atoll.outer import optimiser
from atoll.outer.merge import Update, merging
from atoll.outer.optimiser import State
from atoll.outer.wire import CHUNK
from atoll.spec.plan import Sync

THREADS = min(4, os.cpu_count() or 1)
_SPAN = 2 * CHUNK  # elements that a thread does at a time: it is handed out, and written by the caller, as a piece


class Advance:
    """One outer step under way. `weights` and `state` are whole once `pieces` has come to its end.

    The moments of the state before are stepped in place: after an error it must be read again. Raises `Invalid` for
    updates or a state that do not belong to these weights and this sync, before anything is taken for the result.
    """

    def __init__(self, sync: Sync, start: np.ndarray, updates: Sequence[Update], before: State) -> None:
        self._sync, self._start, self._updates = sync, start, updates
        self._merging()
        self.state = optimiser.taken_over(sync.outer, start.shape, before)
        self.weights = np.empty(start.shape, np.float32)

    def pieces(self, threads: int = THREADS) -> Generator[np.ndarray, None, None]:
        """Yield the next weights piece by piece, in order, each finished, while threads work on those that follow.

        Raises `Invalid` for an update that cannot be merged, `TaskFailed` for a result that is not finite.
        """
        idle: queue.SimpleQueue[Callable[[int], np.ndarray]] = queue.SimpleQueue()
        for _ in range(threads):
            idle.put(self._merging())

        def work(start: int) -> np.ndarray:
            merged = idle.get()
            try:
                return self._piece(start, merged)
            finally:
                idle.put(merged)

        pool = ThreadPoolExecutor(threads, thread_name_prefix="advance")
        try:
            for done in [pool.submit(work, start) for start in range(0, self._start.size, _SPAN)]:
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _merging(self) -> Callable[[int], np.ndarray]:
        return merging(self._sync.merge, self._start.size, self._updates, self._sync.trim)

    def _piece(self, start: int, merged: Callable[[int], np.ndarray]) -> np.ndarray:
        stop = min(start + _SPAN, self._start.size)
        for offset in range(start, stop, CHUNK):
            place = slice(offset, min(offset + CHUNK, stop))
            window = merged(offset)
            gradient = optimiser.pseudo_gradient(self._sync.exchange, window, out=window)
            moments = {name: moment[place] for name, moment in self.state.moments.items()}
            arrays = (self._start[place], gradient, self.weights[place])
            optimiser.step_window(self._sync.outer, self.state.step, arrays, moments)
        return self.weights[start:stop]

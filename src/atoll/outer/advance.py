"""From a round's updates to the next weights, a window at a time: merged, stepped and done with, on a few threads.

Nothing of the model's size is in memory but the weights before, the weights after, and the outer optimiser's moments,
which are stepped in place. Elements do not know of each other, so the result is the same for any number of threads.

Where the sync cuts the model into fragments, a step is one fragment's: what lies outside it is copied as it was.
With control variates the second half of every vector is those, and not the outer optimiser's to step: the hub's moves
by the mean of the sites' changes, times the share of the plan's sites that sent one (Karimireddy et al., 2020).

Where weights go down as a change (`atoll.outer.down`), the step is taken as that decodes, and its chunks come with it.
"""

import queue
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np

from atoll.errors import Invalid
from atoll.outer import down, optimiser
from atoll.outer.merge import Update, merging
from atoll.outer.optimiser import State
from atoll.outer.robust import judged
from atoll.outer.room import THREADS
from atoll.outer.wire import CHUNK, Chunk, recalls
from atoll.spec.sync import Outer, Sync

_SPAN = 2 * CHUNK  # elements that a thread does at a time: it is handed out, and written by the caller, as a piece
_AHEAD = 32  # pieces that threads may be ahead of the caller: their encoded steps wait in memory


class Advance:
    """One outer step under way. `weights` and `state` are whole once `pieces` has come to its end.

    The arrays of the state before are stepped in place: after an error it must be read again. Raises `Invalid` for
    updates or a state that do not belong to these weights and this sync, before anything is taken for the result.
    ``share`` is that of the plan's sites whose updates these are, which matters with control variates.

    What looks at whole updates (`atoll.outer.robust`) reads them through at once; `outliers` are the sites it found.
    """

    def __init__(
        self, sync: Sync, start: np.ndarray, updates: Sequence[Update], before: State, share: float = 1.0
    ) -> None:
        self._sync, self._start = sync, start
        self._from, self._to = sync.span(start.size, before.step)
        self._judged = judged(sync, self._to - self._from, updates)
        self._ready = self._merging()
        self._control = start.size // 2 if sync.control else start.size  # where it begins
        self._share = Outer(rate=share)
        self.state = optimiser.taken_over(sync.outer, (self._control,), before)
        self.state = replace(self.state, residual=_residual(sync, start.shape, before))
        self._number = before.step // sync.fragments + 1  # of the steps that this fragment has taken
        self.weights = np.empty(start.shape, np.float32)

    @property
    def outliers(self) -> tuple[str, ...]:
        """The sites whose updates were shortened or left out, sorted."""
        return self._judged.outliers

    def pieces(
        self, threads: int = THREADS, change: Callable[[Chunk], object] | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Yield the next weights piece by piece, in order, each finished, while threads work on those that follow.

        ``change`` takes the chunks that a piece goes down as, in order, before it is yielded. Raises `Invalid` for an
        update that cannot be merged, `TaskFailed` for a result that is not finite.
        """
        idle: queue.SimpleQueue[Callable[[int], np.ndarray]] = queue.SimpleQueue()
        idle.put(self._ready)
        threads = max(1, min(threads, -(-(self._to - self._from) // _SPAN)))  # each has memory of its own to fill
        for _ in range(1, threads):
            idle.put(self._merging())

        def work(start: int) -> tuple[np.ndarray, list[Chunk]]:
            merged = idle.get()
            try:
                return self._piece(start, merged)
            finally:
                idle.put(merged)

        pool = ThreadPoolExecutor(threads, thread_name_prefix="advance")
        starts = iter(range(self._from, self._to, _SPAN))
        stepped: deque[Future[tuple[np.ndarray, list[Chunk]]]] = deque()
        try:
            # Threads begin with what is to be computed while the caller takes what is only copied.
            stepped.extend(pool.submit(work, start) for start in islice(starts, _AHEAD))
            yield from self._copied(0, self._from)
            while stepped:
                piece, chunks = stepped.popleft().result()
                stepped.extend(pool.submit(work, start) for start in islice(starts, 1))
                if change is not None:
                    for chunk in chunks:
                        change(chunk)
                yield piece
            yield from self._copied(self._to, self._start.size)
        finally:
            pool.shutdown(cancel_futures=True)

    def _copied(self, start: int, stop: int) -> Generator[np.ndarray, None, None]:
        for offset in range(start, stop, _SPAN):
            place = slice(offset, min(offset + _SPAN, stop))
            self.weights[place] = self._start[place]
            yield self.weights[place]

    def _merging(self) -> Callable[[int], np.ndarray]:
        return merging(self._judged.rule, self._to - self._from, self._judged.updates, self._sync.trim)

    def _piece(self, start: int, merged: Callable[[int], np.ndarray]) -> tuple[np.ndarray, list[Chunk]]:
        stop = min(start + _SPAN, self._to)
        chunks: list[Chunk] = []
        for offset in range(start, stop, CHUNK):
            place = slice(offset, min(offset + CHUNK, stop))
            window = merged(offset - self._from)
            gradient = optimiser.pseudo_gradient(self._sync.exchange, window, out=window)
            self._step(place, gradient)
            residual = None if self.state.residual is None else self.state.residual[place]
            windows = (self._start[place], self.weights[place])
            chunks.append(down.take(self._sync.down, place.start - self._from, windows, residual))
        return self.weights[start:stop], chunks

    def _step(self, place: slice, gradient: np.ndarray) -> None:
        cut = min(max(self._control, place.start), place.stop)
        weights, control = slice(place.start, cut), slice(cut, place.stop)
        moments = {name: moment[weights] for name, moment in self.state.moments.items()}
        arrays = (self._start[weights], gradient[: cut - place.start], self.weights[weights])
        optimiser.step_window(self._sync.outer, self._number, arrays, moments)
        arrays = (self._start[control], gradient[cut - place.start :], self.weights[control])
        optimiser.step_window(self._share, self._number, arrays, {})


def _residual(sync: Sync, shape: tuple[int, ...], before: State) -> np.ndarray | None:
    """Return what steps have lost on their way down, as far as it is fed back; zeros at first."""
    if not recalls(sync.down):
        if before.residual is not None:
            raise Invalid("optimiser state: has a residual, and sync.down feeds nothing back; start a new run")
        return None
    residual = before.residual if before.step else np.zeros(shape, np.float32)
    if residual is None or residual.shape != shape:
        found = "none" if residual is None else f"{residual.size} elements"
        raise Invalid(f"optimiser state: residual: {found} where the weights have {shape[0]}; use the run's own state")
    return residual

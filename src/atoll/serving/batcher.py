"""Requests into batches: at once when idle, otherwise whatever gathers while one batch computes. No fixed wait.

The fixed wait of other servers costs its whole length when there is one client. Here a batch grows only because
the one computing thread is busy, so waiting is never added to an idle server.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from atoll.errors import AtollError, Unavailable
from atoll.serving.rows import Row

Answer = dict[str, Any]
Compute = Callable[[Sequence[Row]], list[Answer]]


class QueueFull(Unavailable):
    """As many requests wait as may; the sender should try again."""


@dataclass(slots=True, eq=False)
class _Waiting:
    rows: Sequence[Row]
    answers: asyncio.Future[list[Answer]]


@dataclass(slots=True)
class Counts:
    """What a replica has done since it started; `seconds` holds the last 4096 answered requests' waiting times."""

    requests: int = 0
    rows: int = 0
    batches: int = 0
    rejected: int = 0
    failed: int = 0
    expired: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    def quantile(self, share: float) -> float | None:
        """Return the waiting time in seconds that ``share`` of the requests stayed within."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


class Batcher:
    """Answers requests of one event loop by ``compute``, which runs in ``thread``, one batch at a time.

    A batch takes whole requests up to ``max_batch`` rows; a longer request is a batch of its own, computed in
    slices. Requests of a batch share nothing but the time: when it fails, each is computed again by itself.
    """

    def __init__(self, compute: Compute, thread: Executor, max_batch: int, queue: int) -> None:
        self._compute = compute
        self._thread = thread
        self._max_batch = max_batch
        self._queue = queue
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self.counts = Counts()

    async def answer(self, rows: Sequence[Row], seconds: float) -> list[Answer]:
        """Return one answer per row; raise `QueueFull`, `TimeoutError` after ``seconds``, or what the model raised."""
        if len(self._waiting) >= self._queue:
            self.counts.rejected += 1
            raise QueueFull(f"queue: {self._queue} requests wait already; try again in a second")
        begun = perf_counter()
        waiting = _Waiting(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(seconds):
                answers = await waiting.answers  # a timeout cancels it, so that a batch leaves it out
        except TimeoutError:
            self.counts.expired += 1
            with contextlib.suppress(ValueError):  # it is in a batch already
                self._waiting.remove(waiting)
            raise
        except AtollError:
            self.counts.failed += 1
            raise
        self.counts.requests += 1
        self.counts.rows += len(rows)
        self.counts.seconds.append(perf_counter() - begun)
        return answers

    async def run(self) -> None:
        """Compute batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            outcomes = await loop.run_in_executor(self._thread, self._outcomes, [one.rows for one in batch])
            for one, outcome in zip(batch, outcomes, strict=True):
                if one.answers.done():  # its deadline passed, or its client left, while it was computed
                    continue
                if isinstance(outcome, Exception):
                    one.answers.set_exception(outcome)
                else:
                    one.answers.set_result(outcome)
            self.counts.batches += 1

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        while self._waiting and (not batch or rows + len(self._waiting[0].rows) <= self._max_batch):
            one = self._waiting.popleft()
            if not one.answers.done():
                batch.append(one)
                rows += len(one.rows)
        return batch

    def _outcomes(self, requests: list[Sequence[Row]]) -> list[list[Answer] | Exception]:
        together = self._attempt([row for rows in requests for row in rows])
        if isinstance(together, Exception):
            return [together] if len(requests) == 1 else [self._attempt(rows) for rows in requests]
        answers = iter(together)
        return [[next(answers) for _ in rows] for rows in requests]

    def _attempt(self, rows: Sequence[Row]) -> list[Answer] | Exception:
        slices = [rows[start : start + self._max_batch] for start in range(0, len(rows), self._max_batch)]
        try:
            return [answer for part in slices for answer in self._compute(part)]
        except Exception as error:  # noqa: BLE001 - the loop must outlive any batch; the error goes to its own request
            return error

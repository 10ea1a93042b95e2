"""The batcher: at once when idle, gathers while computing, isolates the guilty, refuses when full."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from atoll.errors import TaskFailed
from atoll.serving.batcher import Batcher, QueueFull


class Doubler:
    """Doubles x; waits at the gate first; fails on a row whose x is None. Records the size of each batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, rows):
        self.begun.release()
        self.gate.wait(30)
        self.threads.add(threading.get_ident())
        self.sizes.append(len(rows))
        if any(row["x"] is None for row in rows):
            raise TaskFailed("task.py: line 3: TypeError: no x")
        return [{"y": 2 * row["x"]} for row in rows]


def serve(story: Callable[[Batcher, Doubler], Awaitable[None]], max_batch: int = 4, queue: int = 8) -> Doubler:
    """Run ``story`` against a running batcher."""
    doubler = Doubler()

    async def play() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(doubler, thread, max_batch, queue)
            running = asyncio.create_task(batcher.run())
            try:
                await story(batcher, doubler)
            finally:
                doubler.gate.set()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())
    return doubler


def ask(batcher: Batcher, *values: int | None) -> "asyncio.Task[list[dict[str, object]]]":
    return asyncio.create_task(batcher.answer([{"x": value} for value in values], 30))


async def computing(doubler: Doubler) -> None:
    assert await asyncio.to_thread(doubler.begun.acquire, timeout=30)


def test_an_idle_batcher_computes_one_request_by_itself():
    async def story(batcher, doubler):
        doubler.gate.set()
        assert await ask(batcher, 1) == [{"y": 2}]
        assert await ask(batcher, 2, 3) == [{"y": 4}, {"y": 6}]

    assert serve(story).sizes == [1, 2]


def test_requests_gather_while_a_batch_computes_and_each_gets_its_own_answers():
    async def story(batcher, doubler):
        first = ask(batcher, 0)
        await computing(doubler)
        rest = [ask(batcher, 10 * n, 10 * n + 1) for n in range(1, 4)]
        await asyncio.sleep(0)
        doubler.gate.set()
        assert await first == [{"y": 0}]
        assert await asyncio.gather(*rest) == [[{"y": 20 * n}, {"y": 20 * n + 2}] for n in range(1, 4)]
        assert (batcher.counts.requests, batcher.counts.rows, batcher.counts.batches) == (4, 7, 3)
        assert batcher.counts.quantile(0.5) <= batcher.counts.quantile(0.99)

    doubler = serve(story)
    assert doubler.sizes == [1, 4, 2]
    assert len(doubler.threads) == 1


def test_a_request_longer_than_a_batch_is_computed_in_slices():
    async def story(batcher, doubler):
        doubler.gate.set()
        assert await ask(batcher, *range(10)) == [{"y": 2 * n} for n in range(10)]

    assert serve(story).sizes == [4, 4, 2]


def test_a_bad_request_fails_alone():
    async def story(batcher, doubler):
        first = ask(batcher, 0)
        await computing(doubler)
        good, bad, other = ask(batcher, 1), ask(batcher, None), ask(batcher, 2)
        await asyncio.sleep(0)
        doubler.gate.set()
        await first
        assert await good == [{"y": 2}]
        assert await other == [{"y": 4}]
        with pytest.raises(TaskFailed, match="no x"):
            await bad
        assert batcher.counts.failed == 1

    assert serve(story).sizes == [1, 3, 1, 1, 1]


def test_a_full_queue_refuses_at_once_and_goes_on():
    async def story(batcher, doubler):
        first = ask(batcher, 0)
        await computing(doubler)
        waiting = [ask(batcher, n) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 requests wait already"):
            await ask(batcher, 3)
        doubler.gate.set()
        assert await asyncio.gather(first, *waiting) == [[{"y": 0}], [{"y": 2}], [{"y": 4}]]
        assert batcher.counts.rejected == 1

    serve(story, queue=2)


def test_a_request_past_its_deadline_gives_up_its_place_and_is_not_computed():
    async def story(batcher, doubler):
        first = ask(batcher, 0)
        await computing(doubler)
        with pytest.raises(TimeoutError):
            await batcher.answer([{"x": 1}], 0.01)
        last = ask(batcher, 2)
        await asyncio.sleep(0)
        doubler.gate.set()
        assert await last == [{"y": 4}]
        assert await first == [{"y": 0}]
        assert batcher.counts.expired == 1

    assert serve(story, queue=1).sizes == [1, 1]


def test_a_client_that_left_harms_nobody():
    async def story(batcher, doubler):
        first = ask(batcher, 0)
        await computing(doubler)
        gone, stays = ask(batcher, 1), ask(batcher, 2)
        await asyncio.sleep(0)
        first.cancel()
        gone.cancel()
        await asyncio.gather(first, gone, return_exceptions=True)
        doubler.gate.set()
        assert await stays == [{"y": 4}]

    assert serve(story).sizes == [1, 1]

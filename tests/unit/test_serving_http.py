"""The routes of a replica, in process: what each kind of request gets."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from atoll.errors import TaskFailed
from atoll.serving.batcher import Batcher
from atoll.serving.http import BODY_LIMIT, application
from atoll.serving.rows import Columns
from atoll.spec.document import sha256
from atoll.spec.model import Lineage, Model

MODEL = Model(
    name="heart",
    version=3,
    weights=sha256(b"w"),
    code=sha256(b"c"),
    task="T",
    file="t.py",
    signature=(),
    lineage=Lineage(run="r", job=sha256(b"j"), plan=sha256(b"p"), code=sha256(b"c")),
)


def serve(story: Callable[[SimpleNamespace], Awaitable[None]], queue: int = 8, deadline: float = 30.0) -> None:
    """Run ``story`` with a client of the application, and a gate that, cleared, holds the computing thread."""
    gate = threading.Event()
    gate.set()

    def compute(rows):
        gate.wait(30)
        if any(row.get("age") == 666 for row in rows):
            raise TaskFailed("task.py: line 9: ValueError: the beast")
        return [{"older": row["age"] + 1} for row in rows]

    async def play() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(compute, thread, max_batch=4, queue=queue)
            running = asyncio.create_task(batcher.run())
            app = application(MODEL, Columns({"age": "int64"}).check, batcher, None, deadline)
            transport = httpx.ASGITransport(app)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                    await story(SimpleNamespace(client=client, gate=gate, batcher=batcher))
            finally:
                gate.set()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())


def test_rows_get_answers_with_the_models_name_version_and_digest():
    async def story(here):
        reply = await here.client.post("/predict", json={"rows": [{"age": 40}, {"age": 41}]})
        assert reply.status_code == 200
        assert reply.json() == {
            "model": "heart",
            "version": 3,
            "digest": sha256(b"w"),
            "answers": [{"older": 41}, {"older": 42}],
        }

    serve(story)


def test_health_and_figures():
    async def story(here):
        health = (await here.client.get("/health")).json()
        assert health == {"live": True, "ready": True, "reference": "heart@3", "digest": sha256(b"w")}
        empty = (await here.client.get("/stats")).json()
        assert (empty["requests"], empty["p50_seconds"]) == (0, None)
        await here.client.post("/predict", json={"rows": [{"age": 40}] * 3})
        stats = (await here.client.get("/stats")).json()
        assert (stats["requests"], stats["rows"], stats["batches"]) == (1, 3, 1)
        assert 0 < stats["p50_seconds"] <= stats["p99_seconds"]

    serve(story)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "body: not valid JSON"),
        (b"\xff", 400, "body: not valid JSON"),
        (b"[" * 100_000, 400, "body: not valid JSON"),
        (b"[]", 422, "the one field rows"),
        (b'{"rows": [], "extra": 1}', 422, "the one field rows"),
        (b'{"rows": []}', 422, "at least one row"),
        (b'{"rows": [3]}', 422, "rows.0: '3' is not a row"),
        (b'{"rows": [{"age": 1}, {"agee": 1}]}', 422, "rows.1: unknown field 'agee'; did you mean 'age'?"),
        (b'{"rows": [{"age": NaN}]}', 422, "rows.0.age: nan"),
        (b'{"rows": [{"age": 666}]}', 500, "task.py: line 9: ValueError: the beast"),
        (b" " * (BODY_LIMIT + 1), 413, "body: more than 4,194,304 bytes"),
    ],
)
def test_a_bad_request_gets_a_sentence(body, status, words):
    async def story(here):
        reply = await here.client.post("/predict", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == status
        assert words in reply.json()["error"]

    serve(story)


def test_a_browsers_plain_post_and_a_foreign_host_name_are_refused():
    async def story(here):
        plain = await here.client.post("/predict", content=b'{"rows": [{}]}', headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        assert (await here.client.get("/health", headers={"host": "evil.example"})).status_code == 400

    serve(story)


def test_a_full_queue_is_429_with_retry_after():
    async def story(here):
        here.gate.clear()
        asks = [asyncio.create_task(here.client.post("/predict", json={"rows": [{"age": n}] * 4})) for n in range(6)]
        done, _ = await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "2 requests wait already" in refused.json()["error"]
        here.gate.set()
        statuses = sorted([(await ask).status_code for ask in asks])
        assert set(statuses) == {200, 429}
        assert statuses.count(429) == here.batcher.counts.rejected

    serve(story, queue=2)


def test_a_request_past_its_deadline_is_504():
    async def story(here):
        here.gate.clear()
        reply = await here.client.post("/predict", json={"rows": [{"age": 1}]})
        assert reply.status_code == 504
        assert "no answer within 0.05 seconds" in reply.json()["error"]

    serve(story, deadline=0.05)

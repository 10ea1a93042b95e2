"""The routes of a replica: answers, health and figures. Every refusal is one sentence under `error`."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from atoll.errors import AtollError, Invalid
from atoll.serving.batcher import Batcher, QueueFull
from atoll.serving.rows import Row
from atoll.spec.model import Model

BODY_LIMIT = 4 << 20  # bytes of one request
DEADLINE = 30.0  # seconds from the request's arrival in the queue to its answer

Check = Callable[[Row, str], None]


class _Refused(Exception):
    """A request that is answered with this status and this sentence."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def application(model: Model, check: Check, batcher: Batcher, life: Any, deadline: float = DEADLINE) -> FastAPI:
    """Return the ASGI application: POST /predict, GET /health, GET /stats."""
    app = FastAPI(title="atoll", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    # A page in a browser may reach a loopback port, under a name of its own that resolves to it.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    about = {"model": model.name, "version": model.version, "digest": model.weights}

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        try:
            async with asyncio.timeout(deadline):  # a client may send its bytes as slowly as it likes
                rows = _rows(await _body(request))
            for number, row in enumerate(rows):
                check(row, f"rows.{number}")
            answers = await batcher.answer(rows, deadline)
        except (AtollError, _Refused, TimeoutError, ClientDisconnect) as error:
            return _refusal(error, deadline)
        return JSONResponse({**about, "answers": answers})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"live": True, "ready": True, "reference": model.reference, "digest": model.weights})

    @app.get("/stats")
    async def stats() -> JSONResponse:
        counts = batcher.counts
        return JSONResponse(
            {
                "requests": counts.requests,
                "rows": counts.rows,
                "batches": counts.batches,
                "rejected": counts.rejected,
                "failed": counts.failed,
                "expired": counts.expired,
                "p50_seconds": counts.quantile(0.5),
                "p99_seconds": counts.quantile(0.99),
            }
        )

    return app


async def _body(request: Request) -> bytes:
    # A browser sends other types across origins without asking first; JSON it does not.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "content-type: must be application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_LIMIT:
            raise _Refused(413, f"body: more than {BODY_LIMIT:,} bytes; send fewer rows at a time")
    return bytes(body)


def _rows(body: bytes) -> list[dict[str, Any]]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f'body: not valid JSON ({error}); send {{"rows": [{{...}}]}}') from None
    if not isinstance(asked, dict) or set(cast("dict[str, Any]", asked)) != {"rows"}:
        raise Invalid('body: must be a table with the one field rows; send {"rows": [{...}]}')
    rows = asked["rows"]
    if not isinstance(rows, list) or not rows:
        raise Invalid("rows: must be a list of at least one row")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Invalid(f"rows.{number}: {str(row)[:60]!r} is not a row; send a table of fields and values")
    return rows


def _refusal(error: Exception, deadline: float) -> JSONResponse:
    words = str(error)
    match error:
        case _Refused():
            status = error.status
        case QueueFull():
            return JSONResponse({"error": words}, 429, headers={"Retry-After": "1"})
        case TimeoutError():
            status, words = 504, f"deadline: no answer within {deadline:g} seconds; send fewer rows or try again later"
        case ClientDisconnect():
            status, words = 400, "body: it ended before it was whole"
        case Invalid():
            status = 422
        case _:
            status = 500
    return JSONResponse({"error": words}, status)

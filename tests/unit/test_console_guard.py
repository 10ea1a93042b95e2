"""Who may speak to the API: token, cookie, Host, Origin and size, in front of an app that says yes to all."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from atoll.console.guard import BODY_LIMIT, SESSION_SECONDS, Guard, Keys, cookie_name, failure
from atoll.console.proofs import proof
from atoll.console.tokens import OWN
from atoll.errors import AtollError, Corrupt, Denied, Invalid, LinkLost, NotFound, TaskFailed, Unavailable

URL = "http://127.0.0.1:8123"
TOKEN = "t" * 43
BEARER = {"Authorization": f"Bearer {TOKEN}"}


async def yes(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    await JSONResponse({"length": len(await request.body())})(scope, receive, send)


def ask(keys: Keys, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Guard(yes, keys)), base_url=URL) as http:
            return await http.request(method, path, headers=headers, **more)

    return asyncio.run(call())


@pytest.mark.parametrize(
    "path", ["/v1/runs", "/v1/jobs", "/openapi.json", "/docs", "/v1/login", "/nowhere", "//v1/health"]
)
def test_every_path_needs_the_token(path: str):
    keys = Keys(TOKEN)
    assert ask(keys, "GET", path).status_code == 401
    assert ask(keys, "GET", path, {"Authorization": f"Bearer {TOKEN}x"}).status_code == 401
    assert ask(keys, "GET", path, {"Authorization": f"Basic {TOKEN}"}).status_code == 401
    assert ask(keys, "GET", path, BEARER).status_code == 200


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/v1/health", "/login"])
def test_the_page_shell_and_health_are_open_for_reading_only(path: str):
    assert ask(Keys(TOKEN), "GET", path).status_code == 200
    assert ask(Keys(TOKEN), "POST", path).status_code == 401


@pytest.mark.parametrize("host", ["evil.example:8123", "127.0.0.1", "127.0.0.1:80", "localhost:8124", "0.0.0.0:8123"])
def test_a_foreign_host_name_is_refused_even_with_the_token(host: str):
    for path in ("/", "/v1/runs"):
        assert ask(Keys(TOKEN), "GET", path, {**BEARER, "Host": host}).status_code == 403
    assert ask(Keys(TOKEN), "GET", "/v1/runs", {**BEARER, "Host": "localhost:8123"}).status_code == 200


def test_a_cookie_reads_but_changes_only_from_our_own_page():
    keys = Keys(TOKEN)
    cookie = {"Cookie": f"{cookie_name(8123)}={keys.session(TOKEN)}"}
    assert ask(keys, "GET", "/v1/runs", cookie).status_code == 200
    assert ask(keys, "POST", "/v1/resume", cookie).status_code == 401
    assert ask(keys, "POST", "/v1/resume", {**cookie, "Origin": "http://evil.example"}).status_code == 401
    assert ask(keys, "POST", "/v1/resume", {**cookie, "Origin": "http://127.0.0.1:9"}).status_code == 401
    assert ask(keys, "DELETE", "/v1/deployments/x", {**cookie, "Origin": URL}).status_code == 200
    assert ask(keys, "GET", "/v1/runs", {"Cookie": f"{cookie_name(8123)}={TOKEN}"}).status_code == 401
    assert ask(keys, "GET", "/v1/runs", {"Cookie": f"{cookie_name(9)}={keys.session(TOKEN)}"}).status_code == 401


def test_a_ticket_opens_one_session():
    keys = Keys(TOKEN)
    ticket = keys.ticket(OWN)
    found = keys.remembered(keys.session(ticket))
    assert (found.user, found.scope) == (OWN.user, OWN.scope)
    assert found.expires <= time.time() + SESSION_SECONDS
    with pytest.raises(Denied, match="was used or is too old"):
        keys.session(ticket)
    with pytest.raises(Denied):
        keys.session("")
    with pytest.raises(Denied, match="no such session"):
        keys.remembered("")
    assert SESSION_SECONDS <= 24 * 3600


def test_a_body_must_state_its_length_and_stay_under_the_limit():
    async def pieces():
        yield b"{}"

    keys = Keys(TOKEN)
    assert ask(keys, "POST", "/v1/jobs", BEARER, content=b"x" * 100).json() == {"length": 100}
    assert ask(keys, "POST", "/v1/jobs", BEARER, content=b"x" * (BODY_LIMIT + 1)).status_code == 413
    assert ask(keys, "POST", "/v1/jobs", BEARER, content=pieces()).status_code == 411


def test_a_web_socket_is_closed():
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(yes, Keys(TOKEN))({"type": "websocket", "path": "/v1/runs"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_proof_depends_on_token_and_challenge():
    assert Keys(TOKEN).proof("a") == proof(TOKEN, "a")
    assert len({proof(TOKEN, "a"), proof(TOKEN, "b"), proof("other", "a"), TOKEN}) == 4


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (NotFound, 404),
        (Invalid, 422),
        (Denied, 403),
        (LinkLost, 503),
        (Unavailable, 503),
        (TaskFailed, 500),
        (Corrupt, 500),
    ],
)
def test_errors_have_fitting_statuses(kind: type[AtollError], status: int):
    answer = failure(kind("words"))
    assert answer.status_code == status
    assert bytes(answer.body) == (
        f'{{"error":{{"type":"{kind.__name__}","message":"words","exit_code":{kind.exit_code}}}}}'.encode()
    )

"""Who may speak to the API: one ASGI layer in front of every route, so that no route can forget to ask.

It answers three attacks on a loopback server. Another program of the machine: every path but the few in `OPEN` needs
the hub's token. A web page elsewhere that makes the browser call us (CSRF): a cookie counts for a change only with our
own Origin. A foreign name that resolves to 127.0.0.1 (DNS rebinding): Host must be the loopback address we serve on.
"""

import hmac
import secrets
import time
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.errors import AtollError, Denied, Invalid, NotFound, Unavailable

OPEN = frozenset({"/", "/app.js", "/style.css", "/login", "/v1/health"})
SAFE = frozenset({"GET", "HEAD"})
BODY_LIMIT = 4_000_000  # bytes: a job and its one task file, with JSON's escapes
SESSION_SECONDS = 12 * 3600.0
TICKET_SECONDS = 120.0

_STATUS: tuple[tuple[type[AtollError], int], ...] = (
    (NotFound, 404),
    (Invalid, 422),
    (Denied, 403),
    (Unavailable, 503),
)


@dataclass(slots=True)
class Keys:
    """What opens the API: the hub's token, and for browsers short-lived sessions that are bought with a ticket.

    A cookie reaches every port of 127.0.0.1, so it holds a session and never the token itself.
    """

    token: str
    _sessions: dict[str, float] = field(default_factory=dict[str, float])
    _tickets: dict[str, float] = field(default_factory=dict[str, float])

    def ticket(self) -> str:
        """Return a word that opens one session within two minutes."""
        return _issue(self._tickets, TICKET_SECONDS)

    def session(self, given: str) -> str:
        """Return a new session for the hub's token or an unused ticket; raise `Denied` for anything else."""
        if not self.knows(given) and self._tickets.pop(given, 0.0) < time.monotonic():
            raise Denied("login: this link was used or is too old; run `atoll ui` for a fresh one")
        return _issue(self._sessions, SESSION_SECONDS)

    def knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())

    def remembers(self, session: str) -> bool:
        return self._sessions.get(session, 0.0) >= time.monotonic()

    def proof(self, challenge: str) -> str:
        """Return what shows a caller that we hold the token, without showing the token."""
        return proof(self.token, challenge)


def proof(token: str, challenge: str) -> str:
    """HMAC-SHA256 of a caller's challenge: a stranger on a reused port cannot make it, so it gets no token sent."""
    return hmac.new(token.encode(), f"atoll health {challenge}".encode(), "sha256").hexdigest()


def cookie_name(port: int) -> str:
    """Cookies ignore ports, so two hubs of one machine need two names."""
    return f"atoll-{port}"


def failure(error: AtollError) -> JSONResponse:
    """Turn an error into the JSON that `Client` turns back into the same error."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    told = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    return JSONResponse({"error": told}, status)


class Guard:
    """The layer itself; ``app`` is asked only when the request may pass."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._objection(HTTPConnection(scope), scope["method"])
            await (answer or self.app)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _objection(self, request: HTTPConnection, method: str) -> JSONResponse | None:
        """Return the refusal this request gets, or None where it may pass."""
        port = (request.scope.get("server") or ("", 0))[1]
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return failure(
                Denied(f"host: {', '.join(hosts)!r} is not this hub's loopback address; use 127.0.0.1:{port}")
            )
        if request.url.path in OPEN and method in SAFE:
            return None
        if not self._known(request, method, f"http://{hosts[0]}", cookie_name(port)):
            answer = failure(Denied("token: missing or wrong; the command line finds it in .atoll/hub/token by itself"))
            answer.status_code = 401
            return answer
        return _size_objection(request)

    def _known(self, request: HTTPConnection, method: str, origin: str, cookie: str) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.keys.knows(token)
        if not self.keys.remembers(request.cookies.get(cookie, "")):
            return False
        return method in SAFE or request.headers.get("origin") == origin


def _size_objection(request: HTTPConnection) -> JSONResponse | None:
    """Every body must say its length (the server below enforces it) and stay under the limit."""
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not length.isdigit():
        return _refused(411, "body: its length is not stated; send Content-Length")
    if int(length) > BODY_LIMIT:
        return _refused(413, f"body: {int(length):,} bytes is above {BODY_LIMIT:,}; send less")
    return None


def _refused(status: int, words: str) -> JSONResponse:
    answer = failure(Invalid(words))
    answer.status_code = status
    return answer


def _issue(kept: dict[str, float], seconds: float) -> str:
    now = time.monotonic()
    for old in [word for word, end in list(kept.items()) if end < now]:
        kept.pop(old, None)
    word = secrets.token_urlsafe(32)
    kept[word] = now + seconds
    return word

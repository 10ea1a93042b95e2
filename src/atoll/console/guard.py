"""Who may speak to the API: one ASGI layer in front of every route, so that no route can forget to ask.

It answers three attacks on a loopback server. Another program of the machine: every path but the few in `OPEN` needs
the hub's token, a user's, or one of its identity provider, and `atoll.console.routes` says what each may. A web page
elsewhere that makes the browser call us (CSRF): a cookie counts for a change only with our own Origin. A foreign name
that resolves to 127.0.0.1 (DNS rebinding): Host must be the loopback address we serve on.
"""

import asyncio
import hmac
import math
import secrets
import time
from dataclasses import dataclass, field, replace

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.console.oidc import Provider
from atoll.console.proofs import proof, signer
from atoll.console.tokens import OWN, Pass, Tokens
from atoll.errors import AtollError, Denied, Invalid, NotFound, Unavailable

OPEN = frozenset({"/", "/app.js", "/style.css", "/login", "/v1/health"})
SAFE = frozenset({"GET", "HEAD"})
BODY_LIMIT = 4_000_000  # bytes: a job and its one task file, with JSON's escapes
SESSION_SECONDS = 12 * 3600.0
TICKET_SECONDS = 120.0

_Until = tuple[float, Pass]  # the end on the monotonic clock, and whose it is
_STATUS: tuple[tuple[type[AtollError], int], ...] = (
    (NotFound, 404),
    (Invalid, 422),
    (Denied, 403),
    (Unavailable, 503),
)


@dataclass(slots=True)
class Keys:
    """What opens the API: the hub's own token, its users' and its provider's, and for browsers short-lived sessions
    that are bought with a ticket.

    A cookie reaches every port of 127.0.0.1, so it holds a session and never the token itself.
    """

    token: str
    tokens: Tokens | None = None
    provider: Provider | None = None
    _sessions: dict[str, _Until] = field(default_factory=dict[str, _Until])
    _tickets: dict[str, _Until] = field(default_factory=dict[str, _Until])

    def ticket(self, of: Pass) -> str:
        """Return a word that opens one session of somebody who is in, within two minutes."""
        return _issue(self._tickets, TICKET_SECONDS, of)

    def session(self, given: str) -> str:
        """Return a new session for the hub's own token or an unused ticket; raise `Denied` for anything else.

        It lasts no longer than the token that the ticket was got with."""
        found = (time.monotonic() + 1, OWN) if self._is_own(given) else self._tickets.pop(given, None)
        if found is None or found[0] < time.monotonic():
            raise Denied("login: this link was used or is too old; run `atoll ui` for a fresh one")
        return _issue(self._sessions, SESSION_SECONDS, found[1])

    async def check(self, token: str) -> Pass:
        """Return whom a token lets in. Raises `Denied`, and `Unavailable` where a provider would have to say."""
        if self._is_own(token):
            return OWN
        if self.tokens is not None and (self.provider is None or signer(token) == self.tokens.kid):
            return self.tokens.check(token)
        if self.provider is not None:
            return await asyncio.to_thread(self.provider.check, token)  # it may ask for keys, over the network
        raise Denied("token: it is not this hub's")

    def remembered(self, session: str) -> Pass:
        """Return whose session this is, with the roles of now. Raises `Denied`."""
        until, found = self._sessions.get(session, (-math.inf, OWN))
        if until < time.monotonic():
            raise Denied("login: there is no such session; run `atoll ui` for a fresh link")
        # What it opens ends with it, also a stream.
        return self.renewed(replace(found, expires=min(found.expires, time.time() + until - time.monotonic())))

    def renewed(self, found: Pass) -> Pass:
        """Return a pass of before with the roles of now. Raises `Denied` once what it was got with opens nothing."""
        if self.tokens is not None:
            return self.tokens.renewed(found)
        if time.time() >= found.expires:
            raise Denied("login: it has ended; log in again")
        return found

    def _is_own(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())

    def proof(self, challenge: str) -> str:
        """Return what shows a caller that we hold the token, without showing the token."""
        return proof(self.token, challenge)

    def signed(self, challenge: str) -> dict[str, str]:
        """Return what shows the same to the holder of a user's token."""
        if self.tokens is None:
            return {}
        return {"key": self.tokens.public.hex(), "signature": self.tokens.sign(challenge).hex()}


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
            answer = await self._objection(HTTPConnection(scope), scope["method"])
            await (answer or self.app)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _objection(self, request: HTTPConnection, method: str) -> JSONResponse | None:
        """Return the refusal this request gets, or None where it may pass."""
        port = (request.scope.get("server") or ("", 0))[1]
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return failure(
                Denied(f"host: {', '.join(hosts)!r} is not this hub's loopback address; use 127.0.0.1:{port}")
            )
        if request.url.path in OPEN and method in SAFE:
            return None
        try:
            passed = await self._passed(request, method, f"http://{hosts[0]}", cookie_name(port))
        except Denied as error:
            answer = failure(error)
            answer.status_code = 401
            return answer
        except Unavailable as error:
            return failure(error)
        request.state.passed = passed
        return _size_objection(request)

    async def _passed(self, request: HTTPConnection, method: str, origin: str, cookie: str) -> Pass:
        """Return whom a request's token or cookie lets in; raise `Denied`."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return await self.keys.check(token)
        if cookie not in request.cookies:
            raise Denied("token: none was sent; the command line finds the hub's in .atoll/hub/token by itself")
        found = self.keys.remembered(request.cookies[cookie])
        if method not in SAFE and request.headers.get("origin") != origin:
            raise Denied("origin: a session changes things from the hub's own page only")
        return found


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


def _issue(kept: dict[str, _Until], seconds: float, of: Pass) -> str:
    now = time.monotonic()
    for old in [word for word, (end, _) in list(kept.items()) if end < now]:
        kept.pop(old, None)
    word = secrets.token_urlsafe(32)
    kept[word] = (now + min(seconds, max(0.0, of.expires - time.time())), of)
    return word

"""People whom an identity provider vouches for: its tokens, checked by its published keys (OpenID Connect Discovery).

The provider is named in `oidc.yaml` of the hub's folder. Whom it vouches for is `sso:` and its own name for them, so
that none of its users can be taken for a local one; their roles are what its claims come to by the table there.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

import jwt
from pydantic import Field, model_validator

from atoll.console.tokens import LEEWAY, SCOPES, Pass
from atoll.errors import Denied, Unavailable
from atoll.spec.document import Document, Name, parse, read_yaml
from atoll.spec.user import ROLES, Role, User

SECONDS = 5.0  # for one document of the provider, from the first byte asked for to the last one read
LARGEST = 1 << 18  # bytes of one
FRESH = 600.0  # seconds for which its keys are taken without asking again
STALE = 3600.0  # and for which they are still taken while it does not answer
AGAIN = 10.0  # seconds between two askings, whoever sends tokens of unknown keys
_LIMIT = 16384  # characters of a token
_MOST = 64  # keys
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DISCOVERY = "/.well-known/openid-configuration"


class ProviderFile(Document):
    """Who vouches for users, and what its claims mean here."""

    issuer: str
    audience: str  # what its tokens for this hub are for
    keys: str | None = None  # where its JWKS is; by default where its discovery document says
    algorithms: tuple[Literal["RS256", "ES256", "EdDSA"], ...] = Field(default=("RS256", "ES256"), min_length=1)
    name: str = "sub"  # the claim that a user is called by; one that is never given to another person
    claim: str = "roles"  # whose values name roles, by the next table; dots lead into tables
    roles: dict[str, tuple[Role, ...]]
    projects: tuple[Name, ...] = ("default",)

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        for field, url in (("issuer", self.issuer), ("keys", self.keys)):
            if url is not None and not safe(url):
                raise ValueError(f"{field}: {url!r} can be read and changed on the way; use https")
        return self


class Provider:
    """One identity provider. Threads may share it."""

    def __init__(self, file: ProviderFile, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self._clock = file, clock
        self._turn = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read = self._asked = float("-inf")  # when its keys were last read, and last asked for

    @staticmethod
    def of(folder: Path) -> "Provider | None":
        """Return the one that the hub's folder names, if it names any. Raises `Invalid`."""
        path = folder / "oidc.yaml"
        return Provider(parse(ProviderFile, read_yaml(path), str(path))) if path.exists() else None

    def check(self, token: str) -> Pass:
        """Return whom a token lets in; it may ask the provider for its keys. Raises `Denied`, `Unavailable`."""
        if len(token) > _LIMIT:
            raise Denied(f"token: longer than {_LIMIT} characters; ask the provider for one with fewer claims")
        try:
            key = self._key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(self.file.algorithms),
                audience=self.file.audience,
                issuer=self.file.issuer,
                leeway=LEEWAY,
                options={"require": ["iss", "aud", "exp", "iat", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Denied(f"token: {error}; log in at {self.file.issuer} again") from None
        return Pass(self._user(claims), SCOPES["all"], float(claims["exp"]))

    def _user(self, claims: dict[str, Any]) -> User:
        said: Any = claims
        for part in self.file.claim.split("."):
            said = cast("dict[str, Any]", said).get(part) if isinstance(said, dict) else None
        values = said.split() if isinstance(said, str) else said if isinstance(said, list) else []
        given = {role for value in cast("list[Any]", values) for role in self.file.roles.get(str(value), ())}
        if not given:
            raise Denied(f"token: nothing in its claim {self.file.claim!r} is a role here; see oidc.yaml of the hub")
        roles = [role for role in ROLES if role in given]
        name: Any = claims.get(self.file.name)
        if isinstance(name, str):  # everybody whose token lacks the claim would be one user otherwise
            told = {"name": f"sso:{name}", "roles": roles, "projects": self.file.projects}
            with suppress(ValueError):
                return User.model_validate(told)
        raise Denied(
            f"token: its claim {self.file.name!r} is {repr(name)[:80]}, which is no name that can be used; have the "
            "provider put 1 to 120 letters, digits or _.@|+=- there, or name another claim in oidc.yaml of the hub"
        )

    def _key(self, kid: str) -> jwt.PyJWK:
        """Return the provider's key of this name, asking for its keys when they are old or this one is not among
        them, but not more often than every few seconds."""
        now = self._clock()
        if kid not in self._keys or now - self._read > FRESH:
            # Who sends made-up keys waits for none of the asking, and so holds no thread, once there are keys.
            first = self._read == float("-inf")
            if self._turn.acquire(first, 2 * SECONDS if first else -1):
                try:
                    self._ask(kid, now)
                finally:
                    self._turn.release()
        if now - self._read > STALE:
            raise Unavailable(f"{self.file.issuer}: told no keys for {STALE:g} s; try again")
        if (key := self._keys.get(kid)) is None:
            raise Denied(f"token: {self.file.issuer} has no key {kid[:80]!r}; log in there again")
        return key

    def _ask(self, kid: str, now: float) -> None:
        if now - self._asked <= AGAIN:
            return
        self._asked = now
        try:
            self._keys, self._read = self._fetched(), now
        except Unavailable:
            if now - self._read > STALE or kid not in self._keys:
                raise

    def _fetched(self) -> dict[str, jwt.PyJWK]:
        where = self.file.keys
        if where is None:
            told = fetched(self.file.issuer.rstrip("/") + _DISCOVERY)
            where = told.get("jwks_uri")
            if told.get("issuer") != self.file.issuer or not isinstance(where, str) or not safe(where):
                raise Unavailable(
                    f"{self.file.issuer}: its discovery document is another's, or names no https jwks_uri"
                )
        listed = fetched(where).get("keys")
        found: dict[str, jwt.PyJWK] = {}
        for item in cast("list[Any]", listed)[:_MOST] if isinstance(listed, list) else []:
            try:
                key = jwt.PyJWK.from_dict(item)
            except (jwt.PyJWTError, TypeError, AttributeError, ValueError):
                continue  # of a kind that is not for us
            # A shared secret among them would let whoever reads it make tokens.
            if key.key_id and key.algorithm_name in self.file.algorithms and key.public_key_use in (None, "sig"):
                found[key.key_id] = key
        if not found:
            raise Unavailable(f"{where}: has no key for {', '.join(self.file.algorithms)}; look at oidc.yaml")
        return found


def safe(url: str) -> bool:
    """Tell whether a URL is https, or does not leave this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def fetched(url: str) -> dict[str, Any]:
    """Return a small JSON table from elsewhere; redirects are not followed. Raises `Unavailable`."""
    import httpx

    until, data = time.monotonic() + SECONDS, b""
    try:
        with (
            httpx.Client(timeout=SECONDS, follow_redirects=False) as http,
            http.stream("GET", url, headers={"Accept": "application/json"}) as answer,
        ):
            if answer.status_code != 200:
                raise Unavailable(f"{url}: answered {answer.status_code}; look at oidc.yaml")
            for piece in answer.iter_bytes(1 << 14):
                data += piece
                if len(data) > LARGEST or time.monotonic() > until:
                    raise Unavailable(f"{url}: gave more than {LARGEST} bytes, or took over {SECONDS:g} s")
        said: Any = json.loads(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"{url}: does not answer ({type(error).__name__}); try again") from None
    except (ValueError, RecursionError):
        raise Unavailable(f"{url}: answered with no JSON; look at oidc.yaml") from None
    if not isinstance(said, dict):
        raise Unavailable(f"{url}: answered with no table; look at oidc.yaml")
    return cast("dict[str, Any]", said)

"""The tokens of a hub's users: JSON Web Tokens (RFC 7519) signed by Ed25519 (RFC 8037), made here and checked here.

A token is shown once and nowhere kept. What the journal has of it is its id, so that it can be revoked, and a token
that the journal does not know opens nothing, whoever had the key.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll import private
from atoll.console.proofs import ISSUER, answer, fingerprint
from atoll.errors import Corrupt, Denied, Invalid, NotFound
from atoll.journal.key import ed25519, pem
from atoll.runtime.users import Users
from atoll.spec.document import near_miss
from atoll.spec.user import LOCAL, TokenIssued, User

ALGORITHM = "EdDSA"  # and no other: what a token says of its own algorithm is compared with this
AUDIENCE = "atoll-api"
LEEWAY = 5.0  # seconds by which two clocks may differ
LONGEST = 720.0  # hours
_LIMIT = 8192  # characters
_CLAIMS = ["iss", "sub", "aud", "iat", "nbf", "exp", "jti", "scope"]

# What a token may be narrowed to, and which actions that leaves to it; a role may leave fewer.
SCOPES: dict[str, tuple[str, ...]] = {
    "read": ("view", "audit"),
    "submit": ("view", "submit", "cancel"),
    "promote": ("view", "promote"),
    "deploy": ("view", "deploy"),
    "export": ("view", "export"),
    "erase": ("view", "erase"),
    "approve": ("view", "approve"),
    "administer": ("view", "administer"),
    "all": ("view", "audit", "submit", "cancel", "promote", "deploy", "export", "erase", "approve", "administer"),
}


@dataclass(frozen=True, slots=True)
class Pass:
    """Who may come in, and what for: `scope` names actions. `token` is the id of a token that the hub made."""

    user: User
    scope: tuple[str, ...]
    expires: float  # seconds since the epoch
    token: str = ""


OWN = Pass(LOCAL, SCOPES["all"], float("inf"))


class Tokens:
    """A hub's: by the private key in its ``folder``, which is made where there is none.

    Raises `Denied` where others can read the key, `Corrupt` for a file that holds none, `Unavailable`.
    """

    def __init__(self, folder: Path, users: Users) -> None:
        self._users = users
        self._key = _kept(folder / "users.key")
        self.public = self._key.public_key().public_bytes_raw()
        self.kid = fingerprint(self.public)
        self._issuer = f"{ISSUER}{self.kid}"

    def issue(self, name: str, hours: float, scopes: Sequence[str], by: str) -> str:
        """Return a new token of a user. Raises `Invalid` for a scope or a time that is none, `NotFound`."""
        if not 0 < hours <= LONGEST:
            raise Invalid(f"hours: {hours:g}: a token is good for more than 0 and at most {LONGEST:g} hours")
        for scope in scopes:
            if scope not in SCOPES:
                raise Invalid(f"scope: {scope!r}{near_miss(scope, list(SCOPES))}")
        now = time.time()
        kept, expires = f"t-{secrets.token_hex(8)}", now + hours * 3600
        self._users.issued(TokenIssued(token=kept, name=name, scope=tuple(scopes), expires=expires, by=by))
        claims = {"iss": self._issuer, "sub": name, "aud": AUDIENCE, "jti": kept, "scope": " ".join(scopes)}
        times = {"iat": int(now), "nbf": int(now), "exp": int(expires)}
        return jwt.encode({**claims, **times}, self._key, algorithm=ALGORITHM, headers={"kid": self.kid})

    def check(self, token: str) -> Pass:
        """Return whom a token lets in, with the roles of now. Raises `Denied`, with what is wrong with it."""
        if len(token) > _LIMIT:
            raise Denied(f"token: longer than {_LIMIT} characters, and no token of this hub is")
        try:
            if jwt.get_unverified_header(token).get("kid") != self.kid:
                raise Denied("token: another hub's, or of a key that this hub has no more; ask for another")
            claims = jwt.decode(
                token,
                self._key.public_key(),
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": _CLAIMS},
            )
        except jwt.PyJWTError as error:
            raise Denied(f"token: {error}; ask an owner of the hub for another") from None
        kept, scopes = str(claims["jti"]), str(claims["scope"]).split()
        scope = tuple(dict.fromkeys(action for name in scopes for action in SCOPES.get(name, ())))
        return Pass(self._users.holder(kept, str(claims["sub"])), scope, float(claims["exp"]), kept)

    def renewed(self, found: Pass) -> Pass:
        """Return a pass of before with the roles of now. Raises `Denied` once its token would be refused."""
        if time.time() >= found.expires:
            raise Denied("token: it has expired; log in again")
        if not found.token:
            return found
        return replace(found, user=self._users.holder(found.token, found.user.name))

    def sign(self, challenge: str) -> bytes:
        """Prove to a caller whose token is of this key that it speaks with its hub."""
        return self._key.sign(answer(challenge))


def _kept(path: Path) -> Ed25519PrivateKey:
    breach = "others than its owner can make tokens; remove it, and all tokens end"
    data = private.read(path, breach)
    if data is None:
        private.create(path, pem(Ed25519PrivateKey.generate()))
        data = private.read(path, breach)
    if data is None:
        raise NotFound(f"{path}: the key of the users' tokens is gone; start the hub anew")
    key = ed25519(data)
    if key is None:
        raise Corrupt(f"{path}: it holds no Ed25519 key; remove it, and all tokens end")
    return key

"""Who the hub's users are and which tokens open something: folded from the journal, and changed through it."""

import threading
import time
from collections.abc import Callable

from atoll.boundary.gate import Gate
from atoll.errors import Denied, Invalid, NotFound
from atoll.journal import Entry
from atoll.spec.document import near_miss
from atoll.spec.policy import Action, Part, Request
from atoll.spec.user import LOCAL, TokenIssued, TokensRevoked, TokenView, User, UserRemoved, UserSet, UserView

Record = Callable[..., object]  # (*events, actor) -> once it returns they are durable and folded


class Users:
    """Fed every journal entry in order; any thread may ask."""

    def __init__(self, record: Record, gate: Gate) -> None:
        self._record, self._gate = record, gate
        self._users: dict[str, User] = {}
        self._tokens: dict[str, TokenIssued] = {}  # that are not revoked
        self._turn = threading.Lock()  # from a look at what is there to the change of it

    def seen(self, entry: Entry) -> None:
        match entry.event:
            case UserSet() as event:
                self._users[event.user.name] = event.user
            case UserRemoved() as event:
                self._users.pop(event.name, None)
                self._tokens = {name: one for name, one in self._tokens.items() if one.name != event.name}
            case TokenIssued() as event:
                self._tokens[event.token] = event
            case TokensRevoked() as event:
                self._tokens = {name: one for name, one in self._tokens.items() if name not in event.tokens}
            case _:
                pass

    def may(self, user: User, action: Action, part: Part | None = None) -> None:
        """Ask the hub's rules whether somebody may see something of the hub, or administer a part of it; raise
        `Denied`. It is journalled either way."""
        self._gate.ask(_seeing(user, action, part), part or "the hub")

    def sees(self, user: User, action: Action) -> bool:
        """Tell whether somebody may see something of the hub; nothing of it is journalled."""
        return self._gate.decide(_seeing(user, action)).allowed

    def get(self, name: str) -> User:
        """Return a local user. Raises `NotFound`."""
        if name == LOCAL.name:
            return LOCAL
        if name not in self._users:
            known = near_miss(name, list(self._users)) or "; add one by: atoll user add NAME --role scientist"
            raise NotFound(f"user: there is no {name!r}{known}")
        return self._users[name]

    def renewed(self, user: User) -> User:
        """Return a user with the roles and projects of now; one of an identity provider as it vouched for last.

        Raises `Denied` for who is no user any more.
        """
        if ":" in user.name:
            return user
        try:
            return self.get(user.name)
        except NotFound:
            raise Denied(f"user: {user.name!r} is no user of this hub any more; an owner adds users") from None

    def holder(self, token: str, name: str) -> User:
        """Return whose token this is. Raises `Denied` for one that was revoked, or never made here."""
        issued = self._tokens.get(token)
        user = self._users.get(name)
        if issued is None or issued.name != name or user is None:
            raise Denied("token: it was revoked, or its user removed; ask an owner of the hub for another")
        return user

    def put(self, user: User, by: str) -> User:
        """Make somebody a user, or give one other roles and projects. Raises `Invalid`."""
        if user.name == LOCAL.name:
            raise Invalid(f"user: {user.name!r} is who holds the hub's own token; choose another name")
        if ":" in user.name:
            raise Invalid(f"user: {user.name!r} is an identity provider's, which gives it roles; see docs/users.md")
        if not user.roles:
            raise Invalid(f"user: {user.name!r} has no role; give one, for example --role viewer")
        self._record(UserSet(user=user, by=by), actor=by)
        return user

    def remove(self, name: str, by: str) -> None:
        """Take a user out; their tokens open nothing from now on, their runs go on. Raises `NotFound`."""
        with self._turn:
            if name == LOCAL.name:
                raise Invalid(f"user: {name!r} is who holds the hub's own token; to change it, start the hub anew")
            self.get(name)
            self._record(UserRemoved(name=name, by=by), actor=by)

    def issued(self, token: TokenIssued) -> None:
        """Write down that a token was made, before anybody has it. Raises `NotFound` where its user is none."""
        with self._turn:
            if token.name == LOCAL.name:
                raise Invalid(f"user: {token.name!r} has the hub's own token; add a user who is to have one")
            self.get(token.name)
            self._record(token, actor=token.by)

    def revoke(self, what: str, by: str) -> tuple[str, ...]:
        """End one token, by its id, or all of a user. Returns their ids; raises `NotFound` where there are none."""
        with self._turn:
            found = tuple(name for name, one in self._tokens.items() if what in (name, one.name))
            if not found:
                raise NotFound(f"token: {what!r} is neither one that opens anything nor a user who has such")
            self._record(TokensRevoked(tokens=found, by=by), actor=by)
        return found

    def views(self) -> list[UserView]:
        """Return the users by name, each with those tokens that are good now."""
        now = time.time()
        good = [one for one in self._tokens.values() if one.expires > now]
        return [
            UserView(
                user=user,
                tokens=tuple(
                    TokenView(token=one.token, expires=one.expires, scope=one.scope) for one in good if one.name == name
                ),
            )
            for name, user in sorted(self._users.items())
        ]


def _seeing(user: User, action: Action, part: Part | None = None) -> Request:
    who = {"user": user.name, "roles": user.roles, "projects": user.projects}
    return Request.model_validate({"action": action, "part": part, **who})

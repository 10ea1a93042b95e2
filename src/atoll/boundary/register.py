"""Which certificates the hub honours: its members, its open invitations, and the issue of what they may have.

TLS proves that the CA signed a name. Whether that name still opens anything is asked here, at the beginning of each
conversation and again while it lasts, so a revoked member is out at once and not when its certificate ends.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from atoll.boundary.certificates import HUB_LIFE, Authority, Certificate, requested
from atoll.boundary.identity import Identity, Peer, Ticket, key_digest
from atoll.errors import Denied
from atoll.spec.document import Digest, Name


@dataclass(frozen=True, slots=True)
class Issued:
    """A site was given a certificate; with ``token``, its first one, for an invitation of this digest."""

    site: Name
    key: Digest
    serial: str
    expires: float  # seconds since the epoch
    token: Digest | None = None


@dataclass(slots=True)
class _Invitation:
    token: Digest
    expires: float
    key: Digest | None = None  # the one key that it was used for


@dataclass(slots=True)
class _Member:
    key: Digest
    expires: float  # of its latest certificate


class Members:
    """A fold: fed in order with what was journalled, by `invited`, `issued` and `revoked`; the rest decides."""

    def __init__(self) -> None:
        self._invitations: dict[str, _Invitation] = {}
        self._members: dict[str, _Member] = {}
        self._out: set[Digest] = set()  # keys that were revoked or replaced: they never come in again

    def invited(self, site: Name, token: Digest, expires: float) -> None:
        """An invitation takes the place of an earlier one; a member stays one until it is used."""
        self._invitations[site] = _Invitation(token, expires)

    def issued(self, event: Issued) -> None:
        member, invitation = self._members.get(event.site), self._invitations.get(event.site)
        if event.token is not None and invitation is not None and invitation.token == event.token:
            invitation.key = event.key
        if member is not None and member.key != event.key:
            self._out.add(member.key)
        self._members[event.site] = _Member(event.key, event.expires)

    def revoked(self, site: Name) -> None:
        self._invitations.pop(site, None)
        member = self._members.pop(site, None)
        if member is not None:
            self._out.add(member.key)

    def knows(self, site: Name) -> bool:
        """Tell whether there is something of this site to revoke."""
        return site in self._members or site in self._invitations

    def admit(self, peer: Peer, now: float) -> None:
        """Let a site's certificate in, or raise `Denied` in words that say what to do."""
        if peer.kind != "site":
            raise Denied(f"site {peer.name!r}: a join token opens nothing but enrolment; join with it first")
        member = self._members.get(peer.name)
        if member is None or member.key != peer.key:
            if peer.key in self._out:
                raise Denied(f"site {peer.name!r}: its certificate was revoked; ask for another invitation")
            raise Denied(f"site {peer.name!r}: this hub does not know its certificate; ask for another invitation")
        if member.expires < now:
            raise Denied(f"site {peer.name!r}: its certificate ran out; join again with the same token")

    def enrol(self, peer: Peer, key: Digest, now: float) -> bool:
        """Let an invited ``peer`` have a certificate for ``key``, or raise `Denied`; tell whether it is its first one.

        A key that the token was used for may come again, however late: an interrupted join is repeated, and a site that
        was away longer than its certificate lasts comes back without a person at the hub. Another key may not.
        """
        invitation = self._invitations.get(peer.name)
        if peer.kind != "invited" or invitation is None or invitation.token != peer.key:
            raise Denied(f"site {peer.name!r}: this token is unknown or was withdrawn; ask for another invitation")
        if invitation.key is not None and invitation.key != key:
            raise Denied(f"site {peer.name!r}: this token was used, by another key; ask for another invitation")
        if invitation.key is None and invitation.expires < now:
            raise Denied(f"site {peer.name!r}: this token is out of date; ask for another invitation")
        if key in self._out:
            raise Denied(f"site {peer.name!r}: this key was revoked; make a new one and ask for another invitation")
        return invitation.key is None


class Doorkeeper(Protocol):
    """Whom a port asks about who comes in: the hub's registrar, or a relay that passes it on to the hub."""

    @property
    def identity(self) -> Identity: ...
    def admit(self, peer: Peer) -> None: ...
    def certify(self, peer: Peer, asked: "Asked") -> bytes: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a certificate, as PEM: for the caller itself or, by way of relays, for another.

    `name` is that other's proven name, with the relays on its way to the caller in `through`, the caller's next first.
    `port`: it is for a relay's port.
    """

    request: bytes
    port: bool = False
    name: str = ""
    through: tuple[str, ...] = ()


class Ways(Protocol):
    """Who may be behind whom, and who may open a port for others."""

    def is_relay(self, site: str) -> bool: ...
    def way(self, site: str, invited: bool = False) -> tuple[str, ...]:
        """Return the relays between the hub and a site, the hub's next first; of an ``invited`` one, those to come."""
        ...


class Registrar:
    """Signs for whom `members` lets in. ``record`` makes a certificate durable, and folded, before it is handed out."""

    def __init__(
        self,
        authority: Authority,
        members: Members,
        record: Callable[[Issued], object],
        ways: Ways,
        names: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authority, self._members, self._record, self._clock = authority, members, record, clock
        self._turn = threading.Lock()
        self._latest: dict[Peer, Certificate] = {}
        self._ways, self._names = ways, names
        self._identity, self._made = authority.identity(names), clock()

    @property
    def identity(self) -> Identity:
        """The hub's own, for its port. Halfway through its life there is another, for a hub that runs for years."""
        with self._turn:
            if self._clock() > self._made + HUB_LIFE.total_seconds() / 2:
                self._identity, self._made = self._authority.identity(self._names), self._clock()
            return self._identity

    def invite(self, site: Name, address: str) -> Ticket:
        """Return a join token for whom the hub then journals as invited."""
        return self._authority.invite(site, address)

    def admit(self, peer: Peer) -> None:
        """Raise `Denied` unless this certificate opens a conversation, and keeps it open, now."""
        self._members.admit(peer, self._clock())

    def certify(self, peer: Peer, asked: Asked) -> bytes:
        """Return a certificate as PEM: a first one for a join token, a fresh one for a member's own key.

        Raises `Denied` and, for a request that is none, `Invalid`.
        """
        public = requested(asked.request)
        peer = self._vouched(peer, asked) if asked.name else peer
        if asked.port:
            return self._port(peer, public)
        key = key_digest(public)
        with self._turn:  # a token is good once, also for two who bring it at the same time
            if peer.kind == "invited":
                token = peer.key if self._members.enrol(peer, key, self._clock()) else None
                return self._issue(peer, public, token)
            self._members.admit(peer, self._clock())
            if key != peer.key:
                raise Denied(f"site {peer.name!r}: a membership is one key, and this is another; join anew")
            return self._issue(peer, public)

    def _vouched(self, relay: Peer, asked: Asked) -> Peer:
        """Return for whom a relay asks. It has met that party's certificate at its own port, and is believed for those
        that were invited to be behind it, by just this way."""
        self._members.admit(relay, self._clock())
        peer = Peer.read(asked.name)
        ways = self._ways.way(peer.name, peer.kind == "invited")
        if peer.hub != self._authority.hub or not ways or ways != (relay.name, *asked.through):
            raise Denied(f"site {relay.name!r}: asks for {peer.name!r}, which was not invited to be behind it")
        return peer

    def _port(self, peer: Peer, key: ec.EllipticCurvePublicKey) -> bytes:
        self._members.admit(peer, self._clock())
        if not self._ways.is_relay(peer.name):
            raise Denied(f"site {peer.name!r}: was not invited as a relay, so no others dial it; see atoll site invite")
        return self._authority.certify_port(peer.name, key)

    def _issue(self, peer: Peer, key: ec.EllipticCurvePublicKey, token: Digest | None = None) -> bytes:
        """Sign and record. Who asks again soon is given the same, so that asking costs the journal nothing."""
        latest = self._latest.get(peer)
        if latest is None or token is not None or self._clock() > (latest.starts + latest.expires) / 2:
            latest = self._authority.certify(peer.name, key)
            self._record(Issued(peer.name, latest.key, latest.serial, latest.expires, token))
            self._latest[peer] = latest
        return latest.pem

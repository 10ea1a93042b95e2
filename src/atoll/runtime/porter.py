"""Who may come in at a relay's port: whom the hub tells it of, and whoever the hub certifies when it passes that on."""

import threading
import time
from collections.abc import Callable

from cryptography import x509

from atoll.boundary.gate import pass_on
from atoll.boundary.identity import UNREADABLE, Identity, Peer, check_issued, new_key, peer_of, pem_of, request
from atoll.boundary.register import Asked
from atoll.errors import Denied, LinkLost
from atoll.spec.message import Admitted

_AWAY = 1.0  # seconds that a site is not let in again for, once the hub did not take its session
_AGAIN = 60.0  # seconds between two attempts to renew
_RENEWED_AT = 2 / 3  # of a certificate's life


class Porter:
    """Implements `atoll.boundary.register.Doorkeeper`. May be asked from any thread.

    Nothing of it is on disk: the key of the port is made anew each time, and whom to admit the hub says in each
    session.
    """

    def __init__(self, address: str, mine: Callable[[], Identity]) -> None:
        """``address`` is where the hub is, or the relay in its place; ``mine``, this relay's own membership of now."""
        self._address, self._mine = address, mine
        self._turn = threading.Lock()
        self._admitted = Admitted()
        self._away: dict[str, float] = {}
        self.changed: Callable[[], None] = lambda: None  # called when somebody inside may not be admitted any more
        self._tried = time.monotonic()
        self._identity = self._certified()

    @property
    def identity(self) -> Identity:
        return self._identity

    def _certified(self) -> Identity:
        """Return a new key with the hub's certificate for it. Raises `Denied` where this site is to be no relay."""
        mine, key = self._mine(), new_key()
        certificate = pass_on(self._address, mine, Asked(request(key), port=True))
        try:
            given, root = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(mine.root)
        except UNREADABLE:
            raise Denied("certificate: the hub answered with something else; update it or the relay") from None
        check_issued(given, root, key.public_key(), "relay")
        return Identity(pem_of(key), certificate, mine.root)

    def renew(self) -> None:
        """Have another key certified for the port when it is time; what is open stays open. Raises as `pass_on`."""
        starts, ends = self._identity.starts.timestamp(), self._identity.ends.timestamp()
        if time.time() > starts + (ends - starts) * _RENEWED_AT and time.monotonic() > self._tried + _AGAIN:
            self._tried = time.monotonic()
            self._identity = self._certified()

    def told(self, admitted: Admitted) -> None:
        """Take the hub's word on who may come in, in place of the last one."""
        with self._turn:
            self._admitted = admitted
        self.changed()

    def turn_away(self, site: str) -> None:
        """Have a site dial again: the hub did not take its session."""
        with self._turn:
            self._away[site] = time.monotonic() + _AWAY
        self.changed()

    def admit(self, peer: Peer) -> None:
        """Let a site in. Raises `Denied` for one that the hub shut out, `LinkLost` for one that it did not tell of:
        it may yet."""
        with self._turn:
            known, away = self._admitted, self._away.get(peer.name, 0.0) > time.monotonic()
        if peer.key in known.out:
            raise Denied(f"site {peer.name!r}: its certificate was revoked; ask for another invitation")
        if peer.kind == "invited":
            raise Denied(f"site {peer.name!r}: a join token opens nothing but enrolment; join with it first")
        if peer.kind != "site" or known.sites.get(peer.name) != peer.key:
            raise LinkLost(f"site {peer.name!r}: the hub did not tell this relay of it; try again")
        if away:
            raise LinkLost(f"site {peer.name!r}: the hub did not take its session; try again")

    def certify(self, peer: Peer, asked: Asked) -> bytes:
        """Pass a request on. The hub decides; it believes this relay about who stands at its port."""
        name, through = (asked.name, (peer.name, *asked.through)) if asked.name else (str(peer), ())
        onward = Asked(asked.request, asked.port, name, through)
        certificate = pass_on(self._address, self._mine(), onward)
        if peer.kind == "invited" and not asked.name and not asked.port:
            self._enrolled(peer.name, certificate)
        return certificate

    def _enrolled(self, site: str, certificate: bytes) -> None:
        """Let a site in that has just been given its certificate: it may be here before the hub's word on it is."""
        try:
            key = peer_of(x509.load_pem_x509_certificate(certificate)).key
        except UNREADABLE:
            return  # the site finds out by itself
        with self._turn:
            self._admitted = self._admitted.model_copy(update={"sites": {**self._admitted.sites, site: key}})

"""A site's own key and certificate, in one private file of its folder. The key is made here and never leaves.

Keys lie in identity.json, or in joining.json until the hub has certified them; each is only ever replaced whole, so an
interrupted join or renewal leaves the one before it and may be repeated.
"""

import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from atoll import private
from atoll.boundary.certificates import SKEW
from atoll.boundary.identity import UNREADABLE, Identity, Ticket, check_issued, new_key, pem_of, private_key, request
from atoll.errors import Corrupt, Denied, Invalid, NotFound
from atoll.spec.document import Digest, Document, parse_json

Certify = Callable[[bytes], bytes]  # a request as PEM -> the certificate as PEM
_AGAIN = 60.0  # seconds between two attempts to renew
_RENEWED_AT = 2 / 3  # of a certificate's life


class _Kept(Document):
    """What lies in the file. Without a certificate it is a join that is not over."""

    invitation: Digest
    key: str  # PEM
    root: str
    certificate: str = ""

    @property
    def identity(self) -> Identity:
        return Identity(self.key.encode(), self.certificate.encode(), self.root.encode())


class Keyring:
    """The keys of the site ``name`` that lives in ``home``. Raises `Corrupt` for a file that was changed."""

    def __init__(self, home: Path, name: str) -> None:
        self._file, self._joining = home / "identity.json", home / "joining.json"
        self._name = name
        self._kept = _read(self._file)
        if self._kept is not None and not self._kept.certificate:
            raise _spoilt(self._file)
        self._tried = 0.0

    @property
    def identity(self) -> Identity:
        """What the site dials with. Raises `NotFound` when it has joined no hub."""
        if self._kept is None:
            raise NotFound(f"{self._file}: this site has joined no hub yet; join with a token from `atoll site invite`")
        return self._kept.identity

    def join(self, ticket: Ticket, exchange: Callable[[Identity, bytes], bytes]) -> Identity:
        """Return an identity for the hub of ``ticket``: the one at hand while it lasts, else a certified one.

        ``exchange`` carries a request to the hub under the ticket's own identity. Raises `Invalid` when the token is
        for another site, `Denied` as the hub does, `LinkLost`.
        """
        if ticket.site != self._name:
            raise Invalid(
                f"token: it is for site {ticket.site!r} and this is {self._name!r}; ask for one for this site"
            )
        kept = self._kept
        mine = kept is not None and kept.invitation == ticket.invitation
        if kept is not None and mine and kept.identity.ends.timestamp() > time.time():
            return kept.identity
        # The key is on disk before the hub binds the token to it.
        asked = kept if kept is not None and mine else self._prepared(ticket)
        certificate = exchange(ticket.identity, request(private_key(asked.key.encode())))
        self._keep(asked, certificate)
        return self.identity

    def due(self) -> bool:
        """Tell whether it is time to renew, which is at two thirds of a certificate's life and then once a minute."""
        if self._kept is None:
            return False
        identity, now = self._kept.identity, time.time()
        life = (identity.ends - identity.starts - SKEW).total_seconds()
        late = now > identity.ends.timestamp() - (1 - _RENEWED_AT) * life
        return late and abs(now - self._tried) > min(_AGAIN, life / 30)

    def renew(self, certify: Certify) -> Identity:
        """Have the key certified anew; the next dial uses it, and what is open stays open. Raises as ``certify``."""
        self._tried = time.time()
        assert self._kept is not None, "only who has joined can renew"
        self._keep(self._kept, certify(request(private_key(self._kept.key.encode()))))
        return self.identity

    def _prepared(self, ticket: Ticket) -> _Kept:
        """Return the key of an interrupted join by this token, or a new one."""
        found = _read(self._joining)
        if found is not None and found.invitation == ticket.invitation:
            return found
        fresh = _Kept(invitation=ticket.invitation, key=pem_of(new_key()).decode(), root=ticket.identity.root.decode())
        private.write(self._joining, fresh.model_dump_json().encode())
        return fresh

    def _keep(self, asked: _Kept, certificate: bytes) -> None:
        """Put a certificate into force once it is what was asked for. Raises `Denied` for another."""
        try:
            given = x509.load_pem_x509_certificate(certificate)
        except UNREADABLE:
            raise Denied("certificate: the hub answered with something else; update it or the site") from None
        root = x509.load_pem_x509_certificate(asked.root.encode())
        peer = check_issued(given, root, private_key(asked.key.encode()).public_key(), "site")
        if peer.name != self._name:
            raise Denied(f"certificate: the hub made it for {peer.name!r} and this is {self._name!r}; ask for another")
        kept = asked.model_copy(update={"certificate": certificate.decode()})
        private.write(self._file, kept.model_dump_json().encode())
        self._joining.unlink(missing_ok=True)
        self._kept = kept


def _read(path: Path) -> _Kept | None:
    data = private.read(path, "others than its owner can use the site's key; run chmod 600 on it, or join anew")
    if data is None:
        return None
    try:
        kept = parse_json(_Kept, data, str(path))
        private_key(kept.key.encode())
        x509.load_pem_x509_certificate(kept.root.encode())
        if kept.certificate:
            x509.load_pem_x509_certificate(kept.certificate.encode())
    except (Invalid, *UNREADABLE):
        raise _spoilt(path) from None
    return kept


def _spoilt(path: Path) -> Corrupt:
    return Corrupt(f"{path}: it is not what was written there; remove it and join with a new token")

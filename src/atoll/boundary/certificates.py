"""The hub's own small CA: one root key that never leaves its folder, and the certificates that it signs.

ECDSA on P-256 with SHA-256. The root may sign leaves only (path length 0). A leaf is good for one side of TLS only: the
hub's as server, every other as client, so that no member can pose as the hub. Profile: RFC 5280.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from atoll import private
from atoll.boundary.identity import (
    UNREADABLE,
    Identity,
    Peer,
    Ticket,
    hub_of,
    key_digest,
    new_key,
    pem_of,
    private_key,
)
from atoll.errors import Corrupt, Invalid, NotFound
from atoll.spec.document import Digest

SITE_LIFE = timedelta(hours=24)
# What is certified is dated back by this much, for a party whose clock is behind.
SKEW = timedelta(hours=1)
_ROOT_LIFE = timedelta(days=3650)
HUB_LIFE = timedelta(days=365)  # made anew, key and all, when the hub starts and at half of it
_REQUEST_LIMIT = 4096  # bytes; ours have about 400
_DNS = re.compile(r"(?=.{1,253}$)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Certificate:
    """A site's certificate as PEM, and what the journal should know of it."""

    pem: bytes
    key: Digest
    serial: str
    starts: float  # seconds since the epoch, when it was signed
    expires: float  # seconds since the epoch


class Authority:
    """The CA in ``folder``. Raises `NotFound` when there is none, `Denied` when others can read its key."""

    def __init__(self, folder: Path, life: timedelta = SITE_LIFE, clock: Callable[[], float] = time.time) -> None:
        self._life, self._clock = life, clock
        self._key, self._root = _read(folder / "root.pem")
        self.hub = hub_of(self._key.public_key())

    @staticmethod
    def create(folder: Path) -> "Authority":
        """Make a CA. Raises `Invalid` when there is one: another would lock every site out."""
        path = folder / "root.pem"
        known = f"{path}: this hub has a CA; sites know it by that one, so it is kept"
        if path.exists():
            raise Invalid(known)
        key = new_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Atoll hub {hub_of(key.public_key())}")])
        usage = x509.KeyUsage(False, False, False, False, False, True, False, False, False)
        root = (
            _builder(name, name, key.public_key(), datetime.now(UTC), _ROOT_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        if not private.create(path, pem_of(key) + _pem(root)):
            raise Invalid(known)
        folder.chmod(0o700)
        return Authority(folder)

    def identity(self, names: Sequence[str] = ()) -> Identity:
        """Return the hub's own for its port, with a new key that is never stored.

        ``names`` are the DNS names and IP addresses that sites dial; this machine's own for itself are always in it.
        """
        key = new_key()
        known = [_name(name) for name in dict.fromkeys((*_LOOPBACK, *names))]
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        certificate = self._sign(key.public_key(), Peer(self.hub, "hub"), usage, HUB_LIFE, known)
        return Identity(pem_of(key), _pem(certificate), _pem(self._root))

    def invite(self, site: str, address: str) -> Ticket:
        """Return what a site joins with. Nothing of it is kept here; the hub journals `Ticket.invitation`.

        Until when it is good is the hub's to say, for a key that it has enrolled must be able to come back with it.
        """
        key = new_key()
        peer = Peer(self.hub, "invited", site, key_digest(key.public_key()))
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        life = self._root.not_valid_after_utc - self._now()
        certificate = self._sign(key.public_key(), peer, usage, life)
        return Ticket(address, Identity(pem_of(key), _pem(certificate), _pem(self._root)))

    def certify(self, site: str, key: ec.EllipticCurvePublicKey) -> Certificate:
        """Sign a certificate for a site's key. Whether the site may have one is the caller's to decide first."""
        peer = Peer(self.hub, "site", site, key_digest(key))
        certificate = self._sign(key, peer, ExtendedKeyUsageOID.CLIENT_AUTH, self._life)
        serial, starts = f"{certificate.serial_number:x}", (certificate.not_valid_before_utc + SKEW).timestamp()
        return Certificate(_pem(certificate), peer.key, serial, starts, certificate.not_valid_after_utc.timestamp())

    def certify_port(self, relay: str, key: ec.EllipticCurvePublicKey) -> bytes:
        """Sign a certificate for the port of a relay, as PEM. It is good for a server only, and in this one's name."""
        peer = Peer(self.hub, "relay", relay, key_digest(key))
        return _pem(self._sign(key, peer, ExtendedKeyUsageOID.SERVER_AUTH, self._life))

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        peer: Peer,
        usage: x509.ObjectIdentifier,
        life: timedelta,
        names: Sequence[x509.GeneralName] = (),
    ) -> x509.Certificate:
        """Sign a leaf. Its only URI is who it is; ``names`` are for other clients, ours look at the URI."""
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, (peer.name or "hub"))])
        signs = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(subject, self._root.subject, key, self._now(), life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(signs, critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(peer)), *names]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def requested(data: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key that a PKCS #10 request proves to hold; what else it says is ignored. Raises `Invalid`."""
    wrong = Invalid("request: it is no signed request for a P-256 key; update the site")
    if len(data) > _REQUEST_LIMIT:
        raise wrong
    try:
        asked = x509.load_pem_x509_csr(data)
        key = asked.public_key()
        proven = asked.is_signature_valid
    except UNREADABLE:
        raise wrong from None
    if not proven or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise wrong
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    if not _DNS.fullmatch(name):
        raise Invalid(f"name: {name[:100]!r} is neither a DNS name nor an IP address; give what sites dial")
    return x509.DNSName(name)


def _read(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    data = private.read(path, "others than its owner can use the CA's key; run chmod 600 on it and ask who has it")
    if data is None:
        raise NotFound(f"{path}: this hub has no CA yet; make one with: atoll hub init")
    try:
        key, root = private_key(data), x509.load_pem_x509_certificate(data)
    except ValueError:
        raise Corrupt(f"{path}: it holds no P-256 key and certificate; restore it from a copy") from None
    if root.public_key() != key.public_key():
        raise Corrupt(f"{path}: its certificate is for another key; restore it from a copy")
    return key, root


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

"""A hub's register with a clock to turn, members of it, and papers that no hub would sign."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from atoll.boundary.certificates import SITE_LIFE, Authority
from atoll.boundary.identity import Identity, Peer, hub_of, key_digest, new_key, pem_of, private_key
from atoll.boundary.keyring import Keyring
from atoll.boundary.register import Asked, Members, Registrar, Ways
from atoll.errors import Unavailable
from atoll.runtime.tree import Tree

PEM = serialization.Encoding.PEM
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
HOUR = 3600.0


@dataclass
class Office:
    """What a hub has to certify with, and what it recorded."""

    folder: Path
    names: tuple = ()
    ways: Ways = field(default_factory=Tree)  # nobody is behind anybody
    life: timedelta = SITE_LIFE
    ahead: float = 0.0  # seconds by which the register's clock is ahead
    full: bool = False  # the journal's disk
    recorded: list = field(default_factory=list)
    members: Members = field(default_factory=Members)

    def __post_init__(self):
        Authority.create(self.folder / "ca")
        self.authority = Authority(self.folder / "ca", self.life, self.clock)
        self.registrar = Registrar(self.authority, self.members, self.record, self.ways, self.names, self.clock)

    def clock(self):
        return time.time() + self.ahead

    def record(self, issued):
        if self.full:
            raise Unavailable("journal: no space left on its disk")
        self.recorded.append(issued)
        self.members.issued(issued)

    def invite(self, site="lyon", address="tls://127.0.0.1:1", hours=1.0):
        ticket = self.registrar.invite(site, address)
        self.members.invited(site, ticket.invitation, self.clock() + hours * HOUR)
        return ticket

    def exchange(self, identity, request):
        """Certify without a socket between: the identity is taken at its word."""
        return self.registrar.certify(identity.peer, Asked(request))

    def member(self, site="lyon"):
        """Return the keyring of a site that has joined."""
        home = self.folder / site
        home.mkdir(exist_ok=True)
        keyring = Keyring(home, site)
        keyring.join(self.invite(site), self.exchange)
        return keyring

    @property
    def ca(self):
        """The CA's own key and certificate: what a forger would give much for."""
        data = (self.folder / "ca" / "root.pem").read_bytes()
        return private_key(data), x509.load_pem_x509_certificate(data)


class Posing:
    """A registrar whose port shows another identity than its hub's own."""

    def __init__(self, registrar, identity):
        self._registrar, self.identity = registrar, identity

    def __getattr__(self, name):
        return getattr(self._registrar, name)


@dataclass
class Paper:
    """A certificate to be signed by anyone, with whatever is to be wrong in it."""

    uri: str | None = None
    usage: x509.ObjectIdentifier = CLIENT
    names: tuple = ("127.0.0.1",)
    starts: float = -1.0  # hours from now
    ends: float = 1.0
    key: object = None

    def signed(self, ca, root=None):
        """Return it as an identity that trusts ``root``, by default whoever signed."""
        signer, issuer = ca
        key, now = self.key or new_key(), datetime.now(UTC)
        hub = hub_of(signer.public_key())
        uri = self.uri or str(Peer(hub, "site", "lyon", key_digest(key.public_key())))
        names = [x509.UniformResourceIdentifier(uri), *(x509.DNSName(name) for name in self.names if name[0].isalpha())]
        names += [x509.IPAddress(ip_address(name)) for name in self.names if name[0].isdigit()]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "paper")]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(hours=self.starts))
            .not_valid_after(now + timedelta(hours=self.ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([self.usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(signer, hashes.SHA256())
        )
        trusted = root or issuer.public_bytes(PEM)
        return Identity(pem_of(key), certificate.public_bytes(PEM), trusted)

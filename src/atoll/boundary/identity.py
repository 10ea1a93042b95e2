"""Who a party is to the other end of TLS: the name in its certificate, its key, and the token a site joins with.

A name is a SPIFFE ID (https://spiffe.io, X509-SVID) and the only URI in the certificate. It ends in the digest of
the certificate's own key, so a membership is one key:

    spiffe://atoll/HUB/hub                 the hub's port
    spiffe://atoll/HUB/relay/NAME/KEY      a relay's port
    spiffe://atoll/HUB/site/NAME/KEY       a member
    spiffe://atoll/HUB/invited/NAME/KEY    the holder of a join token, who may do nothing but enrol
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import StringConstraints

from atoll.errors import Denied, Invalid
from atoll.spec.document import Digest, Document, Name, parse_json, sha256

_PEER = re.compile(
    r"spiffe://atoll/(?P<hub>[0-9a-f]{16})/"
    r"(?:hub|(?P<kind>site|invited|relay)/(?P<name>[a-z0-9][a-z0-9_.-]{0,62})/(?P<key>[0-9a-f]{64}))"
)
# What reading a certificate or a request of another party may raise, at whichever part of it the mistake is.
UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_TOKEN_LIMIT = 8192  # characters; ours have about 1,800
Kind = Literal["hub", "site", "invited", "relay"]
# Both are base64 of something that is parsed in `Ticket.read`, and an address is dialled: none is used as it comes.
Packed = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,2000}$")]
TlsAddress = Annotated[
    str, StringConstraints(pattern=r"^tls://([a-z0-9][a-z0-9_.-]{0,62}@)?[A-Za-z0-9.:\[\]-]{1,253}:[0-9]{1,5}$")
]


@dataclass(frozen=True, slots=True)
class Peer:
    """The name that a certificate of a hub's CA proves."""

    hub: str
    kind: Kind
    name: str = ""
    key: Digest = ""  # of the public key's SPKI, for all but the hub

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"spiffe://atoll/{self.hub}/hub"
        return f"spiffe://atoll/{self.hub}/{self.kind}/{self.name}/{self.key.removeprefix('sha256:')}"

    @staticmethod
    def read(uri: str) -> "Peer":
        """Return the name in ``uri``. Raises `Denied` for one of another form: it admits nobody."""
        found = _PEER.fullmatch(uri)
        if found is None:
            raise Denied(f"certificate: {uri[:100]!r} is no name that a hub gives; join with a token of this hub")
        if found["kind"] is None:
            return Peer(found["hub"], "hub")
        kinds: dict[str, Kind] = {"site": "site", "invited": "invited", "relay": "relay"}
        return Peer(found["hub"], kinds[found["kind"]], found["name"], f"sha256:{found['key']}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A party's private key, its certificate and the CA it trusts, each as PEM."""

    key: bytes = field(repr=False)
    certificate: bytes
    root: bytes

    @property
    def peer(self) -> Peer:
        return peer_of(x509.load_pem_x509_certificate(self.certificate))

    @property
    def starts(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_before_utc

    @property
    def ends(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


class _Packed(Document):
    """What a join token spells in base64url JSON. The key's scalar is the secret in it."""

    address: TlsAddress
    key: Packed
    certificate: Packed
    root: Packed


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a join token says: where the hub is, by which CA to know it, and as whom to enrol there."""

    address: str
    identity: Identity

    @property
    def site(self) -> Name:
        return self.identity.peer.name

    @property
    def invitation(self) -> Digest:
        """The digest by which the hub knows the token; it kept nothing else of it."""
        return self.identity.peer.key

    def token(self) -> str:
        """Return the token as one word to paste."""
        key = private_key(self.identity.key)
        scalar = key.private_numbers().private_value.to_bytes(32, "big")
        packed = _Packed(
            address=self.address,
            key=_pack(scalar),
            certificate=_pack(_der(self.identity.certificate)),
            root=_pack(_der(self.identity.root)),
        )
        return _pack(packed.model_dump_json().encode())

    @staticmethod
    def read(token: str) -> "Ticket":
        """Return what the token says once its parts agree with each other. Raises `Invalid` where they do not."""
        wrong = Invalid("token: this is no join token; paste what `atoll site invite` printed, whole")
        if len(token) > _TOKEN_LIMIT:
            raise wrong
        try:
            packed = parse_json(_Packed, _unpack(token.strip()), "token")
            key = ec.derive_private_key(int.from_bytes(_unpack(packed.key), "big"), ec.SECP256R1())
            certificate = x509.load_der_x509_certificate(_unpack(packed.certificate))
            root = x509.load_der_x509_certificate(_unpack(packed.root))
            check_issued(certificate, root, key.public_key(), "invited")
        except (Invalid, Denied, *UNREADABLE):
            raise wrong from None
        pem = serialization.Encoding.PEM
        return Ticket(packed.address, Identity(pem_of(key), certificate.public_bytes(pem), root.public_bytes(pem)))


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS #8, unencrypted: what holds it must be private itself."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Read a P-256 key; raise ValueError for anything else."""
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not on the curve P-256")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> Digest:
    """Digest of a public key's SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7), in DER."""
    return sha256(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def hub_of(root: ec.EllipticCurvePublicKey) -> str:
    """The name of a hub is the beginning of its CA key's digest, so that no two hubs bear one."""
    return key_digest(root).removeprefix("sha256:")[:16]


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a PKCS #10 request as PEM. It proves the key and asks for nothing: the hub says what its name is."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a site of Atoll")])
    signed = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def peer_of(certificate: x509.Certificate) -> Peer:
    """Return the name in a certificate; whether to believe it is the caller's to check. Raises `Denied`."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        raise Denied("certificate: it bears no name; join with a token of this hub") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return Peer.read(uris[0] if len(uris) == 1 else " ".join(uris))


def check_issued(
    certificate: x509.Certificate, root: x509.Certificate, key: ec.EllipticCurvePublicKey, kind: Kind
) -> Peer:
    """Check that this CA signed the certificate, for this very key and in a name that fits both. Raises `Denied`."""
    try:
        certificate.verify_directly_issued_by(root)
        authority, holder = root.public_key(), certificate.public_key()
    except UNREADABLE:
        raise Denied("certificate: the CA of this hub did not sign it; ask for another invitation") from None
    peer = peer_of(certificate)
    fits = isinstance(authority, ec.EllipticCurvePublicKey) and peer.hub == hub_of(authority)
    if not fits or holder != key or (peer.kind, peer.key) != (kind, key_digest(key)):
        raise Denied("certificate: it is for another party or another key; ask for another invitation")
    return peer


def _pack(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unpack(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Invalid("token: it holds a letter that no token has") from None


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)

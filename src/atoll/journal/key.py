"""The key by which an owner signs its journal: Ed25519, in the text forms of C2SP's signed notes.

A public key is one word, `NAME+ID+KEY`: its name, the four bytes by which a signature names it, and a type with the
key itself in base64 (https://c2sp.org/signed-note). The name is `atoll/OWNER/FINGERPRINT`: no two keys share one.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll import private
from atoll.errors import Corrupt, Invalid, NotFound

LOG, WITNESS = b"\x01", b"\x04"  # types of key: what signs its own journal, and what cosigns another's
_NAME = re.compile(r"atoll/([a-z0-9][a-z0-9_.-]{0,62})/([0-9a-f]{16})")
_LIMIT = 200  # characters of a public key; ours have at most 140


@dataclass(frozen=True, slots=True)
class PublicKey:
    """By whom something is signed: `raw` is the 32 bytes of an Ed25519 key."""

    owner: str
    raw: bytes

    @property
    def name(self) -> str:
        return f"atoll/{self.owner}/{sha256(self.raw).hexdigest()[:16]}"

    def id(self, kind: bytes = LOG) -> bytes:
        """Return the four bytes that begin each of its signatures."""
        return sha256(self.name.encode() + b"\n" + kind + self.raw).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id().hex()}+{base64.b64encode(LOG + self.raw).decode()}"

    def signed(self, text: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, text)
        except InvalidSignature:
            return False
        return True

    @staticmethod
    def read(text: str) -> "PublicKey":
        """Return the key that is spelt so. Raises `Invalid` where its parts do not fit each other."""
        name, _, rest = text[:_LIMIT].partition("+")
        found, key = _NAME.fullmatch(name), decoded(rest.partition("+")[2])
        if found is not None and key is not None and len(key) == 33:
            public = PublicKey(found[1], key[1:])
            if str(public) == text:
                return public
        raise Invalid(f"key: {text[:80]!r} is no key of a journal; it reads atoll/OWNER/FINGERPRINT+ID+KEY")


@dataclass(frozen=True, slots=True)
class Key:
    """An owner's private key. It signs, and is never shown."""

    public: PublicKey
    _private: Ed25519PrivateKey = field(repr=False)

    @staticmethod
    def new(owner: str) -> "Key":
        return Key._of(owner, Ed25519PrivateKey.generate())

    def sign(self, text: bytes) -> bytes:
        """Return the 64 bytes of the signature (RFC 8032)."""
        return self._private.sign(text)

    @staticmethod
    def kept(path: Path, owner: str, make: bool) -> "Key":
        """Return the key in a private file, which is made first where ``make`` allows it and there is none.

        Raises `NotFound`, `Denied` where others can read it, `Corrupt` for a file that holds none, `Unavailable`.
        """
        breach = "others than its owner can sign the journal; run chmod 600 on it and ask who has it"
        data = private.read(path, breach)
        if data is None and make:
            private.create(path, pem(Ed25519PrivateKey.generate()))  # two processes may begin a journal at once
            data = private.read(path, breach)
        if data is None:
            raise NotFound(f"{path}: the key that signs this journal is gone; restore it from a copy")
        key = ed25519(data)
        if key is None:
            raise Corrupt(f"{path}: it holds no Ed25519 key; restore it from a copy")
        return Key._of(owner, key)

    @staticmethod
    def _of(owner: str, private: Ed25519PrivateKey) -> "Key":
        return Key(PublicKey(owner, private.public_key().public_bytes_raw()), private)


def decoded(text: str) -> bytes | None:
    """Return what base64 spells, or None for anything but the one spelling of it."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data).decode() == text else None


def pem(key: Ed25519PrivateKey) -> bytes:
    """Return a private key as a file holds it."""
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def ed25519(data: bytes) -> Ed25519PrivateKey | None:
    """Return the private key that a file holds, None where it holds something else."""
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None

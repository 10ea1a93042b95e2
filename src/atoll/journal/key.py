"""The key by which an owner signs its journal: Ed25519, in the text forms of C2SP's signed notes.

A public key is one word, `NAME+ID+KEY`: its name, the four bytes by which a signature names it, and a type with the
key itself in base64 (https://c2sp.org/signed-note). The name is `atoll/OWNER/FINGERPRINT`: no two keys share one.
"""

import base64
import binascii
import os
import re
import secrets
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Denied, Invalid, NotFound, Unavailable

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
        try:
            if make and not path.exists():
                _write_new(path, Ed25519PrivateKey.generate())
            data, mode = path.read_bytes(), path.stat().st_mode
        except FileNotFoundError:
            raise NotFound(f"{path}: the key that signs this journal is gone; restore it from a copy") from None
        except OSError as error:
            raise Unavailable(f"{path}: cannot be used ({error.strerror}); check the place and its rights") from error
        if mode & 0o077:
            raise Denied(f"{path}: others than its owner can sign the journal; run chmod 600 on it and ask who has it")
        try:
            private = serialization.load_pem_private_key(data, None)
        except ValueError:
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise Corrupt(f"{path}: it holds no Ed25519 key; restore it from a copy")
        return Key._of(owner, private)

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


def _write_new(path: Path, private: Ed25519PrivateKey) -> None:
    """Write the key whole or not at all, and never over another: two processes may begin a journal at once."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    form = serialization.PrivateFormat.PKCS8
    pem = private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:  # another process was first, and its key is the journal's
            return
        sync_folder(path.parent)
    finally:
        fresh.unlink(missing_ok=True)

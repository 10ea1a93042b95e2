"""How a hub proves to a caller that it is the one that the caller has a token of, before any token is sent."""

import hashlib
import hmac

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ISSUER = "atoll/"  # and the name of the key


def proof(token: str, challenge: str) -> str:
    """HMAC-SHA256 of a caller's challenge: a stranger on a reused port cannot make it, so it gets no token sent."""
    return hmac.new(token.encode(), answer(challenge), "sha256").hexdigest()


def answer(challenge: str) -> bytes:
    """Return what a hub signs to answer a challenge; no token begins so."""
    return f"atoll health {challenge}".encode()


def fingerprint(public: bytes) -> str:
    """Return the name of a public key in tokens: 128 bits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:32]


def signed(public: bytes, challenge: str, signature: bytes) -> bool:
    """Tell whether who holds the private key of ``public`` answered this challenge."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, answer(challenge))
    except (InvalidSignature, ValueError):
        return False
    return True


def signer(token: str) -> str:
    """Return the name of the key by which a hub made a token, as the token says; "" for one that no hub made."""
    try:
        issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except jwt.PyJWTError:
        return ""
    return issuer.removeprefix(ISSUER) if isinstance(issuer, str) and issuer.startswith(ISSUER) else ""

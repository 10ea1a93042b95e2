"""Shamir's secret sharing: some of the shares give a secret back, and fewer tell nothing of it.

Shamir, "How to share a secret", Communications of the ACM 22 (1979), over the integers modulo 2^521 - 1.
"""

import secrets
from collections.abc import Mapping, Sequence

from atoll.errors import Corrupt, Invalid

_PRIME = 2**521 - 1
BYTES = 66  # of a share
_SECRET = 32  # bytes


def split(secret: bytes, threshold: int, places: Sequence[int]) -> dict[int, bytes]:
    """Return a share of a secret of 32 bytes for each place, a number from 1 on; ``threshold`` of them give it back."""
    if len(secret) != _SECRET or not 1 <= threshold <= len(places) or min(places) < 1:
        raise Invalid(f"shares: {threshold} of {len(places)} cannot give back {len(secret)} bytes; use 32 of fewer")
    curve = [int.from_bytes(secret, "big"), *(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]
    return {place: _at(curve, place).to_bytes(BYTES, "big") for place in places}


def joined(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that shares by place are of. Raises `Corrupt` when they are too few, or of no secret."""
    used = sorted(shares.items())[:threshold]
    if len(used) < threshold:
        raise Corrupt(f"shares: {len(used)} are there, and {threshold} give a secret back; wait for more sites")
    secret = 0
    for place, share in used:
        above, below = 1, 1
        for other, _ in used:
            if other != place:
                above, below = above * other % _PRIME, below * (other - place) % _PRIME
        secret = (secret + int.from_bytes(share, "big") * above * pow(below, -1, _PRIME)) % _PRIME
    if secret >> (8 * _SECRET):
        raise Corrupt("shares: they are not of one secret; a site has sent another's")
    return secret.to_bytes(_SECRET, "big")


def _at(curve: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(curve):
        value = (value * place + coefficient) % _PRIME
    return value

"""Random numbers that nobody can predict: for noise that hides whose data is behind a number, and for secret samples.

They are of the keystream of ChaCha20 (RFC 8439), read as little-endian words: any place of it is found by its counter.
"""

import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

BLOCK = 16  # words, which the counter counts
LONGEST = BLOCK << 32  # words of a key
PIECE = 1 << 16  # words that are made at once, so that they stay in cache
BEYOND = 8.0  # standard deviations, which a number is beyond once in 10^15

_NONCE = bytes(12)
_ZEROS = memoryview(bytes(4 * PIECE))
_DRAWN = 4  # normal numbers behind each one
_DRAWN_AT_ONCE = 1 << 15
_TWO = 2  # words behind a uniform number

Words = npt.NDArray[np.uint32]


def keystream(key: bytes, offset: int, count: int, room: bytearray) -> Words:
    """Return ``count`` words of a key's stream, `PIECE` at most, from word ``offset`` on, a multiple of `BLOCK`.

    They lie in ``room``, which has place for a block more than that: `update_into` wants it.
    """
    counter = (offset // BLOCK).to_bytes(4, "little")
    Cipher(algorithms.ChaCha20(key, counter + _NONCE), None).encryptor().update_into(_ZEROS[: 4 * count], room)
    return np.frombuffer(room, np.dtype("<u4"), count)


class Chance:
    """Uniform numbers of a key that is drawn anew and kept nowhere: nobody else has them, and none comes twice."""

    def __init__(self) -> None:
        self._key, self._at = os.urandom(32), 0

    def take(self, count: int) -> npt.NDArray[np.float64]:
        """Return the next so many numbers, multiples of 2^-53 from 0 up to 1 and without it. Memory: O(count)."""
        made, whole = np.empty(count), -(-PIECE // _TWO)
        for first in range(0, count, whole):
            piece = made[first : first + whole]
            words = _TWO * piece.size + -(_TWO * piece.size) % BLOCK
            if self._at + words > LONGEST:
                self._key, self._at = os.urandom(32), 0
            bits = keystream(self._key, self._at, words, bytearray(4 * (words + BLOCK)))[: _TWO * piece.size]
            self._at += words
            np.multiply(bits.view(np.uint64) >> np.uint64(11), 2.0**-53, out=piece)
        return made


class Noise:
    """Numbers from N(0, deviation^2), of a key that is drawn anew and kept nowhere.

    Uniform numbers of 53 bits, by Box and Muller (1958). Of a single such number the last bits tell what it was added
    to (Mironov, 2012); each of ours is the sum of four, halved, of which they do not (Holohan and Braghin, "Secure
    random sampling in differential privacy", 2021).
    """

    def __init__(self, deviation: float) -> None:
        self._deviation, self._chance = deviation, Chance()

    def take(self, count: int) -> npt.NDArray[np.float64]:
        """Return the next so many numbers. Memory: O(count)."""
        made = np.empty(count)
        for first in range(0, count, _DRAWN_AT_ONCE):
            piece = made[first : first + _DRAWN_AT_ONCE]
            np.copyto(piece, self._normal(_DRAWN * piece.size).reshape(_DRAWN, -1).sum(0))
        made *= self._deviation / math.sqrt(_DRAWN)
        return made

    def _normal(self, count: int) -> npt.NDArray[np.float64]:
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(1.0 - self._chance.take(half)))  # of (0, 1]: its logarithm is finite
        angle = self._chance.take(half) * (2 * np.pi)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

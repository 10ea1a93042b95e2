"""Masks: words that look random to whoever lacks the key, and that are added to an update and taken off its sum.

A mask is the keystream of ChaCha20 (RFC 8439) read as little-endian words; any place of it is found by its counter, so
that a vector is masked a window at a time and in any order. A key is of one mask only.
"""

from collections.abc import Sequence

import numpy as np

from atoll.errors import Invalid
from atoll.noise import BLOCK, LONGEST, PIECE, keystream
from atoll.outer.ring import Words


class Masks:
    """Masks that are added to a vector, and others that are taken off it."""

    def __init__(self, added: Sequence[bytes], taken: Sequence[bytes] = ()) -> None:
        """Keys are of 32 bytes."""
        self._added, self._taken = list(added), list(taken)

    def apply(self, offset: int, window: Words) -> None:
        """Mask a window in place that begins at word ``offset`` of the vector, a multiple of 16. Any thread may."""
        if offset < 0 or offset % BLOCK or offset + window.size > LONGEST:
            raise Invalid(f"offset: {offset} is none of a masked vector's; use multiples of {BLOCK} below 2^36")
        room = bytearray(4 * (min(window.size, PIECE) + BLOCK))
        for first in range(0, window.size, PIECE):
            piece = window[first : first + PIECE]
            for key in self._added:
                np.add(piece, keystream(key, offset + first, piece.size, room), out=piece)
            for key in self._taken:
                np.subtract(piece, keystream(key, offset + first, piece.size, room), out=piece)

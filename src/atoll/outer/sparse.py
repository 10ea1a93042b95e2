"""Top-k: the elements of a chunk that are largest in magnitude, and where they lay (Aji & Heafield, 2017).

Places are written as one bit an element, or as gaps in LEB128 (DWARF 5, section 7.6), whichever is shorter: at a share
of 0.01 a gap takes about 10 bits. A reader tells the two forms apart by their length.
"""

import math

import numpy as np

from atoll.errors import Invalid
from atoll.outer.formats import Bytes

_SAMPLE = 64  # one element of so many is looked at to guess a bound that about twice the wanted number pass
_MARGIN = 16  # and this many more, for chunks so small that a sample says little
_GAP_BYTES = 3  # the longest gap: 21 bits hold every gap of a chunk


def kept(share: float, length: int) -> int:
    """Return how many of `length` elements are sent: the share, rounded up, and at least one."""
    return max(1, math.ceil(share * length - 1e-9))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the ascending places (int64) of the `count` largest magnitudes; of equal ones, those that come first.

    What is not among them is at most as large as the smallest of them.
    """
    sizes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)  # bits of finite floats are ordered as their magnitudes
    places = np.flatnonzero(sizes >= _guess(sizes, count))
    if places.size < count:
        places = np.arange(values.size)
    found = sizes[places]
    bound = np.partition(found, found.size - count)[found.size - count]
    chosen = found > bound
    ties = np.flatnonzero(found == bound)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return places[chosen]


def _guess(sizes: np.ndarray, count: int) -> int:
    """Return a bound that more than `count` elements most likely reach; a wrong guess costs time and nothing else."""
    sample = sizes[::_SAMPLE]
    place = sample.size - 2 * (count // _SAMPLE) - _MARGIN
    return int(np.partition(sample, place)[place]) if place > 0 else 0


def pack(places: np.ndarray, length: int) -> np.ndarray:
    """Write ascending `places` below `length` as bytes."""
    gaps = np.diff(places, prepend=-1) - 1
    sizes = 1 + (gaps >= 1 << 7) + (gaps >= 1 << 14)
    ends = np.cumsum(sizes)
    if ends[-1] >= bit_bytes(length):
        mask = np.zeros(length, bool)
        mask[places] = True
        return np.packbits(mask, bitorder="little")
    packed = np.empty(ends[-1], np.uint8)
    for byte in range(_GAP_BYTES):  # least significant first; the high bit says that more follow
        long = sizes > byte
        more = (sizes[long] > byte + 1) * np.uint8(0x80)
        packed[(ends - sizes + byte)[long]] = (gaps[long] >> 7 * byte & 0x7F) | more
    return packed


def unpack(data: Bytes, count: int, length: int) -> np.ndarray:
    """Read back the `count` ascending places that `pack` wrote. Raises `Invalid` for what it cannot have written."""
    packed = np.frombuffer(data, np.uint8)
    places = _from_bits(packed, length) if packed.size == bit_bytes(length) else _from_gaps(packed)
    if places.size != count or (count and places[-1] >= length):
        raise Invalid(f"data: the places are not {count} below {length}; encode it again")
    return places


def bit_bytes(length: int) -> int:
    """Return the most bytes that places below `length` take."""
    return -(-length // 8)


def _from_bits(packed: np.ndarray, length: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(packed, bitorder="little"))  # a bit past the end is a place past the end


def _from_gaps(packed: np.ndarray) -> np.ndarray:
    last = np.flatnonzero(packed < 0x80)
    if not last.size or last[-1] != packed.size - 1:
        raise Invalid("data: the places break off; send the chunk whole")
    sizes = np.diff(last, prepend=-1)
    if int(sizes.max()) > _GAP_BYTES or (packed[last[sizes > 1]] == 0).any():
        raise Invalid("data: a gap between places is written too long; encode it again")
    gaps = np.zeros(last.size, np.int64)
    for byte in range(_GAP_BYTES):
        long = sizes > byte
        gaps[long] |= (packed[(last - sizes + 1 + byte)[long]].astype(np.int64) & 0x7F) << 7 * byte
    return np.cumsum(gaps + 1) - 1

"""Zstandard (RFC 8878) for the bytes of one chunk, with the length that the receiver can check before it unpacks."""

import struct

import numpy as np
import pyarrow as pa

from atoll.errors import Invalid
from atoll.outer.formats import Bytes

LEVEL = 1  # on deltas the higher levels take longer and save nothing more (decision 011)

_LENGTH = struct.Struct("<I")


def pack(data: np.ndarray, level: int) -> bytes:
    """Return the length of `data` (uint8), then its zstd frame; bytes that cannot be compressed grow by a few."""
    return _LENGTH.pack(data.size) + pa.Codec("zstd", level).compress(data, asbytes=True)


def unpack(data: Bytes, least: int, most: int) -> memoryview:
    """Return the bytes that `pack` took, `least` to `most` of them by the receiver's own count.

    No more is ever allocated, whatever the frame says of itself. Raises `Invalid` for anything else.
    """
    view = memoryview(data)
    length = _LENGTH.unpack_from(view)[0] if len(view) >= _LENGTH.size else -1
    if not least <= length <= most:
        raise Invalid(f"data: says it unpacks to {length} bytes where {least} to {most} are due; encode it again")
    try:
        return memoryview(pa.decompress(pa.py_buffer(view[_LENGTH.size :]), length, codec="zstd"))
    except (OSError, pa.ArrowException):
        raise Invalid(f"data: is no zstd frame of {length} bytes; encode it again") from None


def most_bytes(length: int) -> int:
    """Return the most bytes that `pack` gives for `length` (ZSTD_compressBound and our length)."""
    return length + (length >> 8) + 64 + _LENGTH.size


def grouped(data: np.ndarray, width: int) -> np.ndarray:
    """Return bytes of elements of `width` with all first bytes together, then all second ones: exponents are alike."""
    return np.ascontiguousarray(data.reshape(-1, width).T).ravel() if width > 1 else data


def ungrouped(data: np.ndarray, width: int) -> np.ndarray:
    """Undo `grouped`."""
    return np.ascontiguousarray(data.reshape(width, -1).T).ravel() if width > 1 else data

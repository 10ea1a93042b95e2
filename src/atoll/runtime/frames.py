"""A file of frames: an encoded update out or in, each frame with the header (offset, length, data, scales, mark).

It may be written over another one, so what lies behind its last frame may be anything. A frame is written with `BLANK`
behind it, and its header after it: whoever is killed between leaves the blank, or a header without its mark.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from atoll.boundary.channel import Bytes, Frame, FrameLike
from atoll.outer.wire import CHUNK, encoded_bytes
from atoll.spec.wire import Transform

_HEADER = struct.Struct("<qqqq8s")  # element that a frame begins at, elements in it, bytes of its data and its scales
_MARK = b"atollbit"  # no zero in it: of a header that is half written it is never there
BLANK = bytes(_HEADER.size)  # where a header will be


def pieces(frame: FrameLike) -> tuple[Bytes, Bytes, Bytes]:
    """Return what a frame is in the file, in order; data and scales are those of the frame and not copied."""
    sizes = len(frame.data), len(frame.scales)
    return _HEADER.pack(frame.offset, frame.length, *sizes, _MARK), frame.data, frame.scales


def frames(path: Path, at: int = 0) -> Iterator[Frame]:
    """Yield the frames from element ``at`` on, one at a time; those before it are stepped over unread."""
    with path.open("rb") as file:
        yield from frames_in(file, at)


def frames_in(file: BinaryIO, at: int = 0) -> Iterator[Frame]:
    """Yield the frames of an open file as `frames` does; from one that still grows, as many as are whole by now."""
    while header := file.read(_HEADER.size):
        offset, length, data, scales, _ = _HEADER.unpack(header)
        if offset < at:
            file.seek(data + scales, 1)
        else:
            yield Frame(offset, length, file.read(data), file.read(scales))


class Place(NamedTuple):
    """Where a frame lies in its file."""

    at: int  # the byte that its data begins at; the scales follow, and then the next frame
    data: int  # bytes
    scales: int

    @property
    def end(self) -> int:
        return self.at + self.data + self.scales


def place_after(end: int, frame: FrameLike) -> Place:
    """Return where a frame lies that is written at byte ``end``."""
    return Place(end + _HEADER.size, len(frame.data), len(frame.scales))


def places(descriptor: int, size: int, wire: tuple[Transform, ...]) -> Iterator[Place]:
    """Yield where the frames of an encoded vector of ``size`` elements lie, window by window, by their headers.

    It ends before the first that is not whole, or not the one that is due: what follows is no part of the vector.
    """
    there, end, due = os.fstat(descriptor).st_size, 0, 0
    while due < size and len(header := os.pread(descriptor, _HEADER.size, end)) == _HEADER.size:
        offset, length, data, scales, mark = _HEADER.unpack(header)
        found = Place(end + _HEADER.size, data, scales)
        bounded = data >= 0 and scales >= 0 and data + scales <= encoded_bytes(min(CHUNK, size - due), wire)
        if (offset, length, mark) != (due, min(CHUNK, size - due), _MARK) or not bounded or found.end > there:
            return
        yield found
        end, due = found.end, due + length


def file_bytes(size: int, wire: tuple[Transform, ...]) -> int:
    """Return the most bytes that the file of an encoded vector of ``size`` elements takes."""
    return encoded_bytes(size, wire) + -(-size // CHUNK) * _HEADER.size


def payload_bytes(path: Path, count: int) -> int:
    """Return the bytes of data and scales in a file of ``count`` frames: what of it travels."""
    return path.stat().st_size - count * _HEADER.size

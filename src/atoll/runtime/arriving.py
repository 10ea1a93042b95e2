"""An update on its way in: a file that grows by whole, checked frames, and goes on where a broken stream left it."""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from atoll.boundary.channel import Bytes, FrameLike
from atoll.errors import Invalid, LinkLost
from atoll.outer.wire import CHUNK, Chunk, decode
from atoll.runtime.frames import BLANK, Place, file_bytes, pieces, place_after, places
from atoll.spec.wire import Transform

_PIECE = 1 << 20  # bytes


class Arriving:
    """One file. One stream writes it at a time: who takes over goes on behind the last frame, and who had it stops.

    It may begin as a spare file, whose frames are another update's: nothing is ever looked for behind a blank.

    What an earlier process left is looked through by the frames' headers, cut behind the last whole one and hashed
    again. That is sound for what a killed process wrote, and not after a loss of power (see `atoll.runtime.spool`).
    """

    def __init__(self, path: Path, site: str, wire: tuple[Transform, ...], size: int, over: Path | None = None) -> None:
        """``over`` is a spare file to become this one, in whose place there is none yet."""
        self.filled = 0  # elements; the next frame begins there
        self.places: list[Place] = []
        self._path, self._site, self._wire, self._size, self._spare = path, site, wire, size, over
        self._taken = 0  # bytes of disk that the file had when it was opened
        self._hasher = hashlib.sha256()
        self._turn = threading.Lock()  # held for each write, so a stream that was replaced is never within one
        self._writer: object | None = None
        self._descriptor: int | None = None
        self._over = False

    def take_over(self) -> object:
        """Return what only the caller can write with from now on. Raises `LinkLost` for what is whole or removed."""
        with self._turn:
            if self._over:
                raise self._replaced()
            if self._descriptor is None:
                self._descriptor = self._opened()
                self._taken = os.fstat(self._descriptor).st_size
            self._writer = object()
            return self._writer

    def add(self, writer: object, frame: FrameLike) -> None:
        """Append a frame, checked: place, lengths, finite values. Raises `Invalid`; `LinkLost` for a former writer."""
        decode(Chunk(frame.offset, frame.length, frame.data, frame.scales), self._wire, self._size)
        with self._turn:
            descriptor = self._of(writer)
            if frame.offset != self.filled:
                raise Invalid(f"update of {self._site}: frame at {frame.offset} where {self.filled} was due")
            place, parts = place_after(self._end, frame), pieces(frame)
            last = self.filled + frame.length == self._size
            _write(descriptor, place.at, (*parts[1:], b"" if last else BLANK))
            _write(descriptor, self._end, parts[:1])  # now it is there
            for part in parts:
                self._hasher.update(part)
            self.places.append(place)
            self.filled += frame.length

    def appear(self, writer: object, path: Path) -> str:
        """Give the whole update its name, and return its digest. Raises `Invalid` where it is not whole.

        It is not flushed to the disk. What a killed process wrote is there all the same; after a loss of power the
        digest, which is journalled, tells what is not, and the site is asked again: it keeps its update until a later
        round shows that the hub has merged it.
        """
        with self._turn:
            descriptor = self._of(writer)
            if self.filled != self._size:
                raise Invalid(
                    f"update of {self._site}: ended after {self.filled} of {self._size} elements; send it whole"
                )
            if os.fstat(descriptor).st_size != self._end:
                os.ftruncate(descriptor, self._end)  # what a larger spare held behind this
            os.replace(self._path, path)
            self._close(over=True)
            return "sha256:" + self._hasher.hexdigest()

    def leave(self, writer: object | None) -> None:
        """Close the file, for another to take it over, unless that has happened. None has never written it."""
        with self._turn:
            if writer is not None and self._writer is writer:
                self._close()

    def retire(self) -> None:
        """Remove the file; who is writing it stops."""
        with self._turn:
            if not self._over:
                self._close(over=True)
                self._path.unlink(missing_ok=True)
                if self._spare is not None:
                    self._spare.unlink(missing_ok=True)

    def written_by(self, writer: object) -> bool:
        return self._writer is writer

    @property
    def count(self) -> int:
        """Bytes of data and scales."""
        return sum(place.data + place.scales for place in self.places)

    @property
    def due(self) -> int:
        """Bytes of disk that the stream under way, if there is one, may still take."""
        there = max(self._taken, self._end)
        return max(0, file_bytes(self._size, self._wire) - there) if self._writer is not None else 0

    @property
    def _end(self) -> int:
        return self.places[-1].end if self.places else 0

    def _of(self, writer: object) -> int:
        if self._writer is not writer or self._descriptor is None:
            raise self._replaced()
        return self._descriptor

    def _replaced(self) -> LinkLost:
        return LinkLost(f"update of {self._site}: is not taken from this stream any more; it is asked for again")

    def _opened(self) -> int:
        if self._spare is not None:
            with self._spare.open("r+b", buffering=0) as file:
                file.write(BLANK)  # before it has the name under which it is looked through
            os.replace(self._spare, self._path)
            self._spare = None
            return os.open(self._path, os.O_RDWR)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if not self.places:
            self._look_through(descriptor)
        return descriptor

    def _look_through(self, descriptor: int) -> None:
        found = list(places(descriptor, self._size, self._wire))
        end = found[-1].end if found else 0
        os.ftruncate(descriptor, end)  # what is torn must never be taken for a frame
        for at in range(0, end, _PIECE):
            self._hasher.update(os.pread(descriptor, min(_PIECE, end - at), at))
        self.places = found
        self.filled = min(len(found) * CHUNK, self._size)

    def _close(self, over: bool = False) -> None:
        self._writer, self._over = None, self._over or over
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write(descriptor: int, at: int, parts: Sequence[Bytes]) -> None:
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        written = os.pwritev(descriptor, left, at)  # a disk that fills up takes a part, and tells why at the next try
        at += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]

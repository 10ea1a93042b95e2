"""A rank's own part of a round's state, in memory that outlives the rank: whoever takes its place goes on from there.

The memory is two anonymous files that the executor holds and hands to each process of that place. They are written by
turns, so that one is whole whenever the process is killed: its first number, without which it is none, is written last.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atoll.errors import Corrupt
from atoll.inner.parts import Part, Parts, about_of, packed, unpacked

MIRRORS = 2  # files of a place
_LENGTH = 8  # bytes, which a file that is being written has as zeros
_PIECES = 512  # buffers in one write; the kernel takes 1024 at most


class Mirror:
    """One place's; ``files`` are numbers of two files that are read and written by position."""

    def __init__(self, files: Sequence[int]) -> None:
        self.lasting = bool(files)  # whether they outlive this process
        self._files = list(files)
        self._next = 0
        # Seconds of the last writing, None before the first; when it ended.
        self._spent: float | None = None
        self._since = time.monotonic()

    def due(self, share: float) -> bool:
        """Tell whether enough time has gone by since the last writing for another one to take this share of it."""
        return self.lasting and time.monotonic() - self._since >= (self._spent or 0.0) / share

    def write(self, about: Mapping[str, Any], parts: Parts) -> int:
        """Keep parts, and JSON values that go with them; return the number of the file that has them.

        Raises `OSError`.
        """
        if not self._files:  # memory of this process alone, from which a disk is written
            self._files = [_anonymous(), _anonymous()]
        file, self._next = self._files[self._next], 1 - self._next
        os.pwrite(file, bytes(_LENGTH), 0)
        told, *pieces = packed(about, parts)
        pieces.insert(0, told[_LENGTH:])
        at = _LENGTH
        for first in range(0, len(pieces), _PIECES):
            at = _written(file, pieces[first : first + _PIECES], at)
        os.ftruncate(file, at)
        os.pwrite(file, told[:_LENGTH], 0)
        return file

    def took(self, seconds: float) -> None:
        """Hear how long it took, all in all, to keep what was just written.

        The first time, in which the memory is taken, says little of the others.
        """
        self._since, self._spent = time.monotonic(), seconds if self._spent is not None else 0.0

    def about(self) -> Iterator[dict[str, Any]]:
        """Yield what goes with the parts that are kept, of each file that is whole."""
        return (said for _, said in self._whole())

    def read(self, about: Mapping[str, Any]) -> dict[str, Part]:
        """Return the parts that such values go with, as they lie in the file: what is written next is written there.

        Raises `Corrupt` when there are none.
        """
        for file, said in self._whole():
            if said == about:
                return unpacked(memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY)), "mirror")[0]
        raise Corrupt(f"mirror: nothing is kept of step {about.get('step')}; the round begins anew")

    def _whole(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for file in self._files:
            size = int.from_bytes(os.pread(file, _LENGTH, 0), "little")
            with contextlib.suppress(Corrupt):
                if size:
                    yield file, about_of(os.pread(file, size, _LENGTH), "mirror")


def _anonymous() -> int:
    """Return the number of a file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("atoll-mirror")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _written(file: int, pieces: list[memoryview], at: int) -> int:
    while pieces:
        done = os.pwritev(file, pieces, at)
        at += done
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]
    return at

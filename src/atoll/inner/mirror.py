"""A rank's own part of a round's state, in memory that outlives the rank: whoever takes its place goes on from there.

The memory is two anonymous files that the executor holds and hands to each process of that place. They are written by
turns, so that one is whole whenever the process is killed: its first number, without which it is none, is written last.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll.errors import Corrupt
from atoll.inner.parts import Part, Parts, about_of, packed, unpacked

MIRRORS = 2  # files of a place
_LENGTH = 8  # bytes, which a file that is being written has as zeros
_AT_ONCE = getattr(mmap, "MAP_POPULATE", 0)  # its pages are there with it, and not one by one as they are touched


class Mirror:
    """One place's; ``files`` are numbers of two files that are read and written by position."""

    def __init__(self, files: Sequence[int]) -> None:
        self.lasting = bool(files)  # whether they outlive this process
        self._files = list(files)
        self._mapped: dict[int, npt.NDArray[np.uint8]] = {}
        self._next = 0
        # Seconds of the last writing, None before the first; when it ended, None while it lasts.
        self._spent: float | None = None
        self._since: float | None = time.monotonic()

    def due(self, share: float) -> bool:
        """Tell whether enough time has gone by since the last writing for another one to take this share of it."""
        since = self._since
        return self.lasting and since is not None and time.monotonic() - since >= (self._spent or 0.0) / share

    def write(self, about: Mapping[str, Any], parts: Parts, same: Callable[[], bool] = lambda: True) -> int | None:
        """Keep parts, and JSON values that go with them; return the number of the file that has them.

        None where they are no longer the ``same`` once they are copied: then none of them is kept. Raises `OSError`.
        """
        if not self._files:  # memory of this process alone, from which a disk is written
            self._files = [_anonymous(), _anonymous()]
        file, self._next = self._files[self._next], 1 - self._next
        pieces = [np.frombuffer(piece, np.uint8) for piece in packed(about, parts)]
        memory = self._memory(file, sum(piece.size for piece in pieces))
        memory[:_LENGTH] = 0
        at = 0
        for piece in pieces:
            skipped = 0 if at else _LENGTH
            memory[at + skipped : at + piece.size] = piece[skipped:]  # others have Python's lock meanwhile
            at += piece.size
        if not same():
            return None
        memory[:_LENGTH] = pieces[0][:_LENGTH]
        return file

    def _memory(self, file: int, size: int) -> npt.NDArray[np.uint8]:
        """Return a file's own bytes, so many as there are to be. Raises `OSError` where there is no room for them."""
        memory = self._mapped.pop(file, None)
        if memory is None or memory.size != size:
            os.pwrite(file, bytes(_LENGTH), 0)
            os.ftruncate(file, size)
            if hasattr(os, "posix_fallocate"):  # else a lack of room would end the process, at the first touch
                os.posix_fallocate(file, 0, size)
            memory = np.frombuffer(mmap.mmap(file, size, flags=mmap.MAP_SHARED | _AT_ONCE), np.uint8)
        self._mapped[file] = memory
        return memory

    def begun(self) -> None:
        """Hear that something is to be kept, of which `took` tells when it is: until then no other is due."""
        self._since = None

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

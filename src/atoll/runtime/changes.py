"""A run's newest weights as a change to those before, for sites that have these: encoded chunks in a file, in order.

It is a cache: known only to the process that wrote it, verified by whoever fetches it, and what is not here is given
whole. So nothing of it is flushed, and a hub that begins anew drops what is left of it.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from atoll.boundary.channel import Frame
from atoll.outer.wire import Chunk

PATTERN = "*.change"


@dataclass(slots=True)
class _Written:
    """A file of chunks, and where one ends and the next begins."""

    path: Path
    file: BinaryIO
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    versions: tuple[str, str] | None = None  # digests of the weights before and after, once it is whole

    def add(self, chunk: Chunk) -> None:
        self.file.write(chunk.data)
        self.file.write(chunk.scales)
        self.chunks.append((chunk.offset, chunk.length, len(chunk.data), len(chunk.scales)))


@dataclass(frozen=True, slots=True)
class Change:
    """One to give out; also when another has taken its place by then."""

    size: int  # elements that it is of
    bytes: int  # of data and scales
    frames: Iterator[Frame]


class Changes:
    """One run's: the newest one, and one that is being written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._turn = threading.Lock()
        self._newest: _Written | None = None

    @contextmanager
    def writing(self) -> Iterator[_Written]:
        """Open the file of the next one, for `keep` to take while it is open. Else nothing is left of it."""
        path = self._folder / f"{next(self._numbers)}.change"
        with path.open("wb") as file:
            made = _Written(path, file)
            try:
                yield made
            finally:
                if made.versions is None:
                    path.unlink(missing_ok=True)

    def keep(self, made: _Written, base: str, digest: str) -> None:
        """Give this one out from now on, in place of the one before."""
        made.file.flush()
        made.versions = base, digest
        with self._turn:
            before, self._newest = self._newest, made
            if before is not None:
                before.path.unlink(missing_ok=True)  # who is reading it has it open

    def find(self, base: str, digest: str) -> Change | None:
        """Return the change from weights of one digest to those of another, where it is here."""
        with self._turn:
            newest = self._newest
            if newest is None or newest.versions != (base, digest):
                return None
            try:
                file = newest.path.open("rb")
            except FileNotFoundError:
                return None
        frames = _frames(file, newest.chunks)
        next(frames)  # begun here, so that it closes the file also for who drops it unread
        size = sum(length for _, length, _, _ in newest.chunks)
        return Change(size, sum(data + scales for *_, data, scales in newest.chunks), frames)


def _frames(file: BinaryIO, chunks: list[tuple[int, int, int, int]]) -> Iterator[Frame]:
    with file:
        yield Frame(0, 0, b"")
        for offset, length, data, scales in chunks:
            yield Frame(offset, length, file.read(data), file.read(scales))

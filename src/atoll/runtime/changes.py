"""A run's newest weights as a change to those before, for sites that have these: encoded chunks in a file, in order.

It is a cache: known only to the process that wrote it, verified by whoever fetches it, and what is not here is given
whole. So nothing of it is flushed, a hub that begins anew drops what is left of it, and a full disk costs no merge.
"""

import io
import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from atoll.boundary.channel import Bytes, Frame
from atoll.outer.wire import Chunk

PATTERN = "*.change"
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Written:
    """A file of chunks, and where one ends and the next begins. Without a file there was no room for it."""

    path: Path
    file: io.FileIO | None = None
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    versions: tuple[str, str] | None = None  # digests of the weights before and after, once it is whole

    def open(self) -> None:
        try:
            self.file = self.path.open("wb", buffering=0)
        except OSError as error:
            self._failed(error)

    def add(self, chunk: Chunk) -> None:
        if self.file is None:
            return
        try:
            for part in (chunk.data, chunk.scales):
                _write(self.file, part)
        except OSError as error:
            self._failed(error)
        self.chunks.append((chunk.offset, chunk.length, len(chunk.data), len(chunk.scales)))

    def close(self) -> None:
        """Let go of the file, and of what is in it unless it is kept."""
        if self.file is not None:
            self.file.close()
            self.file = None
            if self.versions is None:
                self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> None:
        log.warning("%s: cannot be written (%s); sites fetch these weights whole", self.path, error.strerror)
        self.close()


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
        made = _Written(self._folder / f"{next(self._numbers)}.change")
        made.open()
        try:
            yield made
        finally:
            made.close()

    def keep(self, made: _Written, base: str, digest: str) -> None:
        """Give this one out from now on, in place of the one before; none where there was no room for it."""
        if made.file is not None:
            made.versions = base, digest
        with self._turn:
            before, self._newest = self._newest, made if made.versions is not None else None
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
            except OSError as error:
                log.warning("%s: cannot be read (%s); the weights are given whole", newest.path, error.strerror)
                return None
        frames = _frames(file, newest.chunks)
        next(frames)  # begun here, so that it closes the file also for who drops it unread
        size = sum(length for _, length, _, _ in newest.chunks)
        return Change(size, sum(data + scales for *_, data, scales in newest.chunks), frames)


def _write(file: io.FileIO, data: Bytes) -> None:
    left = memoryview(data)
    while left:  # a disk that fills up takes a part, and tells why at the next try
        left = left[file.write(left) :]


def _frames(file: io.BufferedReader, chunks: list[tuple[int, int, int, int]]) -> Iterator[Frame]:
    with file:
        yield Frame(0, 0, b"")
        for offset, length, data, scales in chunks:
            yield Frame(offset, length, file.read(data), file.read(scales))

"""A stream on its way to a relay's disk, which any number of sites may read while it comes."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from atoll.boundary.channel import FrameLike
from atoll.errors import AtollError, Corrupt, LinkLost
from atoll.registry.weights import head
from atoll.runtime.frames import frames_in, pieces
from atoll.spec.message import Parcel
from atoll.spec.model import Signature

_STALL = 20.0  # seconds in which it must move; who reads it waits 30 for the next frame
log = logging.getLogger(__name__)


class Following:
    """One stream's file. What is lost on the way, or is not what its digest says, ends as a lost link for all who read
    it: they ask again, and it is fetched anew."""

    def __init__(self, path: Path, header: Parcel, frames: Iterator[FrameLike], signature: Signature) -> None:
        """Begin to take ``frames``, in a thread that ends with them. Raises `OSError` for a disk without room."""
        self._path, self._header, self._signature = path, header, signature
        self._news = threading.Condition()
        self._there, self._ended = 0, False  # bytes that are whole frames; no more will come
        self.lost = ""  # why it never will be whole
        file = path.open("wb")
        threading.Thread(target=self._take, args=(file, frames), daemon=True, name=f"shelf-{header.run}").start()

    def drop(self) -> None:
        """Forget the file. Who is being given it has it open."""
        self._path.unlink(missing_ok=True)

    def frames(self) -> Iterator[FrameLike]:
        """Yield the frames from the first on, each once it is here. Raises `LinkLost`."""
        try:
            with self._path.open("rb") as file:
                there = frames_in(file)
                while self._comes(file.tell()):
                    yield next(there)
        except (OSError, StopIteration):
            raise LinkLost(self.lost or f"{self._header.purpose}: not kept at the relay any more; try again") from None

    def _comes(self, at: int) -> bool:
        """Wait for a frame at this byte; False where the stream ended before it."""
        with self._news:
            if not self._news.wait_for(lambda: self._ended or self._there > at, _STALL):
                raise LinkLost(f"{self._header.purpose}: the relay's own link has stalled; try again")
            if self.lost:
                raise LinkLost(self.lost)
            return self._there > at

    def _take(self, file: BinaryIO, frames: Iterator[FrameLike]) -> None:
        lost = "the relay cannot keep it now; try again"
        try:
            with file:
                for frame in self._verified(frames):
                    for piece in pieces(frame):
                        file.write(piece)
                    file.flush()
                    self._tell(file.tell())
            lost = ""
        except (AtollError, OSError) as error:
            log.error("%s of run %s: %s; it is fetched again", self._header.purpose, self._header.run, error)
            lost = str(error) if isinstance(error, AtollError) else lost
        finally:  # also after a fault of ours: nobody must wait for what does not come
            self._tell(None, lost)
            if lost:
                self.drop()

    def _tell(self, there: int | None, lost: str = "") -> None:
        with self._news:
            self._there, self._ended, self.lost = there or self._there, there is None, lost
            self._news.notify_all()

    def _verified(self, frames: Iterator[FrameLike]) -> Iterator[FrameLike]:
        """Yield the frames; raise `Corrupt` at their end when they are not the digest's. A change to other weights can
        be verified only by who has those: the site does, and fetches the whole of them where it fails."""
        header = self._header
        hasher = hashlib.sha256(head(self._signature) if header.purpose == "weights" else b"")
        for frame in frames:
            hasher.update(frame.data)
            yield frame
        if header.base is None and "sha256:" + hasher.hexdigest() != header.digest:
            raise Corrupt(f"{header.purpose} {str(header.digest)[:19]}...: what came to the relay is not it; try again")

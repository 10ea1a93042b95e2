"""Updates as they arrive at the hub: on disk, whole or not there, so that one that dies half way leaves no trace.

A round's update is one file of frames, each with the header (offset, length, bytes of data, bytes of scales). Frames
are decoded once on arrival to check them, and again, window by window, when the round is merged.
"""

import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from atoll.boundary.channel import Frame, FrameLike
from atoll.errors import Corrupt, Invalid, Unavailable
from atoll.outer.wire import Chunk, decode, encoded_bytes

_HEADER = struct.Struct("<qqqq")
_SPARE = 64 << 20  # bytes of disk that stay free after an update


class Spool:
    """One run's folder of received updates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def receive(self, name: tuple[int, str], frames: Iterator[FrameLike], wire: tuple[str, ...], size: int) -> str:
        """Write the update ``name`` = (position, site) and return its digest.

        Every frame is checked before it is written: place, lengths, finite values. Raises `Invalid` in the words of
        what is wrong, `Unavailable` when the disk has no room.
        """
        needed = encoded_bytes(size, wire)
        if shutil.disk_usage(self._folder).free < needed + _SPARE:
            raise Unavailable(f"{self._folder}: no room for an update of {needed} bytes; free some space")
        path = self._path(name)
        part = path.with_suffix(f".part-{threading.get_ident()}")  # a broken stream may still be open beside its repeat
        hasher, expected = hashlib.sha256(), 0
        try:
            with part.open("wb") as file:
                for frame in frames:
                    if frame.offset != expected:
                        raise Invalid(f"update of {name[1]}: frame at {frame.offset} where {expected} was due")
                    decode(_chunk(frame), wire, size)
                    header = _HEADER.pack(frame.offset, frame.length, len(frame.data), len(frame.scales))
                    for piece in (header, frame.data, frame.scales):
                        hasher.update(piece)
                        file.write(piece)
                    expected += frame.length
                if expected != size:
                    raise Invalid(f"update of {name[1]}: ended after {expected} of {size} elements; send it whole")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise Unavailable(f"{path.name}: cannot be stored ({error.strerror}); free some space") from None
        finally:
            part.unlink(missing_ok=True)
        return "sha256:" + hasher.hexdigest()

    def windows(self, name: tuple[int, str], wire: tuple[str, ...], size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (offset, float32 values) in order; may be called again for another pass."""
        with self._path(name).open("rb") as file:
            while header := file.read(_HEADER.size):
                offset, length, data, scales = _HEADER.unpack(header)
                frame = Frame(offset, length, file.read(data), file.read(scales))
                yield offset, decode(_chunk(frame), wire, size)

    def holds(self, name: tuple[int, str], digest: str) -> bool:
        """Tell whether the update is here with these very bytes."""
        try:
            with self._path(name).open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def check(self, name: tuple[int, str], digest: str) -> None:
        if not self.holds(name, digest):
            raise Corrupt(f"update of {name[1]} for stage {name[0]} is not what was received; resume the run")

    def drop(self, spent: Callable[[int, str], bool]) -> None:
        """Forget the updates of which ``spent(position, site)`` is true: they are merged and journalled."""
        for path in self._folder.glob("*.update"):
            position, _, site = path.name.removesuffix(".update").partition("-")
            if spent(int(position), site):
                path.unlink(missing_ok=True)

    def _path(self, name: tuple[int, str]) -> Path:
        return self._folder / f"{name[0]}-{name[1]}.update"


def _chunk(frame: FrameLike) -> Chunk:
    return Chunk(frame.offset, frame.length, frame.data, frame.scales)

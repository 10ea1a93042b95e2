"""Updates as they arrive at the hub: on disk, whole or not there, so that one that dies half way leaves no trace.

A round's update is one file of frames (`atoll.runtime.frames`). They are decoded once on arrival to check them, and
again, window by window, when the round is merged. What came of one that broke off stays beside it, under a name that
only the same content, encoded in the same way and received since the machine was started, can lead to. The file of an
update that is spent becomes that of the next one to arrive.
"""

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from atoll.boundary.channel import Wanted
from atoll.errors import Corrupt, Invalid, LinkLost, Unavailable
from atoll.outer.wire import CHUNK, Chunk, decode
from atoll.runtime.arriving import Arriving
from atoll.runtime.disk import BOOT
from atoll.runtime.frames import Place, file_bytes, places
from atoll.runtime.spares import Spares
from atoll.spec.document import canonical
from atoll.spec.wire import Transform

_LEFT = 64 << 20  # bytes of disk that stay free after all updates that are under way
Name = tuple[int, str]  # of an update: the stage's position, and the site
Window = Callable[[int], np.ndarray]


@dataclass(slots=True)
class _Whole:
    """What this process knows of an update because it wrote it or looked it through."""

    digest: str
    mark: str | None = None  # of the content that it was received as
    count: int = 0
    places: Sequence[Place] = ()


class Spool:
    """One run's folder of received updates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.Lock()  # over both tables; where it is held, a part's own may be taken, never otherwise
        self._parts: dict[Name, tuple[str, Arriving]] = {}
        self._whole: dict[Name, _Whole] = {}
        self._read: dict[Name, int] = {}  # how often an update is open
        self._rooms = threading.local()
        folder.mkdir(parents=True, exist_ok=True)
        self._spares = Spares(folder)

    def receive(
        self,
        name: Name,
        frames: Wanted,
        wire: tuple[Transform, ...],
        size: int,
        content: str | None = None,
        ready: Callable[[], object] = lambda: None,
    ) -> tuple[str, int]:
        """Write the update ``name``; return its digest and how many bytes of data and scales came.

        ``frames(offset)`` asks the sender to begin at an element, once; it is not called where all is here. A stream
        that breaks off is gone on with when the same ``content`` comes again, the sender's name for exactly these
        bytes; another content begins anew, as does None each time. A stream still open beside its repeat gets
        `LinkLost` before it writes anything more.

        ``ready()`` is called when the stream has ended, before the update takes its name and the place of another one
        that has it. What it raises ends this stream, and the other one stays.

        Every frame is checked before it is written: place, lengths, finite values. Raises `Invalid` in the words of
        what is wrong, and leaves nothing behind; `Unavailable` when the disk has no room.
        """
        mark = _mark(content, wire, size)
        with self._turn:
            whole = self._here(name, mark)
            part = self._part(name, mark, wire, size) if whole is None else None
        if part is None:
            ready()
            with self._turn:
                whole = self._here(name, mark)
            if whole is None:
                raise LinkLost(f"update of {name[1]}: another one has come in its place; it is asked for again")
            return whole.digest, whole.count
        writer: object | None = None
        try:
            writer = part.take_over()
            self._check_room()
            if part.filled < size:
                for frame in frames(part.filled):
                    part.add(writer, frame)
            ready()
            return self._appear(name, mark, part, writer)
        except Invalid:
            self._drop(name, part, writer)
            raise
        except OSError as error:
            self._drop(name, part, writer)  # half of it would only keep the disk full
            self._spares.keep(0)
            words = f"update of {name[1]}: cannot be stored ({error.strerror}); mend it, it is sent again"
            raise Unavailable(words) from None
        finally:
            if content is None:
                self._drop(name, part, writer)
            part.leave(writer)

    @contextmanager
    def reading(self, name: Name, wire: tuple[Transform, ...], size: int) -> Iterator[Window]:
        """Open a whole update, to read the float32 window at any offset.

        Threads may read at the same time. What a thread gets is good until it reads again, from any update.
        """
        with self._opened(name) as file:
            found = self._places(name, file.fileno(), wire, size)
            plain = all(step.kind in ("clip", "noise") for step in wire)

            def window(offset: int) -> np.ndarray:
                place = found[offset // CHUNK]
                room = self._room(place.data + place.scales)
                if os.preadv(file.fileno(), [room], place.at) != len(room):
                    raise _changed(name)
                if plain:  # these are the numbers themselves, seen to be finite on their way in
                    return np.frombuffer(room, "<f4")
                length = min(CHUNK, size - offset)
                return decode(Chunk(offset, length, room[: place.data], room[place.data :]), wire, size)

            yield window

    @contextmanager
    def _opened(self, name: Name) -> Iterator[FileIO]:
        """Open a whole update. While it is open its file becomes no other's."""
        with self._turn:
            try:
                file = self._path(name).open("rb", buffering=0)
            except FileNotFoundError:
                raise _changed(name) from None
            self._read[name] = self._read.get(name, 0) + 1
        try:
            with file:
                yield file
        finally:
            with self._turn:
                self._read[name] -= 1
                if not self._read[name]:
                    del self._read[name]

    def holds(self, name: Name, digest: str) -> bool:
        """Tell whether the update is here with these very bytes. What this process wrote is not hashed again."""
        with self._turn:
            known = self._whole.get(name)
        if known is not None and known.digest == digest:
            return self._path(name).exists()
        try:
            with self._path(name).open("rb", buffering=0) as file:
                found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return False
        if found == digest:
            with self._turn:
                self._whole[name] = _Whole(digest)
        return found == digest

    def check(self, name: Name, digest: str) -> None:
        if not self.holds(name, digest):
            raise _changed(name)

    def drop(self, spent: Callable[[int, str], bool]) -> None:
        """Forget the updates, whole or not, of which ``spent(position, site)`` is true: they are merged and journalled,
        or not waited for any more. Who is still sending one hears `LinkLost`, and at the next try that it is late."""
        gone = {path: name for path in self._folder.iterdir() if (name := _name(path)) is not None and spent(*name)}
        whole = 0
        with self._turn:
            for path, name in gone.items():
                self._whole.pop(name, None)
                if name in self._parts:
                    self._parts.pop(name)[1].retire()
                if path.suffix == ".update" and name not in self._read:
                    self._spares.add(path)
                    whole += 1
                else:
                    path.unlink(missing_ok=True)
            if whole:
                self._spares.keep(whole)

    # --- what is arriving ---------------------------------------------------------------------------------------

    def _part(self, name: Name, mark: str, wire: tuple[Transform, ...], size: int) -> Arriving:
        """Return the file to go on with, in the table, when all others of this name are gone."""
        before = self._parts.get(name)
        if before is not None and before[0] == mark:
            return before[1]
        if before is not None:
            before[1].retire()
        path = self._folder / f"{name[0]}-{name[1]}.{mark}.part"
        for other in self._folder.glob("*.part"):
            if other != path and _name(other) == name:
                other.unlink(missing_ok=True)
        over = None if path.exists() else self._spares.take(file_bytes(size, wire))
        part = Arriving(path, name[1], wire, size, over)
        self._parts[name] = (mark, part)
        return part

    def _check_room(self) -> None:
        with self._turn:
            due = sum(part.due for _, part in self._parts.values())
        if shutil.disk_usage(self._folder).free < due + _LEFT:
            self._spares.keep(0)
        if shutil.disk_usage(self._folder).free < due + _LEFT:
            raise Unavailable(f"{self._folder}: no room for {due} bytes of updates; free some, they are sent again")

    def _appear(self, name: Name, mark: str, part: Arriving, writer: object) -> tuple[str, int]:
        with self._turn:
            digest = part.appear(writer, self._path(name))
            del self._parts[name]
            self._whole[name] = whole = _Whole(digest, mark, part.count, part.places)
            return whole.digest, whole.count

    def _drop(self, name: Name, part: Arriving, writer: object) -> None:
        with self._turn:
            if writer is not None and part.written_by(writer):
                del self._parts[name]
                part.retire()

    # --- what is whole ------------------------------------------------------------------------------------------

    def _here(self, name: Name, mark: str) -> _Whole | None:
        """Return what is known of the update where it is here, received as this content."""
        whole = self._whole.get(name)
        return whole if whole is not None and whole.mark == mark and self._path(name).exists() else None

    def _places(self, name: Name, descriptor: int, wire: tuple[Transform, ...], size: int) -> Sequence[Place]:
        with self._turn:
            known = self._whole.get(name)
        if known is not None and known.places:
            return known.places
        found = list(places(descriptor, size, wire))
        if len(found) != -(-size // CHUNK):
            raise _changed(name)
        return found

    def _room(self, size: int) -> memoryview:
        room: memoryview | None = getattr(self._rooms, "room", None)
        if room is None or len(room) < size:
            self._rooms.room = room = np.empty(max(size, 4 * CHUNK), np.uint8).data
        return room[:size]

    def _path(self, name: Name) -> Path:
        return self._folder / f"{name[0]}-{name[1]}.update"


def _name(path: Path) -> Name | None:
    """Return the update that a file of the folder is of, or a part of; None for one that is not ours."""
    stem = path.name.removesuffix(".update") if path.suffix == ".update" else path.stem.rpartition(".")[0]
    position, _, site = stem.partition("-")
    ours = path.suffix in (".update", ".part") and position.isdecimal() and site
    return (int(position), site) if ours else None


def _mark(content: str | None, wire: tuple[Transform, ...], size: int) -> str:
    # Nothing is flushed to the disk, so what is there after a loss of power may be anything; only for a whole update is
    # there a digest to tell.
    said = [BOOT, content or secrets.token_hex(16), [step.model_dump(mode="json") for step in wire], size]
    return hashlib.sha256(canonical(said)).hexdigest()[:32]


def _changed(name: Name) -> Corrupt:
    return Corrupt(f"update of {name[1]} for stage {name[0]} is not what was received; submit the job again")

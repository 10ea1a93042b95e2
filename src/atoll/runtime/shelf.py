"""What a relay keeps of what its sites fetch: each stream comes over its link once, and is given to every site below.

Whether a site may have it the hub is asked each time, in that site's name: it decides by its rules, and journals what
the site was given. Only then is anything given out here.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.boundary.channel import Frame, FrameLike
from atoll.errors import Corrupt, Unavailable
from atoll.registry.weights import head
from atoll.runtime.disk import appearing
from atoll.runtime.frames import frames as frames_of
from atoll.runtime.frames import pieces
from atoll.spec.document import canonical, sha256
from atoll.spec.message import Parcel
from atoll.spec.model import Signature

_KEPT = 8  # streams: of a run its code, and weights of this round and of the last one
Stream = tuple[Parcel, Iterator[FrameLike]]


class Shelf:
    """Files of frames, of this process's life only. May be asked from any thread."""

    def __init__(self, folder: Path, fetch: Callable[[Parcel], Stream]) -> None:
        """``fetch`` asks the hub, or the relay in its place; what an earlier process kept is dropped."""
        self._folder, self._fetch = folder, fetch
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._turn = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._kept: dict[str, None] = {}  # the one used last at the end

    def give(self, site: str, asked: Parcel, signature: Signature) -> Stream:
        """Return what a site asks for once the hub has allowed it; ``signature`` is that of weights.

        Raises as the hub does, `Corrupt` for whole weights or code that are not what their digest says.
        """
        known = asked.model_copy(update={"site": site})
        with self._one_at_a_time(asked.run):
            header, found = None, None
            if any(self._has(_key(asked, base)) for base in {asked.base, None}):
                header, _ = self._fetch(known.model_copy(update={"held": True}))
                found = self._found(_key(asked, header.base))
            if header is None or found is None:
                header, frames = self._fetch(known)
                found = self._put(_key(asked, header.base), header, frames, signature)
        return header.model_copy(update={"site": None, "held": False}), found

    def release(self, run: str) -> None:
        """A run is over; its streams go when others take their place."""
        with self._turn:
            self._fetching.pop(run, None)

    def _one_at_a_time(self, run: str) -> threading.Lock:
        with self._turn:
            return self._fetching.setdefault(run, threading.Lock())

    def _has(self, key: str) -> bool:
        return key in self._kept

    def _found(self, key: str) -> Iterator[FrameLike] | None:
        with self._turn:
            if key not in self._kept:
                return None
            self._kept[key] = self._kept.pop(key)
            return _opened(self._folder / key)

    def _put(self, key: str, header: Parcel, frames: Iterator[FrameLike], signature: Signature) -> Iterator[FrameLike]:
        path = self._folder / key
        try:
            with appearing(path) as file:  # one at a time of a run, and a name is one run's
                for frame in _verified(header, frames, signature):
                    for piece in pieces(frame):
                        file.write(piece)
        except OSError as error:
            raise Unavailable(f"relay: {error.strerror}; free some space there, it is fetched again") from None
        with self._turn:
            self._kept[key] = None
            given = _opened(path)
            while len(self._kept) > _KEPT:
                old = next(iter(self._kept))
                del self._kept[old]
                (self._folder / old).unlink(missing_ok=True)  # who is being given it has it open
        return given


def _key(asked: Parcel, base: str | None) -> str:
    """Return the name of a stream's file: of a digest, so that nothing from another party is a path."""
    return sha256(canonical([asked.run, asked.purpose, asked.digest, base])).removeprefix("sha256:")


def _opened(path: Path) -> Iterator[FrameLike]:
    """Return a file's frames, with the file open from now on."""
    frames = frames_of(path)
    first = next(frames, None)
    return _after(first, frames)


def _after(first: Frame | None, frames: Iterator[Frame]) -> Iterator[FrameLike]:
    if first is not None:
        yield first
        yield from frames


def _verified(header: Parcel, frames: Iterator[FrameLike], signature: Signature) -> Iterator[FrameLike]:
    """Yield the frames; raise `Corrupt` at their end when they are not the digest's. A change to other weights can be
    verified only by who has those: the site does, and fetches the whole of them where it fails."""
    hasher = hashlib.sha256(head(signature) if header.purpose == "weights" else b"")
    for frame in frames:
        hasher.update(frame.data)
        yield frame
    if header.base is None and "sha256:" + hasher.hexdigest() != header.digest:
        raise Corrupt(f"{header.purpose} {str(header.digest)[:19]}...: what came to the relay is not it; try again")

"""What a relay keeps of what its sites fetch: each stream comes over its link once, and is given to every site below.

Whether a site may have it the hub is asked each time, in that site's name: it decides by its rules, and journals what
the site was given. Only then is anything given out here.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from atoll.boundary.channel import FrameLike
from atoll.errors import LinkLost
from atoll.runtime.following import Following
from atoll.spec.document import canonical, sha256
from atoll.spec.message import Parcel
from atoll.spec.model import Signature

_KEPT = 8  # streams: of a run its code, and weights of this round and of the last one
_TURN = 20.0  # seconds that one waits while the hub is asked for another; a site waits 30 for the first word
Stream = tuple[Parcel, Iterator[FrameLike]]


class Shelf:
    """Files of frames, of this process's life only. May be asked from any thread."""

    def __init__(self, folder: Path, fetch: Callable[[Parcel], Stream]) -> None:
        """``fetch`` asks the hub, or the relay in its place; what an earlier process kept is dropped."""
        self._folder, self._fetch = folder, fetch
        shutil.rmtree(folder, ignore_errors=True)
        self._turn = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._kept: dict[str, Following] = {}  # the one used last at the end
        self._number = count()

    def give(self, site: str, asked: Parcel, signature: Signature) -> Stream:
        """Return what a site asks for once the hub has allowed it; ``signature`` is that of weights. Its frames come as
        they come from the hub, and end in `LinkLost` where whole weights or code are not what their digest says.

        Raises as the hub does, `OSError` for a disk without room.
        """
        known = asked.model_copy(update={"site": site})
        with self._one_at_a_time(asked.run):
            header, found = None, None
            if any(self._found(_key(asked, base)) for base in {asked.base, None}):
                header, _ = self._fetch(known.model_copy(update={"held": True}))
                found = self._found(_key(asked, header.base))
            if header is None or found is None:
                header, frames = self._fetch(known)
                found = self._begun(_key(asked, header.base), header, frames, signature)
        return header.model_copy(update={"site": None, "held": False}), found.frames()

    def release(self, run: str) -> None:
        """A run is over; its streams go when others take their place."""
        with self._turn:
            self._asking.pop(run, None)

    @contextmanager
    def _one_at_a_time(self, run: str) -> Iterator[None]:
        """Be the only one of a run who asks the hub, so that nothing is fetched twice."""
        with self._turn:
            lock = self._asking.setdefault(run, threading.Lock())
        if not lock.acquire(timeout=_TURN):
            raise LinkLost(f"run {run}: the hub does not answer for another site yet; try again")
        try:
            yield
        finally:
            lock.release()

    def _found(self, key: str) -> Following | None:
        """Return what is kept under a name, whole or still coming; None also for what broke off."""
        with self._turn:
            found = self._kept.pop(key, None)
            if found is None or found.lost:
                return None
            self._kept[key] = found
            return found

    def _begun(self, key: str, header: Parcel, frames: Iterator[FrameLike], signature: Signature) -> Following:
        """Have a stream come to the disk at the hub's pace, whatever that of who is given it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}.{next(self._number)}"  # not that of one which may still be read, or dropped
        begun = Following(path, header, frames, signature)
        with self._turn:
            self._kept[key] = begun
            while len(self._kept) > _KEPT:
                self._kept.pop(next(iter(self._kept))).drop()
        return begun


def _key(asked: Parcel, base: str | None) -> str:
    """Return the name of a stream's file: of a digest, so that nothing from another party is a path."""
    return sha256(canonical([asked.run, asked.purpose, asked.digest, base])).removeprefix("sha256:")

"""A round's checkpoints on a disk: the last resort, where nobody's memory has what a lost group had done.

One folder for a round; each rank that has a part of its own writes it to a file of its own, from its mirror, while its
steps go on. The file's name tells its step, whose part it is of how many, and its digest, without which nothing of it
is read. Ranks of another layout find their parts among all of them. The newest two steps are kept.
"""

import contextlib
import hashlib
import itertools
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from atoll.durable import copied
from atoll.errors import Corrupt
from atoll.inner.parts import Part, unpacked
from atoll.spec.saved import SavedName, saved_name

DEEP = 2  # steps of which checkpoints are kept
_NUMBERS = itertools.count()
_BESIDE = 1 << 20  # bytes that are copied beside a step; fewer take no longer than a thread to begin
_LATER = 19  # how nice it is to whatever else wants the processor
log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """One rank's file, and what its name tells."""

    path: Path
    named: SavedName


def saved(folder: Path) -> list[Saved]:
    """Return the files of a folder, whatever else lies there."""
    found = ((path, saved_name(path.name)) for path in (folder.iterdir() if folder.is_dir() else ()))
    return [Saved(path, named) for path, named in found if named is not None]


def complete(files: list[Saved]) -> list[list[Saved]]:
    """Return the files of each step of which all parts are there, the newest first."""
    sets: dict[tuple[int, int], dict[int, Saved]] = {}
    for one in files:
        sets.setdefault((one.named.step, one.named.parts), {})[one.named.part] = one
    whole = (found for (_, parts), found in sorted(sets.items(), reverse=True) if found.keys() == set(range(parts)))
    return [list(found.values()) for found in whole]


def read(one: Saved) -> tuple[dict[str, Part], dict[str, Any]]:
    """Return a file's parts, and what goes with them. Raises `Corrupt` unless its bytes are the ones written."""
    try:
        with one.path.open("rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:  # it is empty, or another took it away
        raise Corrupt(f"{one.path.name}: cannot be read ({error}); the round begins anew") from None
    if hashlib.sha256(memory).hexdigest() != one.named.digest:
        raise Corrupt(f"{one.path.name}: its bytes are not the ones written; the round begins anew")
    return unpacked(memory, one.path.name)


class Place(NamedTuple):
    """Where a copy is to be written on a disk: in which folder, and what its name is to tell."""

    folder: Path
    step: int
    part: int
    parts: int


class Copied(Protocol):
    """What copies a state that is about to change."""

    bytes: int

    def make(self) -> int | None:
        """Copy it, and return the number of the file that has it; None when there is none."""
        ...

    def same(self) -> bool:
        """Tell whether it has not changed yet."""
        ...


class Writer:
    """Copies a state while its caller computes what it will be next, and writes the copy to a disk while it goes on.

    One at a time. A failure of the disk is logged, since no such file is ever needed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()  # or there is nothing to copy
        self._copied.set()
        self._failed: BaseException | None = None
        self._beside = True
        self.seconds = 0.0  # that the last one took to be written
        self.step: int | None = None  # of the last one that is whole

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def write(self, copy: Copied, to: Place | None, beside: bool = True) -> None:
        """Copy a state, which is not to change until `copied` has returned, and write the copy ``to`` a disk.

        It is copied ``beside`` what the caller does next, or before this returns.
        """
        self.wait()
        if beside and self._beside and copy.bytes >= _BESIDE:
            self._copied.clear()
            self._begin(self._copy, copy, to)
        else:
            file = copy.make()
            if file is not None and to is not None:
                self._begin(self._write, file, to)

    def copied(self) -> None:
        """Return when the state may change. Raises what copying it raised."""
        self._copied.wait()  # memory is copied, or not: that ends
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def wait(self) -> None:
        """Return when nothing is being written: a write to a disk ends, or fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.copied()

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        self._thread = threading.Thread(target=target, args=arguments, name="checkpoint")
        self._thread.start()

    def _copy(self, copy: Copied, to: Place | None) -> None:
        file = None
        try:
            file = copy.make()
            self._beside = copy.same()  # a forward pass that changes weights is waited for with the next ones
        except BaseException as error:  # noqa: BLE001 - the thread's end: `copied` raises it where it is heard
            self._failed = error
        finally:
            self._copied.set()
        if file is not None and to is not None:
            self._write(file, to)

    def _write(self, file: int, to: Place) -> None:
        began = time.monotonic()
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LATER)
        unfinished = to.folder / f"{os.getpid()}-{next(_NUMBERS)}.part"  # its predecessor may still be writing its own
        try:
            to.folder.mkdir(exist_ok=True)
            digest = copied(file, unfinished)
            named = SavedName(to.step, to.part, to.parts, digest)
            os.replace(unfinished, to.folder / str(named))
            _drop_others(to.folder, named)
        except OSError as error:  # the round needs none unless its ranks are lost, and then does more of itself again
            log.warning("no checkpoint after step %s of the round: %s", to.step, error.strerror)
        else:
            self.step = to.step
        finally:
            with contextlib.suppress(OSError):  # nor was it begun, then
                unfinished.unlink()
        self.seconds = time.monotonic() - began


def _drop_others(folder: Path, new: SavedName) -> None:
    """Keep of this part the newest, and of this step what was just written."""
    mine = [one for one in saved(folder) if (one.named.part, one.named.parts) == (new.part, new.parts)]
    same = [one for one in mine if one.named.step == new.step and one.named != new]
    others = [one for one in mine if one not in same]
    # By age, for what has a higher step may be another order's.
    old = sorted(others, key=lambda each: each.path.stat().st_mtime_ns)[:-DEEP]
    for one in (*same, *old):
        one.path.unlink(missing_ok=True)

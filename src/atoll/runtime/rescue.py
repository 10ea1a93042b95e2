"""What the ranks of a lost group had mirrored, written to the round's folder: the next group goes on from there.

The agent, which holds the memory, knows no tensor: it reads what a mirror says of itself, and copies bytes.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from atoll.durable import copied
from atoll.spec.saved import SavedName

_LENGTH = 8  # bytes of a safetensors file's first number; zero in a mirror that was being written
_WORDS = 16 << 20  # bytes in which tensors are told, at most
log = logging.getLogger(__name__)


def rescue(mirrors: Iterable[Sequence[int]], folder: Path, outside: Path) -> int | None:
    """Write the newest step of the folder's round that all parts have; return it, None without one, or room for it.

    ``mirrors`` are the numbers of each place's files, which nobody writes to any more. ``folder`` lies where user code
    could write, and ``outside``, on the same disk, is where it could not.
    """
    sets: dict[tuple[int, int], dict[int, int]] = {}
    for file in (file for files in mirrors for file in files):
        told = _told(file, folder.name)
        if told is not None:
            step, part, parts = told
            sets.setdefault((step, parts), {})[part] = file
    whole = [(step, parts) for (step, parts), found in sets.items() if found.keys() == set(range(parts))]
    if not whole:
        return None
    step, parts = max(whole)
    try:
        into = _entered(folder)
        try:
            for part, file in sets[step, parts].items():
                unfinished = outside / f"rescued-{part}.part"
                try:
                    digest = copied(file, unfinished)
                    os.replace(unfinished, str(SavedName(step, part, parts, digest)), dst_dir_fd=into)
                finally:
                    unfinished.unlink(missing_ok=True)  # half of it would only keep the disk full
        finally:
            os.close(into)
    except OSError as error:
        log.warning("what the lost group had done since its last checkpoint is lost, too: %s", error.strerror)
        return None
    return step


def _entered(folder: Path) -> int:
    """Return the number of this very folder, which is made where there is none: no link leads elsewhere from it."""
    if folder.is_symlink():
        folder.unlink()
    folder.mkdir(exist_ok=True)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _told(file: int, round_: str) -> tuple[int, int, int] | None:
    """Return a mirror's step, whose part it is, and of how many; None of one that is not whole, or another round's."""
    held = os.fstat(file)
    if held.st_size > 512 * held.st_blocks:  # a rank's is all in memory; what user code only said is there would fill
        return None  # a disk
    size = int.from_bytes(os.pread(file, _LENGTH, 0), "little")
    if not 0 < size <= _WORDS:
        return None
    try:
        about = json.loads(json.loads(os.pread(file, size, _LENGTH))["__metadata__"]["atoll"])["about"]
        step, (part, parts), of = about["step"], about["part"], about["folder"]
    except (KeyError, TypeError, ValueError, RecursionError):  # user code can write there
        return None
    whole = of == round_ and all(type(number) is int for number in (step, part, parts))
    return (step, part, parts) if whole and 0 <= step < 10**12 and 0 <= part < parts < 10**6 else None

"""Files on a party's own disk: whole or not there, told torn by a CRC-32, read without taking their size of memory.

What a process wrote is there for the next one even where it was killed, and for nobody after a loss of power, unless it
was flushed.
"""

import mmap
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

_PIECE = 1 << 20  # bytes


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(16)


BOOT = _boot()  # tells one start of the machine from the next, or else this process from the next


def file_crc(path: Path) -> int:
    """Return the CRC-32 of a file. Raises `FileNotFoundError`."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def mapped(path: Path) -> np.ndarray:
    """Return a file's float32 numbers, read-only and read only when looked at.

    They stay what they are when another file takes the name, as every writer here has it.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which no system maps
            return np.empty(0, np.float32)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.float32)


@contextmanager
def appearing(path: Path, durable: bool = False, over: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes its name when it is whole. A durable one outlives a loss of power once its folder does.

    ``over`` is a file that nobody needs any more, to be written over: it becomes this one.
    """
    part = path.with_name(path.name + ".part")
    try:
        if over is not None:
            os.replace(over, part)
        with part.open("wb" if over is None else "r+b") as file:
            yield file
            if over is not None:
                file.truncate()  # what it held behind this
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # half of it would only keep the disk full
        raise

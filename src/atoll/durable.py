"""What outlives a loss of power: a file's bytes once they are flushed, and its name once its folder is.

What need not is told from a whole file by its digest.
"""

import hashlib
import os
from pathlib import Path

_PIECE = 1 << 20


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk: without it the name of a file that was made or renamed in it may be lost.

    Raises `OSError`.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copied(file: int, path: Path) -> str:
    """Copy a file, given by its number, to a path, without flushing it; return the SHA-256 of its bytes in hex.

    What lies at the path makes room for a new file: a link there is not followed. Raises `OSError`.
    """
    digest, at = hashlib.sha256(), 0
    path.unlink(missing_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(number, "wb") as copy:
        while piece := os.pread(file, _PIECE, at):
            digest.update(piece)
            copy.write(piece)
            at += len(piece)
    return digest.hexdigest()

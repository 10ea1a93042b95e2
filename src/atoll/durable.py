"""What outlives a loss of power: a file's bytes once they are flushed, and its name once its folder is."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk: without it the name of a file that was made or renamed in it may be lost.

    Raises `OSError`.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

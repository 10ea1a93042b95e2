"""What a process prints, on its way to a log that it is to see nothing of: a pipe, and a thread that empties it.

Whoever is given a log itself, opened to be written to, can open it again by way of /proc: to read what others left in
it, or to empty it.
"""

import contextlib
import logging
import os
import threading
from io import FileIO
from pathlib import Path

MOST = 16 << 20  # bytes of one drain that are kept
_PIECE = 1 << 16
_LAST = 3.0  # seconds for the rest, once nobody writes any more
log = logging.getLogger(__name__)


class Drain:
    """Appends to a log what is written to `pipe`, up to so many bytes; what comes after them is read and let go.

    Nobody who writes waits for longer than it takes this process to read.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        """Open both. Raises `OSError`."""
        with contextlib.ExitStack() as undone:
            reading, self.pipe = os.pipe()
            undone.callback(os.close, self.pipe)
            source = undone.enter_context(open(reading, "rb", buffering=0))
            kept = undone.enter_context(path.open("ab", buffering=0))
            self._thread = threading.Thread(
                target=self._run, args=(source, kept, most), name=f"drain-{path.stem}", daemon=True
            )
            self._thread.start()
            undone.pop_all()

    def _run(self, source: FileIO, kept: FileIO, most: int) -> None:
        left, whole = most, True
        with source, kept:
            while piece := source.read(_PIECE):
                if not whole:
                    continue
                try:
                    _append(kept, piece[:left])
                    left -= len(piece)
                    if left < 0:
                        whole = False
                        _append(kept, b"\n... %d bytes of it are kept here, and no more\n" % most)
                except OSError as error:  # who prints is not to wait for a disk that is full
                    whole = False
                    log.warning("%s: the rest of it is lost: %s", kept.name, error.strerror)

    def shut(self) -> None:
        """Close this process's own end of the pipe: it ends with whoever else has one. Only one thread calls this."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def close(self) -> None:
        """Return when all is kept that was written; nobody else has an end of the pipe any more."""
        self.shut()
        self._thread.join(_LAST)


def _append(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]

"""A rank's own seconds: what its thread computed, or stood ready to compute, and not what it waited for its peers.

In a collective a thread sleeps. On a slow core it does not, it runs longer; on a busy one it stands ready until its
turn comes, which Linux counts (`/proc/thread-self/schedstat`: nanoseconds run, nanoseconds ready, turns).
"""

import os
import time
from types import TracebackType
from typing import BinaryIO, Self

_SCHEDULED = "/proc/thread-self/schedstat"


class Stopwatch:
    """Counts for the thread that made it. Where the kernel does not tell how long it stood ready, only what it ran."""

    def __init__(self, scheduled: str = _SCHEDULED) -> None:
        try:
            self._file: BinaryIO | None = open(scheduled, "rb", buffering=0)  # noqa: SIM115 - as long as this is used
        except OSError:  # another system, or a kernel that was built without it
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def seconds(self) -> float:
        """Return the thread's own seconds so far; only differences mean something."""
        # The kernel's own count of what ran is brought up to date a few hundred times a second only, this clock always.
        return time.thread_time() + (0.0 if self._file is None else _ready(self._file))


def _ready(file: BinaryIO) -> float:
    words = os.pread(file.fileno(), 100, 0).split()
    return int(words[1]) / 1e9 if len(words) > 1 else 0.0

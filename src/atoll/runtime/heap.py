"""What this process does with memory that it has freed: it keeps some, for the next window of a MiB is about to come.

By default glibc gives each such block back to the system, and the kernel clears its pages again at the next one: to
encode an update with feedback then takes three to four times as long (172 against 41 ms of processor time per 100 MB,
measured 2026-11-23 on one core of a busy machine).
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
_BLOCK = 4 << 20  # bytes; larger blocks are the system's own, and go back to it at once: whole vectors are such
_KEPT = 16 << 20  # bytes that each arena, of which there are a few, may have free at its end


def keep_freed() -> bool:
    """Set this for the whole process; False where the C library is another one, and nothing is changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _BLOCK) and mallopt(_TRIM_THRESHOLD, _KEPT))

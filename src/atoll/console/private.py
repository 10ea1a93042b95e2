"""Files that only their owner can read: keys, tokens, where a hub answers."""

import os
from pathlib import Path

from atoll.errors import Unavailable


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read; a reader sees the old text or the new one, never half."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
        fresh.replace(file)
    except OSError as error:
        raise Unavailable(f"{file}: cannot be written ({error.strerror}); check space and permissions") from None

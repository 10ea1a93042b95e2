"""Files that only their owner can read: keys, tokens, where a hub answers."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.durable import sync_folder
from atoll.errors import Denied, Unavailable


def read(path: Path, breach: str) -> bytes | None:
    """Return the bytes of a private file, None where there is none.

    Raises `Denied` with the words ``breach`` where others than its owner can read it, `Unavailable`.
    """
    try:
        with path.open("rb") as file:
            data, mode = file.read(), os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror}); check who owns it") from None
    if mode & 0o077:
        raise Denied(f"{path}: {breach}")
    return data


def write(path: Path, data: bytes) -> None:
    """Write a private file over the one before: a reader, also after a crash, sees the old one or the new one, whole.

    Raises `Unavailable`.
    """
    with _written(path, data) as fresh:
        fresh.replace(path)
        sync_folder(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Write a private file, but never over another; return whether there was none. Raises `Unavailable`."""
    with _written(path, data) as fresh:
        try:
            os.link(fresh, path)  # unlike a rename it fails when another process made one meanwhile
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """Give a new private file beside ``path``, flushed to the disk and gone in the end under this name."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield fresh
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be written ({error.strerror}); check space and permissions") from None

"""A job's code where it is run: laid out from a bundle whose digest was verified first."""

import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from atoll.boundary.channel import FrameLike
from atoll.errors import Corrupt, Invalid
from atoll.spec.document import canonical, sha256
from atoll.spec.model import Bundle

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # of another party: nothing else is used as a part of a path


def laid_out(folder: Path, digest: str) -> bool:
    """Tell whether ``folder`` holds the very files of this digest; what ran there may have changed them."""
    return read_bundle(folder, digest) is not None


def read_bundle(folder: Path, digest: str) -> Bundle | None:
    """Return the files in ``folder``; None where they are not those of this digest."""
    try:
        bundle = found_in(folder)
    except (OSError, UnicodeDecodeError):
        return None
    return bundle if sha256(canonical(bundle)) == digest else None


def found_in(folder: Path) -> Bundle:
    """Return the files in ``folder``, line ends and all. Raises `OSError`, and `UnicodeDecodeError` for no UTF-8."""
    return Bundle(files={path.name: path.read_bytes().decode() for path in folder.iterdir() if path.is_file()})


def write_bundle(bundle: Bundle, folder: Path) -> Path:
    """Lay verified code out in ``folder``, whole or not at all. Names with a path in them are `Invalid`.

    What lay there is moved aside, not removed: a worker of this process may have it in its sandbox. The next process
    that comes by removes it.
    """
    for name in bundle.files:
        if not _FILE.fullmatch(name):
            raise Invalid(f"code: {name[:100]!r} is not a plain file name; put the task's files side by side")
    part = folder.with_name(folder.name + f".part-{threading.get_ident()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, text in bundle.files.items():
            (part / name).write_bytes(text.encode())
        with suppress(FileNotFoundError):  # mostly: else what is there is not what should be
            folder.rename(folder.with_name(f"{folder.name}.old-{os.getpid()}-{uuid.uuid4().hex[:8]}"))
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # half of it would only keep a full disk full
        if not folder.is_dir():  # otherwise another run of the same code was quicker, and its digest is the same
            raise
    for old in folder.parent.glob(f"{folder.name}.old-*"):
        if not old.name.startswith(f"{folder.name}.old-{os.getpid()}-"):
            shutil.rmtree(old, ignore_errors=True)
    return folder


def gathered(frames: Iterator[FrameLike], limit: int) -> bytes:
    """Join a stream's frames; raise `Corrupt` when they are more than ``limit`` bytes."""
    data = bytearray()
    for frame in frames:
        data += frame.data
        if len(data) > limit:
            raise Corrupt(f"code: longer than the {limit} bytes announced; submit the job again")
    return bytes(data)

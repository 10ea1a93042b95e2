"""A job's code where it is run: laid out from a bundle whose digest was verified first."""

import re
import shutil
import threading
from collections.abc import Iterator
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
        files = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}
    except (OSError, UnicodeDecodeError):
        return None
    bundle = Bundle(files=files)
    return bundle if sha256(canonical(bundle)) == digest else None


def write_bundle(bundle: Bundle, folder: Path) -> Path:
    """Lay verified code out in ``folder``, whole or not at all. Names with a path in them are `Invalid`."""
    for name in bundle.files:
        if not _FILE.fullmatch(name):
            raise Invalid(f"code: {name[:100]!r} is not a plain file name; put the task's files side by side")
    shutil.rmtree(folder, ignore_errors=True)  # only ever called where what is there is not what should be
    part = folder.with_name(folder.name + f".part-{threading.get_ident()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, text in bundle.files.items():
            (part / name).write_text(text, encoding="utf-8")
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # half of it would only keep a full disk full
        if not folder.is_dir():  # otherwise another run of the same code was quicker, and its digest is the same
            raise
    return folder


def gathered(frames: Iterator[FrameLike], limit: int) -> bytes:
    """Join a stream's frames; raise `Corrupt` when they are more than ``limit`` bytes."""
    data = bytearray()
    for frame in frames:
        data += frame.data
        if len(data) > limit:
            raise Corrupt(f"code: longer than the {limit} bytes announced; submit the job again")
    return bytes(data)

"""Bytes under their own digest, in a folder or any fsspec store: whole or not at all, checked when read."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Invalid, NotFound, Unavailable

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Blobs:
    """A content-addressed store: ``sha256:abcdef...`` lies at ``ab/cdef...`` under the store's root.

    ``url`` is a folder or an fsspec URL (``s3://bucket/atoll``, ``memory://atoll``). Reading never returns bytes
    that their digest does not name (`Corrupt`), and asking for what is not there is `NotFound`.
    """

    def __init__(self, url: str | Path) -> None:
        try:
            self._remote, root = fsspec.core.url_to_fs(str(url))
        except (ValueError, ImportError) as error:
            raise Invalid(
                f"store: {str(url)!r}: {error}; give a folder or an fsspec URL such as s3://bucket/atoll"
            ) from None
        self._root = root.rstrip("/")
        self._folder = Path(root) if "file" in _protocols(self._remote) else None

    def put(self, data: bytes | memoryview) -> str:
        """Keep ``data`` and return its digest. A blob that is there and intact is left alone, a damaged one mended."""
        view = memoryview(data).cast("B")
        digest = "sha256:" + hashlib.sha256(view).hexdigest()
        if self._intact(digest):
            return digest
        if self._folder is not None:
            _publish(self._folder, digest, view)
        else:
            with _told(self._root, view.nbytes):  # object stores show a new object whole or not at all
                self._remote.pipe_file(self._path(digest), bytes(view))
        return digest

    def get(self, digest: str) -> bytes:
        """Return the blob, verified."""
        path = self._path(digest)
        with _told(self._root), _missing(digest):
            data = bytes(self._remote.cat_file(path))
        self._check(digest, "sha256:" + hashlib.sha256(data).hexdigest())
        return data

    def local(self, digest: str) -> Path:
        """Return the path of the verified blob; only a store in a folder has one."""
        if self._folder is None:
            raise Invalid(f"store: {self._root} is not a folder of this machine; read the blob with get")
        path = Path(self._path(digest))
        with _told(self._root), _missing(digest), path.open("rb") as source:
            found = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
        self._check(digest, found)
        return path

    def has(self, digest: str) -> bool:
        """Whether there is a blob of this name; `get` says whether it is intact."""
        with _told(self._root):
            return bool(self._remote.isfile(self._path(digest)))

    def remove(self, digest: str) -> None:
        """Have no blob of this name any more; one that is not there is no error."""
        path = self._path(digest)
        with _told(self._root):
            if self._folder is None:
                if self._remote.isfile(path):
                    self._remote.rm_file(path)
            elif (file := Path(path)).is_file():
                file.unlink(missing_ok=True)
                sync_folder(file.parent)

    def size(self, digest: str) -> int:
        """Bytes of the blob as stored."""
        with _told(self._root), _missing(digest):
            return int(self._remote.size(self._path(digest)))

    def _path(self, digest: str) -> str:
        # A digest may come from another party, and it is about to become a path.
        if not _DIGEST.fullmatch(digest):
            raise Invalid(f"digest: {digest[:80]!r} is not of the form sha256:<64 hex digits>; copy it whole")
        return f"{self._root}/{digest[7:9]}/{digest[9:]}"

    def _intact(self, digest: str) -> bool:
        if not self.has(digest):
            return False
        try:
            self.local(digest) if self._folder is not None else self.get(digest)
        except Corrupt:
            return False
        return True

    def _check(self, digest: str, found: str) -> None:
        if found != digest:
            raise Corrupt(f"blob {digest} in {self._root}: its bytes are now {found}; restore it from a copy")


def _publish(folder: Path, digest: str, data: memoryview) -> None:
    """Write a hidden file, then move it under its digest in one step."""
    part = folder / f".part-{secrets.token_hex(8)}"
    with _told(str(folder), data.nbytes):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())  # before the rename: a crash must not leave a name without its bytes
            home = folder / digest[7:9]
            home.mkdir(exist_ok=True)
            part.replace(home / digest[9:])
            sync_folder(home)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _missing(digest: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"blob {digest}: the store does not have it; fetch it again from where it was made") from None


@contextmanager
def _told(root: str, size: int = 0) -> Iterator[None]:
    """Say in words what the operating system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Unavailable(f"{root}: no space left to keep {size:,} bytes; free some and try again") from None
        raise Unavailable(f"{root}: {error.strerror or error}; make the store usable and try again") from None


def _protocols(store: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (store.protocol,) if isinstance(store.protocol, str) else tuple(store.protocol)

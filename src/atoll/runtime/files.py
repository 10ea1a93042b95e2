"""The hub's files of its runs: for each the spool of updates, and the weights and outer state of the newest rounds."""

import hashlib
import io
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from pathlib import Path

import numpy as np
import safetensors
from pydantic import TypeAdapter, ValidationError

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Unavailable
from atoll.outer.optimiser import State as OuterState
from atoll.outer.optimiser import from_arrays, to_arrays
from atoll.registry import weights
from atoll.runtime.changes import PATTERN, Changes
from atoll.runtime.spares import Spares
from atoll.runtime.spool import Spool
from atoll.spec.document import Name
from atoll.spec.model import Signature

_PIECE = 1 << 20  # bytes that are hashed and then written or read, or the other way round, while they are in cache
_FLUSH = 32 << 20  # bytes after which what is written is sent to the disk, so that little is left for the end
_KEPT = 4  # weights and outer states: this round's and the last one's
_DTYPES = {"<f4": "F32", "<i8": "I64"}
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_AGAIN = "the run cannot go on from it; submit the job again"
log = logging.getLogger(__name__)


class Folders:
    """Every run's files, in a folder of its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.Lock()
        self._open: dict[str, RunFiles] = {}

    def of(self, run: str) -> "RunFiles":
        with self._turn:
            if run not in self._open:
                self._open[run] = RunFiles(self._folder / run)
            return self._open[run]

    def remove(self, run: str) -> None:
        """Drop what is kept of a run that is over."""
        with self._turn:
            self._open.pop(run, None)
        shutil.rmtree(self._folder / run, ignore_errors=True)

    def sweep(self, going_on: Container[str]) -> None:
        """Drop what a hub that died left of other runs than these, and what it had half written itself of these.

        A folder whose name is no run's is none of ours and stays. To be called before any run is conducted.
        """
        for path in sorted(self._folder.glob("*")):
            if path.is_symlink() or not path.is_dir() or not _is_name(path.name):
                log.warning("%s: is no run's folder; take it away if you do not need it", path)
            elif path.name in going_on:
                for part in (*path.glob("*.part-*"), *path.glob(PATTERN)):  # of updates the spool knows
                    part.unlink(missing_ok=True)
            else:
                log.info("run %s is over: dropping what is left of it", path.name)
                shutil.rmtree(path, ignore_errors=True)


class RunFiles:
    """One run's. Content is named by its digest, so that doing a merge again after a crash writes the same file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool, self.changes = Spool(folder / "spool"), Changes(folder)
        self._spares = Spares(folder)
        self._turn = threading.Lock()
        self._newest: tuple[str, np.ndarray] | None = None
        self._outer: tuple[str, OuterState] | None = None

    def put_weights(self, vector: np.ndarray, signature: Signature, pieces: Iterable[np.ndarray] | None = None) -> str:
        """Keep the flat weights, and return their digest once they outlive a loss of power.

        ``pieces`` are the vector's own, in order, where it is still being filled: each is hashed and written when it
        comes, while others work on the next ones.
        """
        weights.check(vector, signature)
        digest = self._put(vector.nbytes, [weights.head(signature)], (vector,) if pieces is None else pieces)
        with self._turn:
            self._newest = (digest, _read_only(vector))
        return digest

    def vector(self, digest: str, signature: Signature, read: Callable[[str], bytes] | None = None) -> np.ndarray:
        """Return the flat weights, read-only; verified unless they are the very array put in last.

        ``read`` gives the file's bytes where they are not the run's own: a run about a registered model reads the
        registry's. Who asks while another reads waits for it, so that they are in memory once.
        """
        with self._turn:
            if self._newest is None or self._newest[0] != digest:
                self._newest = None  # let go of before others are read
                data = self.get(digest) if read is None else read(digest)
                self._newest = (digest, weights.load(data, signature)[0])
            return self._newest[1]

    def put_outer(self, state: OuterState) -> str:
        """Keep the outer optimiser's state and return its digest; its moments are not copied."""
        arrays = to_arrays(state)
        entries = [(name, _DTYPES[array.dtype.str], array.shape, array.nbytes) for name, array in arrays.items()]
        size = sum(array.nbytes for array in arrays.values())
        digest = self._put(size, [weights.header(entries)], arrays.values())
        with self._turn:
            self._outer = (digest, state)
        return digest

    def outer(self, digest: str) -> OuterState:
        """Return the state, which is the caller's own from now on: its moments may be stepped in place."""
        with self._turn:
            held, self._outer = self._outer, None
        if held is not None and held[0] == digest:
            return held[1]
        try:
            with self._path(digest).open("rb", buffering=0) as file:
                self._check(digest, hashlib.file_digest(file, "sha256").hexdigest())
            with safetensors.safe_open(self._path(digest), framework="numpy") as tensors:
                names = tensors.keys()
                return from_arrays({name: tensors.get_tensor(name) for name in names})
        except FileNotFoundError:
            raise _gone(digest) from None
        except safetensors.SafetensorError as error:
            raise Corrupt(f"outer state {digest[:19]}...: {error}; {_AGAIN}") from None

    def get(self, digest: str) -> memoryview:
        """Return the bytes of this digest, verified; in memory once."""
        try:
            with self._path(digest).open("rb", buffering=0) as file:
                data = np.empty(os.fstat(file.fileno()).st_size, np.uint8).data
                hasher, filled = hashlib.sha256(), 0
                while count := file.readinto(data[filled : filled + _PIECE]):
                    hasher.update(data[filled : filled + count])
                    filled += count
        except FileNotFoundError:
            raise _gone(digest) from None
        self._check(digest, hasher.hexdigest())
        return data

    def _check(self, digest: str, found: str) -> None:
        if "sha256:" + found != digest:
            raise Corrupt(f"{digest[:19]}...: the stored bytes are others; {_AGAIN}")

    def tidy(self, spent: Callable[[int, str], bool], needed: Collection[str | None]) -> None:
        """Drop what no restart can need any more: updates that are ``spent(position, site)``, and old weights.

        Their files become those of the next ones. What is ``needed``, by its digest, stays, and so does what was put in
        last: a clock that was set back makes new files old.
        """
        self.spool.drop(spent)
        with self._turn:
            last = [held[0] for held in (self._newest, self._outer) if held is not None]
        stay = {self._path(digest) for digest in (*needed, *last) if digest is not None}
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-_KEPT]:
            if path not in stay:
                self._spares.add(path)
        self._spares.keep(_KEPT // 2)  # those of one round

    def _put(self, size: int, *parts: Iterable[bytes | np.ndarray]) -> str:
        """Write a file of these pieces, one after the other, that takes its name when it is whole and on the disk.

        ``size``: about how many bytes it takes.
        """
        made = self.folder / f"content.part-{threading.get_ident()}"
        hasher, waiting = hashlib.sha256(), 0
        try:
            over = self._spares.take(size)
            if over is not None:
                os.replace(over, made)
            with made.open("wb" if over is None else "r+b", buffering=0) as file:
                for piece in itertools.chain(*parts):
                    for data in _cut(piece):
                        hasher.update(data)
                        waiting += _write(file, data)
                    if waiting >= _FLUSH:
                        os.fdatasync(file.fileno())
                        waiting = 0
                file.truncate()  # what a larger spare held behind this
                os.fsync(file.fileno())
            digest = "sha256:" + hasher.hexdigest()
            os.replace(made, self._path(digest))
            sync_folder(self.folder)
        except OSError as error:
            self._spares.keep(0)
            raise Unavailable(f"{self.folder}: {error.strerror}; free some space and the run goes on") from None
        finally:
            made.unlink(missing_ok=True)
        return digest

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest.removeprefix('sha256:')}.safetensors"


def _cut(piece: bytes | np.ndarray) -> Iterator[memoryview]:
    data = piece.data if isinstance(piece, np.ndarray) else memoryview(piece)
    data = data.cast("B") if data.nbytes else memoryview(b"")
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def _write(file: io.FileIO, data: memoryview) -> int:
    written = 0
    while written < len(data):  # a disk that fills up takes a part, and tells why at the next try
        written += file.write(data[written:])
    return written


def _read_only(vector: np.ndarray) -> np.ndarray:
    view = vector.view()
    view.flags.writeable = False
    return view


def _gone(digest: str) -> Corrupt:
    return Corrupt(f"{digest[:19]}...: is not among the run's files any more; {_AGAIN}")


def _is_name(text: str) -> bool:
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return True

"""The hub's files of one run: the spool of updates, and the weights and outer state of the newest rounds."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from atoll.errors import Corrupt, Unavailable
from atoll.outer.optimiser import State as OuterState
from atoll.outer.optimiser import from_arrays, to_arrays
from atoll.registry import weights
from atoll.runtime.spool import Spool
from atoll.spec.document import sha256
from atoll.spec.model import Signature

_KEPT = 4  # weights and outer states: this round's and the last one's


class RunFiles:
    """Content is named by its digest, so that doing a merge again after a crash writes the same file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = Spool(folder / "spool")
        self._turn = threading.Lock()
        self._newest: tuple[str, np.ndarray] | None = None

    def put_weights(self, vector: np.ndarray, signature: Signature) -> str:
        digest = self._put(weights.save(vector, signature))
        with self._turn:
            self._newest = (digest, vector)
        return digest

    def vector(self, digest: str, signature: Signature, read: Callable[[str], bytes] | None = None) -> np.ndarray:
        """Return the flat weights; verified unless they are the very array put in last. By default ``read`` is `get`:
        a run about a registered model has no weights of its own, and reads the registry's."""
        with self._turn:
            if self._newest is not None and self._newest[0] == digest:
                return self._newest[1]
        vector, _ = weights.load((read or self.get)(digest), signature)
        with self._turn:
            self._newest = (digest, vector)
        return vector

    def put_outer(self, state: OuterState) -> str:
        return self._put(safetensors.numpy.save(to_arrays(state)))

    def outer(self, digest: str) -> OuterState:
        try:
            return from_arrays(safetensors.numpy.load(self.get(digest)))
        except safetensors.SafetensorError as error:
            raise Corrupt(f"outer state {digest[:19]}...: {error}; the run must begin anew") from None

    def get(self, digest: str) -> bytes:
        """Return the bytes of this digest, verified."""
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise Corrupt(f"{digest[:19]}...: is not among the run's files any more; the run must begin anew") from None
        if sha256(data) != digest:
            raise Corrupt(f"{digest[:19]}...: the stored bytes are others; the run must begin anew")
        return data

    def tidy(self, spent: Callable[[int, str], bool]) -> None:
        """Drop what no restart can need any more: updates that are ``spent(position, site)``, and old weights."""
        self.spool.drop(spent)
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-_KEPT]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, data: bytes) -> str:
        digest = sha256(data)
        path = self._path(digest)
        part = path.with_suffix(f".part-{threading.get_ident()}")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise Unavailable(f"{self.folder}: {error.strerror}; free some space and resume the run") from None
        return digest

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest.removeprefix('sha256:')}.safetensors"

"""A file that the ranks of a mesh write together, each its own places: nothing is sent, and none has the whole."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from atoll.inner.held import Held
from atoll.inner.mesh import Mesh


class Joint:
    """A new file of zeros, but for what is written. It is at its path whole, or not at all.

    All ranks take part in each call but `write`. Not flushed to a disk: its reader has a digest of it. It is written
    by position and not through a mapping: ranks on several nodes would overwrite each other's numbers within a page of
    a network's file system. There, too, all see what was written before a file was closed.
    """

    def __init__(self, mesh: Mesh, path: Path, size: int) -> None:
        """Make room for so many bytes. Raises `OSError`, at all ranks, where there is none."""
        self._mesh, self._path, self._part = mesh, path, path.with_name(path.name + ".part")
        self._file: int | None = None
        try:
            self._one_does(lambda: _reserve(self._part, size))
            self._file = os.open(self._part, os.O_WRONLY)
        except OSError:
            self.drop()
            raise

    def write(self, one: Held, since: int = 0) -> None:
        """Write a part of a vector that begins at the byte ``since``. Raises `OSError`."""
        assert self._file is not None, "nothing is written after `written`"
        width = one.value.element_size()
        for at, run in one.runs():
            rest, place = run.view(torch.uint8).numpy().data, since + at * width
            while rest:
                done = os.pwrite(self._file, rest, place)
                rest, place = rest[done:], place + done

    def written(self, well: bool = True) -> bool:
        """Wait for what all ranks write, and tell whether it is well with all of them."""
        self._close()
        return all(row[0] for row in self._mesh.gather([well]))

    def read(self) -> torch.Tensor:
        """Return the bytes that all have written, of one or more, mapped. One rank may do so alone."""
        return torch.from_numpy(np.memmap(self._part, np.uint8, "c"))

    def put(self, head: bytes = b"") -> None:
        """Put the file at its path, with what the first rank has it begin with. Raises `OSError`, at all ranks."""
        self._one_does(lambda: _finish(self._part, head, self._path))

    def drop(self) -> None:
        """Leave nothing of it, if it was not put."""
        self._close()
        if self._mesh.rank == 0:
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _one_does(self, work: Callable[[], None]) -> None:
        """Have the first rank do what one can do for all, who hear of its failure, for they would wait for it else."""
        failed: OSError | None = None
        if self._mesh.rank == 0:
            try:
                work()
            except OSError as error:
                failed = error
        number = int(sum(row[0] for row in self._mesh.gather([float((failed.errno or 1) if failed else 0)])))
        if number:
            raise failed or OSError(number, os.strerror(number))


def _reserve(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):  # a lack of room is told now, to all
            os.posix_fallocate(file.fileno(), 0, size)


def _finish(part: Path, head: bytes, path: Path) -> None:
    if head:
        with part.open("r+b") as file:
            file.write(head)
    os.replace(part, path)

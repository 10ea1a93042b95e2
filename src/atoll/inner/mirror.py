"""A rank's own part of a round's state, in memory that outlives the rank: whoever takes its place goes on from there.

The memory is two anonymous files that the executor holds and hands to each process of that place. They are written by
turns, so that one is whole whenever the process is killed: a mark at its beginning is written last. No pickle.
"""

import json
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atoll.errors import Corrupt
from atoll.inner.whole import described, room
from atoll.spec.document import canonical

_HEADER = struct.Struct("<8sqq")  # mark, step, bytes of what is said of the tensors
_MARK = b"atollmir"
_SHARE = 0.03  # of the time that steps take, for mirroring
_PIECES = 512  # buffers in one write; the kernel takes 1024 at most


class Mirror:
    """One place's; ``files`` are numbers of two files that are read and written by position."""

    def __init__(self, files: Sequence[int]) -> None:
        self._files = tuple(files)
        self._next = 0
        self._spent, self._since = 0.0, time.monotonic()  # seconds of the last writing; when it ended

    def due(self) -> bool:
        """Tell whether enough time has gone by since the last writing for another one to cost little of it."""
        return bool(self._files) and time.monotonic() - self._since >= self._spent / _SHARE

    def write(self, step: int, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep named tensors and JSON values that go with them, as they are after ``step`` steps. Raises `OSError`."""
        if not self._files:
            return
        began = time.monotonic()
        file, self._next = self._files[self._next], 1 - self._next
        said = canonical({"about": about, "tensors": described(tensors)})
        os.pwrite(file, bytes(_HEADER.size), 0)
        pieces = [memoryview(said), *(_bytes(t) for t in tensors.values() if t.numel())]
        at = _HEADER.size
        for first in range(0, len(pieces), _PIECES):
            at = _written(file, pieces[first : first + _PIECES], at)
        os.pwrite(file, _HEADER.pack(_MARK, step, len(said)), 0)
        self._since = time.monotonic()
        self._spent = self._since - began

    def steps(self, about: Mapping[str, Any]) -> list[int]:
        """Return after how many steps the two are that say this, among other things; -1 for one that does not."""
        found = [-1, -1]
        for number, file in enumerate(self._files):
            step, said = _said(file)
            if step >= 0 and all(said["about"].get(name) == value for name, value in about.items()):
                found[number] = step
        return found

    def read(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and values after so many steps. Raises `Corrupt` when they are not there."""
        for file in self._files:
            found, said = _said(file)
            if found != step:
                continue
            at, tensors = _HEADER.size + said["bytes"], dict[str, torch.Tensor]()
            for name, kind, shape in said["tensors"]:
                tensors[name] = tensor = room(kind, shape)
                if tensor.numel():
                    at = _read(file, _bytes(tensor), at)
            return tensors, said["about"]
        raise Corrupt(f"mirror: nothing is kept of step {step}; the round begins anew")


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes: its own memory where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _said(file: int) -> tuple[int, dict[str, Any]]:
    """Return the step of a file, -1 where it is not whole, and what it says of its tensors."""
    head = os.pread(file, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        return -1, {}
    mark, step, size = _HEADER.unpack(head)
    if mark != _MARK:
        return -1, {}
    return step, {**json.loads(os.pread(file, size, _HEADER.size)), "bytes": size}


def _written(file: int, pieces: list[memoryview], at: int) -> int:
    while pieces:
        done = os.pwritev(file, pieces, at)
        at += done
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]
    return at


def _read(file: int, into: memoryview, at: int) -> int:
    while into:
        done = os.preadv(file, [into], at)
        if not done:
            raise Corrupt("mirror: it ends before its tensors do; the round begins anew")
        into, at = into[done:], at + done
    return at

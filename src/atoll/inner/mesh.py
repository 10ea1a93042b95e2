"""The ranks of one site as a group that can reduce: gloo over loopback, met through a file.

A rank that dies breaks its peers' connections, and each that notices breaks its own in turn (`Links.sever`), so that
none waits for a sum that will not come. Then they `leave`, and meet anew. The executor, which sees the processes
themselves, says when: the time limit here is only for a rank that nobody watches.
"""

import contextlib
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from atoll.errors import TaskFailed
from atoll.spec.plan import Layout

_TIMEOUT = timedelta(seconds=120)
_LOOK = 0.002  # seconds between two looks at who has come
# Outermost first: ranks that exchange most are neighbours. Torch puts a sharded axis before those it is combined with.
_AXES = ("pipeline", "data", "shard", "expert", "context", "tensor")


_ALONE = Layout()


@dataclass(frozen=True, slots=True)
class Mesh:
    """A site's layout and this process's place in it. Without a ``device`` mesh it is data parallel only."""

    rank: int = 0
    ranks: int = 1
    layout: Layout = _ALONE
    device: DeviceMesh | None = None

    @property
    def shares(self) -> int:
        """Into how many shares a batch is cut."""
        return self.ranks if self.device is None else self.layout.shares

    @property
    def share(self) -> int:
        """Which share of a batch is this rank's; ranks of one share do the same with it, or each a part of it."""
        if self.device is None:
            return self.rank
        shard, expert = self.layout.shard, self.layout.expert
        return (self.place("data") * shard + self.place("shard")) * expert + self.place("expert")

    @property
    def averaged(self) -> int:
        """Over how many ranks torch averages gradients as they are computed."""
        return self.ranks if self.device is None else self.layout.data * self.layout.shard

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one of its share that says what its loss is."""
        last = self.device is None or self.place("pipeline") == self.layout.pipeline - 1
        return last and self.place("context") == 0 and self.place("tensor") == 0

    def place(self, axis: str) -> int:
        """Return where on an axis this rank is."""
        return self.device.get_local_rank(axis) if self.has(axis) and self.device is not None else 0

    def has(self, axis: str) -> bool:
        """Whether there are several ranks along an axis."""
        return self.device is not None and getattr(self.layout, axis) > 1

    def axis(self, axis: str) -> DeviceMesh:
        """Return the mesh along an axis that has several ranks."""
        assert self.device is not None, "a mesh of data parallel ranks has no axes"
        return self.device[axis]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; float64 so that counts and losses lose nothing."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values, in rank order; all ranks give equally many."""
        table = torch.zeros(self.ranks, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        return self.sum(table).tolist()


class Links:
    """The connections of the group that this process is in; any thread may sever them."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._before: set[int] = set()
        self._ours: set[int] = set()  # inodes: a number may be another file's by the time that it is looked at
        self._severed = False

    @property
    def severed(self) -> bool:
        """Whether they were, and no others are there yet."""
        return self._severed

    def watch(self) -> None:
        """Begin to count: what is opened from here until `seal` is the group's."""
        with self._turn:
            self._before, self._severed = set(_sockets()), False

    def seal(self) -> None:
        """Take what was opened for the group's own. Raises `ConnectionError` when it was severed in the meantime."""
        with self._turn:
            self._ours |= _sockets().keys() - self._before
            if self._severed:
                self._cut()
                raise ConnectionError("severed while the ranks met")

    def sever(self) -> None:
        """Break all connections: whoever waits at either end goes on with an error."""
        with self._turn:
            self._severed = True
            self._cut()

    def _cut(self) -> None:
        for inode, number in _sockets().items():
            if inode in self._ours:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
                    if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo aborts without its listener
                        one.shutdown(socket.SHUT_RDWR)
        self._ours = set()


def _sockets() -> dict[int, int]:
    """Return the connected sockets of this process, inode -> number."""
    found: dict[int, int] = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it is gone by now
            told = os.stat(int(name))
            if stat.S_ISSOCK(told.st_mode):
                found[told.st_ino] = int(name)
    return found


LINKS = Links()


def join(rank: int, ranks: int, meeting: Path, in_vain: Callable[[], bool] = lambda: False) -> Mesh:
    """Meet the other ranks at the file ``meeting``, which must not exist beforehand.

    Raises `ConnectionError` once it is ``in_vain`` to wait for them, or after as long as they have for a sum.
    """
    if ranks > 1:
        _await(rank, ranks, meeting, in_vain)
        LINKS.watch()
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
        LINKS.seal()
    return Mesh(rank, ranks)


def _await(rank: int, ranks: int, meeting: Path, in_vain: Callable[[], bool]) -> None:
    """Wait for all to be at the meeting: torch's own wait cannot be ended."""
    here = [meeting.with_name(f"{meeting.name}.{number}") for number in range(ranks)]
    here[rank].touch()
    until = time.monotonic() + _TIMEOUT.total_seconds()
    while not all(path.exists() for path in here):
        if in_vain() or time.monotonic() > until:
            raise ConnectionError("not all ranks came to meet")
        time.sleep(_LOOK)


def leave() -> None:
    """Leave the group, if there is one: nothing that torch remembers of it is true of the next."""
    if not dist.is_initialized():
        return
    LINKS.sever()
    dist.destroy_process_group()
    _device_mesh.cache_clear()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor, _redistribute

        # Meshes of one shape are equal to torch, and what it derives from one names that one's groups (torch 2.13).
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()  # pyright: ignore
        torch._C._clear_DTensor_sharding_propagator_cache()  # pyright: ignore
        _redistribute._gen_transform_infos.cache_clear()  # pyright: ignore


def broken(error: BaseException) -> bool:
    """Tell whether an error is that of a group that lost a rank, wherever torch raised it."""
    while error is not None:
        if isinstance(error, ConnectionError | dist.DistError) or "gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    return False


def laid_out(mesh: Mesh, layout: Layout) -> Mesh:
    """Return the ranks that have met as a mesh of this layout. All of them call this, in the same order of layouts.

    Raises `TaskFailed` when they are not as many as the layout has.
    """
    if layout.ranks != mesh.ranks:
        raise TaskFailed(
            f"layout: data x shard x tensor x pipeline x context x expert is {layout.ranks}, and there are "
            f"{mesh.ranks} ranks; set the degrees so that their product is {mesh.ranks}"
        )
    if layout.plain:
        return Mesh(mesh.rank, mesh.ranks, layout)
    # Torch shards over an axis, also where only copies are averaged: then it is one rank long.
    names = [name for name in _AXES if getattr(layout, name) > 1 or (name == "shard" and layout.data > 1)]
    sizes = [getattr(layout, name) for name in names]
    return Mesh(mesh.rank, mesh.ranks, layout, _device_mesh(tuple(names), tuple(sizes)))


@cache  # a group for each axis is made once in a process, which meets its peers once
def _device_mesh(names: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
    LINKS.watch()
    try:
        return init_device_mesh("cpu", sizes, mesh_dim_names=names)
    finally:
        LINKS.seal()

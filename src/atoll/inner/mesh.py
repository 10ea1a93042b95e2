"""The ranks of one site as a group that can reduce: gloo over loopback, met through a file.

A rank that dies breaks its peers' connections; one that falls silent leaves them waiting. Either way the executor,
which sees the processes themselves, ends the group: the time limit here is only for a rank that nobody watches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from atoll.errors import TaskFailed
from atoll.spec.plan import Layout

_TIMEOUT = timedelta(seconds=120)
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


def join(rank: int, ranks: int, meeting: Path) -> Mesh:
    """Meet the other ranks at the file ``meeting``, which must not exist beforehand."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    return Mesh(rank, ranks)


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
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def replicated(model: torch.nn.Module, mesh: Mesh) -> torch.nn.Module:
    """Make an untouched model average its gradients over the mesh as they are computed (torch's own DDP).

    `replicate` hooks the module in place, so that the user's loss sees the class it built, not a wrapper. Looking for
    unused parameters lets a model have some; and without it DDP lays its buckets out anew after a group's first step,
    which changes the order in which three and more ranks are added, and so the bits of a round that another group
    begins in the middle.
    """
    return replicate(model, find_unused_parameters=True) if mesh.ranks > 1 else model

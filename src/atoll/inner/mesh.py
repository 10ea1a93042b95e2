"""The ranks of one site as a group that can reduce: gloo over loopback, met through a file.

A rank that dies breaks its peers' connections; one that falls silent leaves them waiting. Either way the executor,
which sees the processes themselves, ends the group: the time limit here is only for a rank that nobody watches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._composable.replicate import replicate

_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Data-parallel degree of a site and this process's place in it."""

    rank: int = 0
    ranks: int = 1

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


def parallelize(model: torch.nn.Module, mesh: Mesh) -> torch.nn.Module:
    """Make an untouched model average its gradients over the mesh as they are computed (torch's own DDP).

    `replicate` hooks the module in place, so that the user's loss sees the class it built, not a wrapper. Looking for
    unused parameters lets a model have some; and without it DDP lays its buckets out anew after a group's first step,
    which changes the order in which three and more ranks are added, and so the bits of a round that another group
    begins in the middle.
    """
    return replicate(model, find_unused_parameters=True) if mesh.ranks > 1 else model

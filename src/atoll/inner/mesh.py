"""The ranks of one site as a group that can reduce: gloo over loopback, met through a file."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._composable.replicate import replicate

_TIMEOUT = timedelta(seconds=120)  # a collective that waits longer has lost a rank; the executor sees that sooner


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


def join(rank: int, ranks: int, meeting: Path) -> Mesh:
    """Meet the other ranks at the file ``meeting``, which must not exist beforehand."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    return Mesh(rank, ranks)


def parallelize(model: torch.nn.Module, mesh: Mesh) -> torch.nn.Module:
    """Make an untouched model average its gradients over the mesh as they are computed (torch's own DDP).

    `replicate` hooks the module in place, so that the user's loss sees the class it built, not a wrapper.
    """
    return replicate(model) if mesh.ranks > 1 else model
